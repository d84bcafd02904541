// The nearest of a list of names, for messages about a key, option or command that does not exist.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace moe {

/// Letters to insert, delete, replace or swap with their neighbour to turn a into b, upper and lower case being alike.
/// Source: Damerau, 1964 (optimal string alignment).
int edit_distance(std::string_view a, std::string_view b);

/// The candidate nearest to `word`; the first of several. "" when none is a third of its letters away or less, is part of it or has it as a part.
std::string nearest(std::string_view word, const std::vector<std::string>& candidates);

/// A hint for an error: `did you mean "x"?`, or "" where nothing is near.
std::string did_you_mean(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace moe
