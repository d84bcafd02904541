#include "shell/editor.h"

#include "core/base/log.h"
#include "shell/readline.h"
#include "shell/terminal.h"

#include <unistd.h>

#include <cstdlib>
#include <cstring>

namespace moe::shell {
std::unique_ptr<Editor> make_readline_editor(const Readline& readline, lua::Session& session, const History& history, bool colour);

namespace {
/// What is typed at the first line and at those that complete it.
constexpr const char *kPrompt = "moe> ", *kNextPrompt = "...> ";

/// Line after line until they are complete; how a line is read is the child's.
class LineEditor : public Editor {
public:
    explicit LineEditor(lua::Session& session) : session_(session) {}
    std::optional<std::string> read() override {
        std::string input;
        for (;;) {
            std::optional<std::string> line = read_line(input.empty() ? kPrompt : kNextPrompt);
            if (!line) return input.empty() ? std::nullopt : std::optional(input);
            input += *line;
            bool directive = input.starts_with("!") || input.starts_with("?");
            if (directive || session_.is_complete(input)) return input;
            input += '\n';
        }
    }

protected:
    virtual std::optional<std::string> read_line(const char* prompt) = 0;

private:
    lua::Session& session_;
};

class PlainEditor : public LineEditor {
public:
    using LineEditor::LineEditor;

protected:
    std::optional<std::string> read_line(const char* prompt) override {
        log::prompt(prompt, "\r\033[K");
        std::string line;
        int c = 0;
        while ((c = std::getchar()) != EOF && c != '\n') line += char(c);
        bool interrupted = c == EOF && std::ferror(stdin);
        log::prompt(c == EOF ? "\n" : "", "");
        std::clearerr(stdin);
        if (interrupted) return "";
        return c == EOF && line.empty() ? std::nullopt : std::optional(line);
    }
};

class LibeditEditor : public LineEditor {
public:
    LibeditEditor(const LineReader& reader, lua::Session& session, const History& history) : LineEditor(session), reader_(reader) {
        for (auto& entry : history.entries()) keep(entry);
    }

protected:
    std::optional<std::string> read_line(const char* prompt) override {
        char* line = reader_.readline(prompt);
        if (!line) return std::nullopt;
        std::string text = line;
        std::free(line);
        keep(text);
        return text;
    }

private:
    void keep(const std::string& text) {
        if (!text.empty() && text.find('\n') == std::string::npos) reader_.add_history(text.c_str());
    }
    const LineReader& reader_;
};
}  // namespace

std::unique_ptr<Editor> make_editor(lua::Session& session, const History& history, bool colour) {
    const char* asked = std::getenv("MOELAB_EDITOR");
    std::string wanted = asked ? asked : "";
    if (is_interactive_terminal() && wanted != "plain") {
        const Readline* readline = wanted == "libedit" ? nullptr : open_readline();
        if (readline) return make_readline_editor(*readline, session, history, colour);
        if (const LineReader* libedit = open_libedit()) return std::make_unique<LibeditEditor>(*libedit, session, history);
    }
    return std::make_unique<PlainEditor>(session);
}
}  // namespace moe::shell
