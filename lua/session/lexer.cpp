#include "lua/session/lexer.h"

#include <algorithm>

namespace moe::lua {
namespace {
bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
bool is_digit(char c) { return c >= '0' && c <= '9'; }

/// "[[" or "[==[" at `at`: its level, −1 for none.
int long_bracket(std::string_view code, size_t at) {
    if (at >= code.size() || code[at] != '[') return -1;
    size_t i = at + 1;
    while (i < code.size() && code[i] == '=') ++i;
    return i < code.size() && code[i] == '[' ? int(i - at) - 1 : -1;
}

/// The end of a long string or comment whose bracket is at `at`.
size_t end_of_long(std::string_view code, size_t at, int level, bool& open) {
    std::string close = "]" + std::string(size_t(level), '=') + "]";
    size_t end = code.find(close, at + size_t(level) + 2);
    open = end == std::string_view::npos;
    return open ? code.size() : end + close.size();
}

size_t end_of_quoted(std::string_view code, size_t at, bool& open) {
    char quote = code[at];
    for (size_t i = at + 1; i < code.size(); ++i) {
        if (code[i] == quote) return i + 1;
        if (code[i] == '\n') return open = true, i;
        if (code[i] == '\\' && code[i + 1 < code.size() ? i + 1 : i] == 'z') {
            for (i += 2; i < code.size() && (code[i] == ' ' || code[i] == '\n' || code[i] == '\t' || code[i] == '\r');) ++i;
            --i;
        } else if (code[i] == '\\') {
            ++i;
        }
    }
    open = true;
    return code.size();
}

size_t end_of_number(std::string_view code, size_t at) {
    bool hex = at + 1 < code.size() && code[at] == '0' && (code[at + 1] == 'x' || code[at + 1] == 'X');
    size_t i = at;
    while (i < code.size() && (is_letter(code[i]) || is_digit(code[i]) || code[i] == '.')) {
        if (code.substr(i, 2) == "..") break;
        char c = char(code[i] | 32);
        bool exponent = c == (hex ? 'p' : 'e') && i + 1 < code.size() && (code[i + 1] == '+' || code[i + 1] == '-');
        i += exponent ? 2 : 1;
    }
    return i;
}

size_t end_of_symbol(std::string_view code, size_t at) {
    for (std::string_view symbol : {"...", "..", "==", "~=", "<=", ">=", "//", "::", "<<", ">>"}) {
        if (code.substr(at, symbol.size()) == symbol) return at + symbol.size();
    }
    return at + 1;
}
}  // namespace

const std::vector<std::string>& keywords() {
    static const std::vector<std::string> words = {"and", "break", "do", "else", "elseif", "end", "false", "for", "function", "goto", "if",
                                                   "in", "local", "nil", "not", "or", "repeat", "return", "then", "true", "until", "while"};
    return words;
}

bool is_identifier(std::string_view text) {
    bool letters = !text.empty() && is_letter(text[0]) && std::all_of(text.begin(), text.end(), [](char c) { return is_letter(c) || is_digit(c); });
    return letters && !std::binary_search(keywords().begin(), keywords().end(), text);
}

std::vector<Token> tokens(std::string_view code) {
    std::vector<Token> out;
    for (size_t i = 0; i < code.size();) {
        char c = code[i];
        if (c == ' ' || (c >= '\t' && c <= '\r')) {
            ++i;
            continue;
        }
        Token t{TokenKind::symbol, i, i + 1};
        if (is_letter(c)) {
            while (t.end < code.size() && (is_letter(code[t.end]) || is_digit(code[t.end]))) ++t.end;
            t.kind = is_identifier(code.substr(i, t.end - i)) ? TokenKind::name : TokenKind::keyword;
        } else if (is_digit(c) || (c == '.' && i + 1 < code.size() && is_digit(code[i + 1]))) {
            t.kind = TokenKind::number;
            t.end = end_of_number(code, i);
        } else if (c == '"' || c == '\'') {
            t.kind = TokenKind::string;
            t.end = end_of_quoted(code, i, t.open);
        } else if (int level = long_bracket(code, i); level >= 0) {
            t.kind = TokenKind::string;
            t.end = end_of_long(code, i, level, t.open);
        } else if (code.substr(i, 2) == "--") {
            t.kind = TokenKind::comment;
            if (int deep = long_bracket(code, i + 2); deep >= 0) {
                t.end = end_of_long(code, i + 2, deep, t.open);
            } else {
                t.end = std::min(code.find('\n', i), code.size());
                t.open = t.end == code.size();
            }
        } else {
            t.end = end_of_symbol(code, i);
        }
        out.push_back(t);
        i = t.end;
    }
    return out;
}

std::string with_locals_kept(std::string_view code, bool (*keep_local)(const void* context, std::string_view name), const void* context) {
    std::vector<Token> all = tokens(code);
    std::erase_if(all, [](const Token& t) { return t.kind == TokenKind::comment; });
    auto text = [&](size_t i) { return i < all.size() ? code.substr(all[i].begin, all[i].end - all[i].begin) : std::string_view(); };
    auto is_name = [&](size_t i) { return i < all.size() && all[i].kind == TokenKind::name; };
    std::string out(code);
    std::vector<size_t> without_value;      // ends of name lists that need " = nil"
    int depth = 0;
    for (size_t i = 0; i < all.size(); ++i) {
        std::string_view word = text(i);
        if (all[i].kind == TokenKind::keyword) {
            // "for" and "while" count by their "do", "elseif" and "else" belong to the "if".
            if (word == "function" || word == "do" || word == "if" || word == "repeat") ++depth;
            if (word == "end" || word == "until") --depth;
            if (word != "local" || depth > 0) continue;
            bool kept = true;
            size_t last = i + 1;
            if (text(i + 1) == "function") {
                kept = is_name(i + 2) && !keep_local(context, text(i + 2));
            } else {
                for (;; last += 2) {
                    kept = kept && is_name(last) && !keep_local(context, text(last)) && text(last + 1) != "<";
                    if (text(last + 1) != "," || !kept) break;
                }
                if (kept && text(last + 1) != "=") without_value.push_back(all[last].end);
            }
            if (kept) std::fill_n(out.begin() + long(all[i].begin), 5, ' ');
        } else if (all[i].kind == TokenKind::symbol) {
            if (word == "(" || word == "{" || word == "[") ++depth;
            if (word == ")" || word == "}" || word == "]") --depth;
        }
    }
    for (auto at = without_value.rbegin(); at != without_value.rend(); ++at) out.insert(*at, " = nil");
    return out;
}
}  // namespace moe::lua
