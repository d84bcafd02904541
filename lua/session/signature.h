// What help texts say of arguments: their first line is a signature, ": " and what the function does.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace moe::lua {

/// Signature and first sentence of a help text.
std::string note_of(const std::string& help);

/// "moe.run {config =, name =}: …" → config, name; of the braces of argument `argument` (0: the first) where the signature has "(". `is_changes` becomes true
/// where they are {changes}, of a configuration.
std::vector<std::string> option_names(const std::string& help, int argument, bool& is_changes);

/// Words in quotes of a help text: the values that its options take.
std::vector<std::string> quoted_words(const std::string& help);

}  // namespace moe::lua
