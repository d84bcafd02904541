// readline keeps the text, the keys, undo and the search through history; what is drawn is ours: Lua in colours, over several lines,
// below whatever else prints. readline has global variables only, so there is one editor at a time.
#include "core/base/log.h"
#include "shell/editor.h"
#include "shell/readline.h"
#include "shell/screen.h"
#include "shell/terminal.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <clocale>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <langinfo.h>

namespace moe::shell {
namespace {
constexpr int kCtrlC = 3, kCtrlD = 4, kTab = 9, kEscape = 27;
constexpr const char* kPrompt = "moe> ";
constexpr size_t kMostListed = 300;

volatile std::sig_atomic_t given_up = 0, resized = 0, continued = 0;

class ReadlineEditor : public Editor {
public:
    ReadlineEditor(const Readline& r, lua::Session& session, const History& history, bool colour);
    ~ReadlineEditor() override { one = nullptr; }
    std::optional<std::string> read() override;

private:
    static ReadlineEditor* one;

    std::string text() const { return std::string(*r_.line_buffer, size_t(*r_.end)); }
    size_t cursor() const { return size_t(*r_.point); }
    Picture drawn(size_t cursor) const;
    void draw() const;
    void finish(const char* behind) const;
    void replace(size_t begin, size_t end, const std::string& by);
    void bind();
    void bind_in(const char* map, bool command_mode);

    int accept();
    int complete();
    int explain();
    int move_line(int direction, int count, int key);
    void indent_new_line();
    void unindent_closing_word();
    static int next_key(std::FILE*);

    template <int (ReadlineEditor::*F)()>
    static int command(int, int) { return (one->*F)(); }
    int give_up() { return end_ = End::given_up, finish("^C"), *r_.done = 1, 0; }
    int end_or_delete() {
        if (*r_.end > 0) return r_.delete_next(1, kCtrlD);
        return end_ = End::of_input, finish(""), *r_.done = 1, 0;
    }
    int insert_line() { return indent_new_line(), 0; }
    // Of the line that the cursor is in, where readline knows only the whole input.
    size_t line_begin() const { return cursor() == 0 ? 0 : text().rfind('\n', cursor() - 1) + 1; }
    size_t line_end() const { return std::min(text().find('\n', cursor()), size_t(*r_.end)); }
    int go_to_begin() { return *r_.point = int(line_begin()), 0; }
    int go_to_end() { return *r_.point = int(line_end()), 0; }
    int kill_to_begin() { return kill(line_begin(), cursor()); }
    int kill_to_end() { return kill(cursor(), line_end() == cursor() ? std::min(line_end() + 1, size_t(*r_.end)) : line_end()); }
    int kill(size_t begin, size_t end) {
        r_.kill_text(int(begin), int(end));
        return *r_.point = int(begin), 0;
    }
    static int up(int count, int key) { return one->move_line(-1, count, key); }
    static int down(int count, int key) { return one->move_line(1, count, key); }

