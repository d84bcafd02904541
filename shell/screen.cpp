#include "shell/screen.h"

#include "lua/session/lexer.h"

#include <wchar.h>

#include <algorithm>

namespace moe::shell {
namespace {
/// Bytes of the UTF-8 character at `at`, at least 1; `code` becomes its number, U+FFFD for a broken one.
size_t character(std::string_view text, size_t at, char32_t& code) {
    auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
    unsigned first = byte(at);
    size_t length = first < 0x80 ? 1 : first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : first >= 0xc0 ? 2 : 0;
    code = length == 1 ? first : first & (0x7fu >> length);
    for (size_t i = 1; i < length; ++i) {
        if ((byte(at + i) & 0xc0) != 0x80) length = 0;
        code = code << 6 | (byte(at + i) & 0x3f);
    }
    if (length == 0) code = 0xfffd;
    return std::max<size_t>(length, 1);
}

/// Length of the escape sequence at `at`, 0 for none.
size_t escape_length(std::string_view text, size_t at) {
    if (text.substr(at, 2) != "\033[") return 0;
    size_t end = at + 2;
    while (end < text.size() && (text[end] < '@' || text[end] > '~')) ++end;
    return std::min(end + 1, text.size()) - at;
}

int columns_of(char32_t code) { return std::max(0, wcwidth(wchar_t(code))); }

/// Rows of a screen, filled from the left; remembers where the cursor is.
class Rows {
public:
    explicit Rows(int columns) : columns_(columns) {}
    void paint(const char* colour) {
        if (std::string_view(colour) == colour_) return;
        if (*colour_) rows_.back() += "\033[0m";
        colour_ = colour;
        if (*colour_) rows_.back() += std::string("\033[") + colour_ + "m";
    }
    void add(std::string_view text, int width) {
        if (column_ + width > columns_) line();
        rows_.back() += text;
        column_ += width;
    }
    void line() {
        const char* colour = colour_;
        paint("");
        rows_.emplace_back();
        column_ = 0;
        paint(colour);
    }
    void mark_cursor() {
        if (column_ >= columns_) line();
        cursor_row_ = rows_.size() - 1;
        cursor_column_ = column_;
    }
    Picture window(int height) {
        paint("");
        size_t shown = std::min(rows_.size(), size_t(std::max(1, height)));
        size_t begin = std::min(cursor_row_ - std::min(cursor_row_, shown / 2), rows_.size() - shown), end = begin + shown;
        Picture p;
        for (size_t i = begin; i < end; ++i) p.draw += (i > begin ? "\r\n" : "") + rows_[i];
        if (end - 1 > cursor_row_) p.draw += "\033[" + std::to_string(end - 1 - cursor_row_) + "A";
        p.draw += "\r";
        if (cursor_column_) p.draw += "\033[" + std::to_string(cursor_column_) + "C";
        p.erase = "\r";
        if (cursor_row_ > begin) p.erase += "\033[" + std::to_string(cursor_row_ - begin) + "A";
        p.erase += "\033[J";
        return p;
    }

private:
    int columns_, column_ = 0, cursor_column_ = 0;
    size_t cursor_row_ = 0;
    std::vector<std::string> rows_{1};
    const char* colour_ = "";
};
}  // namespace

std::vector<Span> lua_colours(std::string_view code) {
    std::vector<Span> spans;
    // A word in front of a shell command is no Lua.
    size_t start = code.find_first_not_of(" \t\n");
    if (start != std::string_view::npos && (code[start] == '!' || code[start] == '?')) return {{start, start + 1, "35"}};
    for (auto& t : lua::tokens(code)) {
        std::string_view text = code.substr(t.begin, t.end - t.begin);
        const char* colour = "";
        switch (t.kind) {
            case lua::TokenKind::keyword: colour = text == "true" || text == "false" || text == "nil" ? "36" : "35"; break;
            case lua::TokenKind::string: colour = "32"; break;
            case lua::TokenKind::number: colour = "36"; break;
            case lua::TokenKind::comment: colour = "2"; break;
            case lua::TokenKind::name: colour = text == "moe" || text == "viz" || text == "help" ? "34" : ""; break;
            case lua::TokenKind::symbol: break;
        }
        if (*colour) spans.push_back({t.begin, t.end, colour});
    }
    return spans;
}

Picture picture(const PromptText& prompt, std::string_view text, const std::vector<Span>& spans, size_t cursor, int rows, int columns) {
    Rows screen(std::max(columns, 8));
    auto put_prompt = [&](const std::string& words) {
        screen.paint(prompt.colour);
        for (size_t at = 0; at < words.size();) {
            char32_t code;
            size_t length = character(words, at, code);
            screen.add(std::string_view(words).substr(at, length), columns_of(code));
            at += length;
        }
        screen.paint("");
    };
    put_prompt(prompt.first);
    size_t span = 0;
    for (size_t at = 0;;) {
        if (at == cursor) screen.mark_cursor();
        if (at >= text.size()) break;
        while (span < spans.size() && spans[span].end <= at) ++span;
        screen.paint(span < spans.size() && spans[span].begin <= at ? spans[span].colour : "");
        char32_t code;
        size_t length = character(text, at, code);
        if (code == '\n') {
            screen.line();
            put_prompt(prompt.next);
        } else if (code == '\t') {
            screen.add("    ", 4);
        } else if (code < 32 || code == 127) {
            screen.add(std::string("^") + char(code ^ 64), 2);
        } else if (code == 0xfffd) {
            screen.add("?", 1);
        } else {
            screen.add(text.substr(at, length), columns_of(code));
        }
        at += length;
        if (cursor < at && cursor > at - length) screen.mark_cursor();
    }
    return screen.window(rows);
}

int width_of(std::string_view text) {
    int width = 0;
    for (size_t at = 0; at < text.size();) {
        if (size_t escape = escape_length(text, at)) {
            at += escape;
            continue;
        }
        char32_t code;
        at += character(text, at, code);
        width += columns_of(code);
    }
    return width;
}

std::string wrapped(std::string_view text, int columns) {
    std::string out;
    for (size_t at = 0; at < text.size();) {
        size_t end = std::min(text.find('\n', at), text.size());
        std::string_view line = text.substr(at, end - at);
        size_t indent = std::min(line.find_first_not_of(' '), line.size()), word = indent;
        int column = int(indent);
        out += line.substr(0, indent);
        while (word < line.size()) {
            size_t begin = std::min(line.find_first_not_of(' ', word), line.size()), stop = std::min(line.find(' ', begin), line.size());
            int width = width_of(line.substr(word, stop - word));
            if (column + width > columns && column > int(indent) + 2) {
                out += "\n" + std::string(indent + 2, ' ');
                column = int(indent) + 2;
                word = begin;
                width = width_of(line.substr(word, stop - word));
            }
            out += line.substr(word, stop - word);
            column += width;
            word = stop;
        }
        if (end < text.size()) out += '\n';
        at = end + 1;
    }
    return out;
}

std::string in_columns(const std::vector<std::string>& names, int columns) {
    int widest = 0;
    for (auto& name : names) widest = std::max(widest, width_of(name) + 2);
    size_t across = size_t(std::max(1, columns / std::max(widest, 1))), down = (names.size() + across - 1) / across;
    std::string out;
    for (size_t row = 0; row < down; ++row) {
        for (size_t i = row; i < names.size(); i += down) {
            out += names[i];
            if (i + down < names.size()) out += std::string(size_t(widest - width_of(names[i])), ' ');
        }
        out += '\n';
    }
    return out;
}
}  // namespace moe::shell
