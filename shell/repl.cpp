#include "shell/repl.h"

#include "core/base/json.h"
#include "core/base/log.h"
#include "core/base/stop.h"
#include "core/base/units.h"
#include "core/base/version.h"
#include "lua/session/lexer.h"
#include "shell/editor.h"
#include "shell/history.h"
#include "shell/pager.h"
#include "shell/screen.h"
#include "shell/terminal.h"

#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <iostream>

namespace moe::shell {
namespace {
constexpr double kSlowSecs = 1;                 // inputs from here on show their time
constexpr int kAcknowledgeMicros = 40000, kInterruptsToEnd = 3;

// --- signals ---

std::atomic<lua::Session*> evaluating = nullptr;
std::atomic<int> num_interrupts = 0;

void say(const char* text) {
    size_t length = 0;
    while (text[length]) ++length;
    if (write(STDERR_FILENO, text, length) < 0) return;
}

/// What runs is told at once; what does not end in 40 ms, such as a long C++ call, is answered by a line.
void on_interrupt(int) {
    lua::Session* session = evaluating;
    if (!session) return give_up_input();
    int n = ++num_interrupts;
    if (n >= kInterruptsToEnd) {
        restore_terminal();
        say("\nmoelab: ended\n");
        _exit(130);
    }
    session->interrupt();
    itimerval timer{{0, 0}, {0, kAcknowledgeMicros}};
    setitimer(ITIMER_REAL, &timer, nullptr);
}

void on_late(int) {
    if (!evaluating) return;
    say(num_interrupts < 2 ? "\ninterrupted: waiting for what runs to come to a point where it can stop\n" : "\nstill waiting; one more Ctrl-C ends moelab\n");
}

/// Training saves and stops; where nothing trains the program ends.
void on_stop(int signal) {
    if (StopListener::any() && !stop_requested()) return request_stop();
    restore_terminal();
    _exit(128 + signal);
}

void handle(int signal, void (*handler)(int)) {
    struct sigaction action = {};
    action.sa_handler = handler;
    sigaction(signal, &action, nullptr);        // without SA_RESTART: a read that waits comes back
}

// --- inputs ---

double paging_secs = 0;                         // of the current input: a person reading is no time that it took

std::string_view trimmed(std::string_view text) {
    size_t begin = text.find_first_not_of(" \t\n");
    return begin == std::string_view::npos ? std::string_view() : text.substr(begin, text.find_last_not_of(" \t\n") - begin + 1);
}

bool ends_silently(const std::string& code) {
    std::string_view last;
    for (auto& t : lua::tokens(code))
        if (t.kind != lua::TokenKind::comment) last = std::string_view(code).substr(t.begin, t.end - t.begin);
    return last == ";";
}

std::string coloured(std::string_view code) {
    std::string out;
    size_t at = 0;
    for (auto& span : lua_colours(code)) {
        out.append(code.substr(at, span.begin - at)).append("\033[").append(span.colour).append("m").append(code.substr(span.begin, span.end - span.begin)).append("\033[0m");
        at = span.end;
    }
    return out.append(code.substr(at));
}

class Prompt {
public:
    explicit Prompt(lua::Session& session) : session_(session), history_(History::default_path()), colour_(takes_colour()) {}

    int run() {
        greet();
        run_startup_file();
        std::unique_ptr<Editor> editor = make_editor(session_, history_, colour_);
        if (!history_.problem().empty()) log::warn("inputs are not kept: " + history_.problem());
        while (!session_.exit_code()) {
            std::optional<std::string> input = editor->read();
            if (!input) break;
            if (trimmed(*input).empty()) continue;
            std::string problem = history_.problem();
            history_.add(*input);
            if (history_.problem() != problem) log::warn("inputs are not kept from here on: " + history_.problem());
            if (session_.ends(std::string(trimmed(*input)))) break;
            answer(*input);
        }
        return session_.exit_code().value_or(0);
    }

private:
    std::string dim(const std::string& text) const { return colour_ ? "\033[2m" + text + "\033[0m" : text; }
    std::string bold(const std::string& text) const { return colour_ ? "\033[1m" + text + "\033[0m" : text; }

    void greet() const {
        log::print(fmt::format("{} {}\n", bold(fmt::format("moelab {}", kVersion)), dim(fmt::format("(commit {}, LibTorch {})", kCommit, kTorchVersion))));
        log::print(dim("help(moe) lists, ?name explains, ??word searches, TAB completes, Ctrl-D ends") + "\n");
    }

    /// Its errors are shown, and the prompt comes all the same.
    void run_startup_file() {
        const char *named = std::getenv("MOELAB_INIT"), *config = std::getenv("XDG_CONFIG_HOME"), *home = std::getenv("HOME");
        std::string path = named ? named : (config && *config ? std::string(config) : home ? std::string(home) + "/.config" : "") + "/moelab/init.lua";
        if (path.empty() || (!named && !std::filesystem::exists(path))) return;
        std::string text;
        try {
            text = read_text(path);
        } catch (const Error& e) {
            return log::print(lua::describe(e.parts(), colour_) + "\n");
        }
        show(evaluate(text, path), /*silent=*/true);
    }

    lua::Result evaluate(const std::string& code, const std::string& name) {
        num_interrupts = 0;
        paging_secs = 0;
        evaluating = &session_;
        lua::Result result = session_.eval(code, name);
        evaluating = nullptr;
        result.secs -= paging_secs;
        itimerval off{};
        setitimer(ITIMER_REAL, &off, nullptr);
        clear_stop();
        log::status("");                // an error in the middle of training leaves it
        std::fflush(stdout);
        return result;
    }

