// The input as a terminal shows it: coloured, over several lines, with the cursor at its place.
#pragma once
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace moe::shell {

/// Bytes [begin, end) of a text in a colour, an SGR parameter such as "35".
struct Span {
    size_t begin, end;
    const char* colour;
};

/// Lua source in colours: spans in order.
std::vector<Span> lua_colours(std::string_view code);

/// The texts that draw the input and, from where drawing leaves the cursor, erase it.
struct Picture {
    std::string draw, erase;
};

struct PromptText {
    std::string first, next;        ///< in front of the first line and of the others; no escape sequences, one width
    const char* colour = "";        ///< SGR parameter of both, "" for none
};

/// `text` with the cursor at byte `cursor` on a screen of that size; where it is higher than the screen, the lines around the cursor.
/// Control characters are drawn as ^X.
Picture picture(const PromptText& prompt, std::string_view text, const std::vector<Span>& spans, size_t cursor, int rows, int columns);

/// Columns that a UTF-8 text takes, escape sequences none.
int width_of(std::string_view text);
/// Lines that are longer broken at spaces, what follows indented by two more than its line; a word that is longer stays whole.
std::string wrapped(std::string_view text, int columns);
/// Names in columns, read downwards, as ls shows them.
std::string in_columns(const std::vector<std::string>& names, int columns);

}  // namespace moe::shell
