#include "shell/screen.h"
#include "tests/catch.h"

#include <algorithm>
#include <clocale>

using namespace moe::shell;

namespace {
/// Draws on a screen of its own: the rows without colours, and the cursor.
struct Screen {
    std::vector<std::string> rows{1};
    size_t row = 0, column = 0;
    void put(std::string_view text) {
        for (size_t i = 0; i < text.size(); ++i) {
            if (text[i] == '\r') {
                column = 0;
            } else if (text[i] == '\n') {
                if (++row == rows.size()) rows.emplace_back();
            } else if (text[i] == '\033') {
                size_t end = i + 2;
                while (text[end] < '@') ++end;
                size_t n = size_t(std::max(1, std::atoi(std::string(text.substr(i + 2, end - i - 2)).c_str())));
                if (text[end] == 'A') row -= std::min(row, n);
                if (text[end] == 'C') column += n;
                if (text[end] == 'J') rows.resize(row + 1), rows[row].resize(column);
                i = end;
            } else {
                rows[row].resize(std::max(rows[row].size(), column + 1), ' ');
                rows[row][column++] = text[i];
            }
        }
    }
};
const PromptText kPrompt = {"> ", "- ", "1"};
Screen drawn(std::string_view text, size_t cursor, int rows = 10, int columns = 20) {
    Screen s;
    s.put(picture(kPrompt, text, lua_colours(text), cursor, rows, columns).draw);
    return s;
}
}  // namespace

TEST_CASE("screen: prompt, lines and the cursor are at their places", "[shell]") {
    Screen s = drawn("if x then\n  y()\nend", 12);
    CHECK(s.rows == std::vector<std::string>{"> if x then", "-   y()", "- end"});
    CHECK(s.row == 1);
    CHECK(s.column == 4);
    s = drawn("", 0);
    CHECK(s.column == 2);
    s = drawn("a\x01" "b", 3);
    CHECK(s.rows[0] == "> a^Ab");
}

TEST_CASE("screen: long lines wrap, and the cursor behind a full one is on the next", "[shell]") {
    Screen s = drawn(std::string(30, 'a'), 30, 10, 20);
    CHECK(s.rows == std::vector<std::string>{"> " + std::string(18, 'a'), std::string(12, 'a')});
    CHECK(s.column == 12);
    s = drawn(std::string(18, 'a'), 18, 10, 20);
    CHECK(s.rows.size() == 2);
    CHECK(s.row == 1);
    CHECK(s.column == 0);
}

TEST_CASE("screen: erasing leaves nothing, wherever the cursor was", "[shell]") {
    std::string text = "first\nsecond " + std::string(40, 'x') + "\nthird";
    for (size_t cursor = 0; cursor <= text.size(); cursor += 3) {
        Picture p = picture(kPrompt, text, {}, cursor, 10, 20);
        Screen s;
        s.put("before\r\n");
        s.put(p.draw);
        s.put(p.erase);
        CHECK(s.rows == std::vector<std::string>{"before", ""});
    }
}

TEST_CASE("screen: of an input higher than the screen the lines around the cursor are shown", "[shell]") {
    std::string text;
    for (int i = 0; i < 30; ++i) text += (i ? "\n" : "") + std::to_string(i);
    for (size_t cursor : {size_t(0), text.size() / 2, text.size()}) {
        Screen s = drawn(text, cursor, 5);
        CHECK(s.rows.size() == 5);
        size_t line = size_t(std::count(text.begin(), text.begin() + long(cursor), '\n'));
        CHECK(s.rows[s.row].substr(2) == std::to_string(line));
    }
}

TEST_CASE("screen: long lines of a text break at spaces, and no word does", "[shell]") {
    CHECK(wrapped("one two three\nfour", 8) == "one two\n  three\nfour");
    CHECK(wrapped("one two", 7) == "one two");
    CHECK(wrapped("  list: a b c d", 10) == "  list: a\n    b c d");
    CHECK(wrapped("averylongword b", 5) == "averylongword\n  b");
    CHECK(wrapped("a  b", 80) == "a  b");
    CHECK(wrapped("äöü äöü", 7) == "äöü äöü");
    CHECK(wrapped("\n\nx\n", 80) == "\n\nx\n");
    CHECK(wrapped("", 80).empty());
}

TEST_CASE("screen: widths of characters, columns of names", "[shell]") {
    std::setlocale(LC_CTYPE, "C.UTF-8");
    CHECK(width_of("aé日\033[31mb") == 5);
    CHECK(width_of("\xff") == 1);
    CHECK(in_columns({"a", "bb", "c", "d", "e"}, 9) == "a   d\nbb  e\nc\n");
    CHECK(in_columns({}, 80).empty());
    Screen s;
    s.put(picture(kPrompt, "é日x", {}, 5, 10, 20).draw);
    CHECK(s.column == 2 + 1 + 2);
}