    void show(const lua::Result& result, bool silent) {
        if (session_.exit_code()) return;
        if (result.error) {
            bool interrupted = result.error->kind == ErrorKind::interrupted;
            // The terminal has echoed ^C.
            if (interrupted) log::print(colour_ ? "\n\033[33minterrupted\033[0m\n" : "\ninterrupted\n");
            else log::print(lua::describe(*result.error, colour_) + "\n");
        } else if (!silent) {
            std::string text;
            bool lines = false;
            for (auto& value : result.values) lines |= value.find('\n') != std::string::npos;
            for (auto& value : result.values) text += (text.empty() ? "" : lines ? "\n" : "\t") + value;
            if (!result.values.empty()) page((colour_ && result.values.size() == 1 && text.starts_with("{") ? coloured(text) : text) + "\n");
        }
        if (result.secs >= kSlowSecs) log::print(dim(fmt::format("{}, peak memory {}", format_secs(result.secs), format_bytes(double(result.peak_bytes)))) + "\n");
    }

    void answer(const std::string& input) {
        std::string_view text = trimmed(input);
        if (text.starts_with("!")) return run_command(std::string(text.substr(1)));
        if (text.starts_with("?")) {
            bool source = text.starts_with("??");
            return explain(std::string(trimmed(text.substr(source ? 2 : 1))), source);
        }
        if (text.ends_with("?") && session_.is_complete("return " + std::string(text.substr(0, text.find('?'))))) {
            return explain(std::string(trimmed(text.substr(0, text.find('?')))), text.ends_with("??"));
        }
        show(evaluate(input, fmt::format("input {}", session_.history().size() + 1)), ends_silently(input));
    }

    void explain(const std::string& name, bool source) {
        if (name.empty()) return explain("moe", source);
        lua::Inspection found = session_.inspect(name, name.size(), source);
        if (!found.found()) {
            ErrorParts error = {ErrorKind::usage, (source ? "??" : "?") + name, source ? "nothing of that name, or with these words" : "nothing of that name", "a name, as in ?moe.run or ?cfg.model.moe",
                                (source ? "" : "??" + name + " searches names and texts; ") + std::string("help(moe) lists what there is"), "", -1, ""};
            return log::print(lua::describe(error, colour_) + "\n");
        }
        std::string text = source && !found.source.empty() ? (colour_ ? coloured(found.source) : found.source) : wrapped(found.text, terminal_size().columns);
        page(text + (text.ends_with("\n") ? "" : "\n"));
    }

    void run_command(const std::string& command) {
        std::fflush(stdout);
        int status = std::system(command.c_str());
        int code = WIFEXITED(status) ? WEXITSTATUS(status) : WIFSIGNALED(status) ? 128 + WTERMSIG(status) : status;
        if (code != 0) log::print(dim(fmt::format("exit code {}", code)) + "\n");
    }

    lua::Session& session_;
    History history_;
    bool colour_;
};
}  // namespace

void page_help(std::string_view text) {
    auto start = std::chrono::steady_clock::now();
    page(wrapped(text, terminal_size().columns));
    paging_secs += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

int run_prompt(lua::Session& session) {
    keep_terminal();
    handle(SIGINT, on_interrupt);
    handle(SIGALRM, on_late);
    for (int signal : {SIGTERM, SIGUSR1, SIGHUP}) handle(signal, on_stop);
    return Prompt(session).run();
}

int run_follower(lua::Session& session) {
    handle(SIGINT, [](int) {
        if (lua::Session* running = evaluating) running->interrupt();
    });
    handle(SIGTERM, on_stop);
    handle(SIGUSR1, on_stop);
    return session.follow([&](bool begins) {
        evaluating = begins ? &session : nullptr;
        if (!begins) clear_stop();
    });
}

int run_piped(lua::Session& session, bool json) {
    num_interrupts = 0;
    handle(SIGINT, on_interrupt);
    handle(SIGTERM, on_stop);
    handle(SIGUSR1, on_stop);
    int code = 0;
    std::string input, line;
    size_t first_line = 1, line_number = 0;
    auto run = [&] {
        if (trimmed(input).empty()) return true;
        evaluating = &session;
        // Empty lines in front, so that errors count lines from the start of the stream.
        lua::Result result = session.eval(std::string(first_line - 1, '\n') + input, "stdin");
        evaluating = nullptr;
        std::string text;
        for (auto& value : result.values) text += (text.empty() ? "" : "\t") + value;
        if (result.error) {
            std::fflush(stdout);
            if (!session.exit_code()) {
                if (json) log::print(lua::to_json(*result.error) + "\n");
                else fmt::print(stderr, "{}\n", lua::describe(*result.error, false));
            }
            if (code == 0) code = result.exit_code();
        } else if (!result.values.empty() && !ends_silently(input)) {
            log::print(text + "\n");
        }
        return !session.exit_code() && !(result.error && result.error->kind == ErrorKind::interrupted);
    };
    bool go_on = true;
    while (go_on && std::getline(std::cin, line)) {
        ++line_number;
        if (input.empty()) first_line = line_number;
        if (line_number == 1 && line.starts_with("#")) line.clear();
        input += line + "\n";
        if (!session.is_complete(input)) continue;
        go_on = run();
        input.clear();
    }
    if (go_on) run();
    std::fflush(stdout);
    return session.exit_code().value_or(code);
}
}  // namespace moe::shell