    enum class End { accepted, given_up, of_input };
    const Readline& r_;
    lua::Session& session_;
    const History& history_;
    bool colour_;
    End end_ = End::accepted;
};
ReadlineEditor* ReadlineEditor::one = nullptr;

bool is_directive(std::string_view text) {
    size_t start = text.find_first_not_of(" \t");
    return start != std::string_view::npos && (text[start] == '!' || text[start] == '?');
}

std::string_view trimmed(std::string_view text) {
    size_t begin = text.find_first_not_of(" \t");
    if (begin == std::string_view::npos) return {};
    return text.substr(begin, text.find_last_not_of(" \t\r") - begin + 1);
}

bool ends_with_word(std::string_view line, std::string_view word) {
    if (!line.ends_with(word)) return false;
    return line.size() == word.size() || !std::isalnum(static_cast<unsigned char>(line[line.size() - word.size() - 1]));
}

/// The line starts a block, so that the next one is indented.
bool opens_block(std::string_view line) {
    line = trimmed(line);
    for (const char* word : {"then", "do", "else", "repeat"})
        if (ends_with_word(line, word)) return true;
    if (line.ends_with('{') || line.ends_with('(')) return true;
    return line.ends_with(')') && line.find("function") != std::string_view::npos && line.find("end", line.rfind("function")) == std::string_view::npos;
}

ReadlineEditor::ReadlineEditor(const Readline& r, lua::Session& session, const History& history, bool colour) : r_(r), session_(session), history_(history), colour_(colour) {
    one = this;
    // readline counts characters by the locale; without one every byte would be a character.
    std::setlocale(LC_CTYPE, "");
    if (std::strcmp(nl_langinfo(CODESET), "UTF-8") != 0) std::setlocale(LC_CTYPE, "C.UTF-8");
    *r_.readline_name = "moelab";
    *r_.catch_signals = 0;
    *r_.catch_sigwinch = 0;
    r_.variable_bind("enable-bracketed-paste", "on");
    r_.initialize();
    *r_.redisplay_function = [] { one->draw(); };
    *r_.getc_function = next_key;
    bind();
    r_.using_history();
    for (auto& entry : history_.entries()) r_.add_history(entry.c_str());
    struct sigaction action = {};
    action.sa_handler = [](int signal) { (signal == SIGWINCH ? resized : continued) = 1; };
    sigaction(SIGWINCH, &action, nullptr);
    sigaction(SIGCONT, &action, nullptr);
}

void ReadlineEditor::bind() {
    bind_in("emacs", false);
    bind_in("vi-insert", false);
    bind_in("vi-command", true);
}

void ReadlineEditor::bind_in(const char* name, bool command_mode) {
    void* map = r_.get_keymap_by_name(name);
    if (!map) return;
    r_.bind_key_in_map('\r', command<&ReadlineEditor::accept>, map);
    r_.bind_key_in_map('\n', command<&ReadlineEditor::accept>, map);
    r_.bind_key_in_map(kCtrlC, command<&ReadlineEditor::give_up>, map);
    r_.bind_key_in_map(kCtrlD, command<&ReadlineEditor::end_or_delete>, map);
    for (const char* keys : {"\033[A", "\033OA"}) r_.bind_keyseq_in_map(keys, up, map);
    for (const char* keys : {"\033[B", "\033OB"}) r_.bind_keyseq_in_map(keys, down, map);
    for (const char* keys : {"\001", "\033[H", "\033OH", "\033[1~"}) r_.bind_keyseq_in_map(keys, command<&ReadlineEditor::go_to_begin>, map);
    for (const char* keys : {"\005", "\033[F", "\033OF", "\033[4~"}) r_.bind_keyseq_in_map(keys, command<&ReadlineEditor::go_to_end>, map);
    if (command_mode) return;
    r_.bind_keyseq_in_map("\013", command<&ReadlineEditor::kill_to_end>, map);
    r_.bind_keyseq_in_map("\025", command<&ReadlineEditor::kill_to_begin>, map);
    r_.bind_key_in_map(kTab, command<&ReadlineEditor::complete>, map);
    for (const char* keys : {"\033\r", "\033\n"}) r_.bind_keyseq_in_map(keys, command<&ReadlineEditor::insert_line>, map);
    for (const char* keys : {"\033[Z", "\033OP", "\033[11~"}) r_.bind_keyseq_in_map(keys, command<&ReadlineEditor::explain>, map);
}

std::optional<std::string> ReadlineEditor::read() {
    end_ = End::accepted;
    given_up = 0;
    if (auto& all = history_.entries(); !all.empty()) {
        // An input that came before moved to the end: readline's list is made anew, which takes a millisecond.
        r_.clear_history();
        for (auto& entry : all) r_.add_history(entry.c_str());
    }
    char* line = r_.readline(kPrompt);
    if (!line && end_ == End::accepted) {       // the terminal went away
        finish("");
        return std::nullopt;
    }
    std::string input = line ? line : "";
    std::free(line);
    if (end_ == End::of_input) return std::nullopt;
    return end_ == End::given_up ? "" : input;
}

Picture ReadlineEditor::drawn(size_t cursor) const {
    TerminalSize size = terminal_size();
    std::string code = text();
    PromptText prompt{*r_.display_prompt ? *r_.display_prompt : kPrompt, "...> ", colour_ ? "1;32" : ""};
    return picture(prompt, code, colour_ ? lua_colours(code) : std::vector<Span>(), cursor, size.rows, size.columns);
}

void ReadlineEditor::draw() const {
    if (*r_.done) return;           // finish() has drawn it for the last time
    Picture p = drawn(cursor());
    log::prompt(p.draw, p.erase);
}

/// The input stays as it is, and the cursor goes to the line below.
void ReadlineEditor::finish(const char* behind) const {
    log::prompt(drawn(size_t(*r_.end)).draw + behind + "\r\n", "");
}

void ReadlineEditor::replace(size_t begin, size_t end, const std::string& by) {
    r_.begin_undo_group();
    r_.delete_text(int(begin), int(end));
    *r_.point = int(begin);
    r_.insert_text(by.c_str());
    r_.end_undo_group();
}

/// Spaces like those of the current line, two more after the start of a block.
void ReadlineEditor::indent_new_line() {
    std::string code = text().substr(0, cursor());
    size_t begin = code.rfind('\n') + 1;
    std::string line = code.substr(begin);
    size_t indent = std::min(line.find_first_not_of(' '), line.size());
    r_.insert_text(("\n" + std::string(indent + (opens_block(line) ? 2 : 0), ' ')).c_str());
}

/// "end", "else", "}" that were typed at the depth of their block go back by two.
void ReadlineEditor::unindent_closing_word() {
    std::string code = text();
    size_t begin = code.rfind('\n', cursor() ? cursor() - 1 : 0) + 1;
    if (begin == 0 || cursor() < begin) return;
    std::string_view before = std::string_view(code).substr(0, begin - 1), line = std::string_view(code).substr(begin, cursor() - begin);
    std::string_view previous = before.substr(before.rfind('\n') + 1), word = trimmed(line);
    bool closes = word.starts_with("}") || word.starts_with(")");
    for (std::string_view w : {"end", "else", "elseif", "until"}) {
        closes = closes || (word.starts_with(w) && (word.size() == w.size() || !std::isalnum(static_cast<unsigned char>(word[w.size()]))));
    }
    size_t indent = line.find_first_not_of(' '), above = std::min(previous.find_first_not_of(' '), previous.size());
    if (!closes || indent == std::string::npos || indent < 2 || indent != above + (opens_block(previous) ? 2 : 0)) return;
    size_t at = cursor();
    r_.delete_text(int(begin), int(begin) + 2);
    *r_.point = int(at) - 2;
}

int ReadlineEditor::accept() {
    if (cursor() == size_t(*r_.end)) unindent_closing_word();
    std::string code = text();
    bool inside = code.find('\n', cursor()) != std::string::npos;       // not in the last line: a line is wanted there
    if (!is_directive(code) && (inside || !session_.is_complete(code))) return indent_new_line(), 0;
    finish("");
    *r_.done = 1;
    return 0;
}

int ReadlineEditor::complete() {
    std::string code = text();
    size_t at = cursor(), begin = code.rfind('\n', at ? at - 1 : 0) + 1;
    if (at < begin) begin = at;
    if (trimmed(std::string_view(code).substr(begin, at - begin)).empty() && begin > 0) return r_.insert_text("  "), 0;
    size_t skipped = 0;
    std::string lua_part = code;
    if (is_directive(code)) {
        skipped = std::min(code.find_first_not_of(" \t!?"), code.size());
        lua_part = code.substr(skipped);
        if (code[code.find_first_not_of(" \t")] == '!') {               // a shell command: paths, as in a text
            skipped = std::max(skipped, std::min(code.rfind(' ', at ? at - 1 : 0) + 1, at)) - 1;
            lua_part = '"' + code.substr(skipped + 1);
        }
        if (at < skipped) return 0;
    }
    lua::Completion c = session_.complete(lua_part, at - skipped);
    if (!c.note.empty()) log::print((colour_ ? "\033[2m" : "") + wrapped(c.note, terminal_size().columns) + (colour_ ? "\033[0m\n" : "\n"));
    if (c.matches.empty()) return 0;
    std::string common = c.matches[0];
    for (auto& match : c.matches) common.resize(size_t(std::mismatch(common.begin(), common.end(), match.begin(), match.end()).first - common.begin()));
    while (!common.empty() && common.size() < c.matches[0].size() && (static_cast<unsigned char>(c.matches[0][common.size()]) & 0xc0) == 0x80) common.pop_back();
    if (common.size() > c.end - c.begin) return replace(c.begin + skipped, c.end + skipped, common), 0;
    if (c.matches.size() == 1) return 0;
    // In a path the folder is known.
    size_t slash = common.rfind('/');
    std::vector<std::string> names;
    for (auto& match : c.matches) {
        if (names.size() == kMostListed) break;
        names.push_back(slash == std::string::npos ? match : match.substr(slash + 1));
    }
    std::string list = in_columns(names, terminal_size().columns);
    if (names.size() < c.matches.size()) list += "… " + std::to_string(c.matches.size() - names.size()) + " more\n";
    log::print(list);
    return 0;
}

int ReadlineEditor::explain() {
    lua::Inspection found = session_.inspect(text(), cursor(), false);
    if (!found.found()) return 0;
    std::string shown = wrapped(std::string_view(found.text).substr(0, 2000), terminal_size().columns);
    log::print((colour_ ? "\033[2m" + shown + "\033[0m" : shown) + "\n");
    return 0;
}

int ReadlineEditor::move_line(int direction, int count, int key) {
    std::string code = text();
    size_t at = cursor(), begin = at == 0 ? 0 : code.rfind('\n', at - 1) + 1, end = std::min(code.find('\n', at), code.size()), column = at - begin;
    if (direction < 0 && begin > 0) {
        size_t above = begin >= 2 ? code.rfind('\n', begin - 2) + 1 : 0;
        *r_.point = int(std::min(above + column, begin - 1));
    } else if (direction > 0 && end < code.size()) {
        *r_.point = int(std::min(end + 1 + column, std::min(code.find('\n', end + 1), code.size())));
    } else {
        return direction < 0 ? r_.get_previous_history(count, key) : r_.get_next_history(count, key);
    }
    while (cursor() < code.size() && cursor() > 0 && (static_cast<unsigned char>(code[cursor()]) & 0xc0) == 0x80) --*r_.point;
    return 0;
}

/// Waits for a key, redraws after a change of the window, and gives Ctrl-C for an interrupt. Signals are let in only while it waits.
int ReadlineEditor::next_key(std::FILE*) {
    sigset_t some, before;
    sigemptyset(&some);
    for (int signal : {SIGINT, SIGWINCH, SIGCONT}) sigaddset(&some, signal);
    for (;;) {
        pthread_sigmask(SIG_BLOCK, &some, &before);
        if (continued) one->r_.prep_terminal(1);
        if (continued || resized) one->draw();
        continued = 0;
        resized = 0;
        pollfd input{STDIN_FILENO, POLLIN, 0};
        int ready = given_up ? -1 : ppoll(&input, 1, nullptr, &before);
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        if (given_up) {
            given_up = 0;
            return kCtrlC;
        }
        if (ready < 0 && errno != EINTR) return EOF;
        if (ready <= 0) continue;
        unsigned char key = 0;
        ssize_t n = ::read(STDIN_FILENO, &key, 1);
        if (n == 1) return key;
        if (n == 0 || errno != EINTR) return EOF;
    }
}
}  // namespace

std::unique_ptr<Editor> make_readline_editor(const Readline& readline, lua::Session& session, const History& history, bool colour) {
    return std::make_unique<ReadlineEditor>(readline, session, history, colour);
}

void give_up_input() noexcept { given_up = 1; }
}  // namespace moe::shell
