// Values behind names in unfinished code: for completion and inspection.
#pragma once
#include "lua/session/lexer.h"

#include <lua.hpp>

#include <string>
#include <string_view>
#include <vector>

namespace moe::lua {

/// Code up to a cursor as tokens without comments.
class Code {
public:
    explicit Code(std::string_view code);
    size_t size() const { return tokens_.size(); }
    const Token& operator[](size_t i) const { return tokens_[i]; }
    /// Text of a token, "" outside of the list: index −1 is npos.
    std::string_view text(size_t i) const;
    bool is_name(size_t i) const { return i < size() && tokens_[i].kind == TokenKind::name; }
    /// True where the cursor is inside a comment.
    bool in_comment() const { return in_comment_; }
    /// The opening bracket that closes at token `close`, npos for none.
    size_t opening(size_t close) const;
    /// The innermost bracket before token `i` that is still open there, npos for none.
    size_t enclosing(size_t i) const;
    /// Commas between the open bracket and token `i`, those in inner brackets not counted.
    int commas(size_t bracket, size_t i) const;
    static constexpr size_t npos = size_t(-1);

private:
    std::string_view code_;
    std::vector<Token> tokens_;
    bool in_comment_ = false;
};

/// Pushes the value of the chain of names, indices and texts that ends with token `last`: "run.model.layers[3]". Returns false, and
/// pushes nothing, where there is none or a call is in it (but one that gives a configuration: the defaults stand for it). Runs getters of our own types, and no Lua function.
bool push_chain(lua_State* L, const Code& code, size_t last);

/// Pushes the function that a call's bracket at token `bracket` ("(" or "{") or its text belongs to: the chain that ends right before it,
/// a method's too. False and nothing where there is none.
bool push_callee(lua_State* L, const Code& code, size_t bracket);

/// Pushes object.key without running Lua functions; the object is at `index`.
bool push_member(lua_State* L, int index, const std::string& key);

/// A text token's value; only plain ones, without escapes.
std::string string_value(std::string_view token);

}  // namespace moe::lua
