// Lua source as tokens, tolerant of what is not finished or wrong: for colours, completion and what is kept of an input.
#pragma once
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace moe::lua {

enum class TokenKind { name, keyword, number, string, comment, symbol };

/// Bytes [begin, end) of the source.
struct Token {
    TokenKind kind;
    size_t begin, end;
    bool open = false;      ///< a string or a long comment that the source does not close; a line comment that a line end does not follow
};

/// All tokens in order; what is between them is white space. Bytes that no Lua token has are symbols of one byte.
std::vector<Token> tokens(std::string_view code);
/// Lua's reserved words, sorted.
const std::vector<std::string>& keywords();
bool is_identifier(std::string_view text);

/// The source of an input whose top-level locals become globals, so that the next input sees them: "local x = 1" is "      x = 1".
/// Lines and columns stay. Locals with an attribute (<close>, <const>) stay local, and those for which `keep_local` says so.
std::string with_locals_kept(std::string_view code, bool (*keep_local)(const void* context, std::string_view name), const void* context);

}  // namespace moe::lua
