#include "core/base/log.h"

#include "core/base/error.h"

#include <unistd.h>

#include <cstdio>
#include <ctime>
#include <mutex>

// A logging library would bring seconds to every build for what is a page here; the README says so.
namespace moe::log {
namespace {
enum Level { kDebug, kInfo, kWarn, kError };
struct State {
    std::mutex mutex;
    std::FILE* file = nullptr;
    std::string path;
    Level level = kInfo;
    std::string status;
    std::string prompt, erase_prompt, waiting;      ///< waiting: output that does not end its line, while there is a prompt
    ~State() { if (file) std::fclose(file); }
};
State& state() {
    static State s;
    return s;
}

void put(const std::string& text) { std::fwrite(text.data(), 1, text.size(), stdout); }

// The status line, or the prompt, is taken away before other text and drawn again after a whole line. With the mutex held.
bool has_status(const State& s) { return !s.status.empty() || !s.prompt.empty(); }
void hide_status(const State& s) {
    if (!s.prompt.empty()) put(s.erase_prompt);
    else if (!s.status.empty()) std::fputs("\r\033[K", stdout);
}
void draw_status(const State& s) {
    put(s.prompt.empty() ? s.status : s.prompt);
    std::fflush(stdout);
}

/// With the mutex held.
void append(State& s, std::string_view tag, std::string_view message) {
    if (!s.file) return;
    std::time_t now = std::time(nullptr);
    std::tm utc{};
    gmtime_r(&now, &utc);
    char stamp[32];
    std::strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ", &utc);
    std::fprintf(s.file, "%s %.*s%.*s\n", stamp, int(tag.size()), tag.data(), int(message.size()), message.data());
    std::fflush(s.file);
}

void write(Level level, std::string_view message) {
    State& s = state();
    std::lock_guard lock(s.mutex);
    if (level < s.level) return;
    static const bool colour = isatty(STDERR_FILENO) && !std::getenv("NO_COLOR");
    const char* tag[] = {"debug: ", "", "warning: ", "error: "};
    const char* paint[] = {"\033[2m", "", "\033[33m", "\033[31m"};
    hide_status(s);
    if (has_status(s)) std::fflush(stdout);
    std::fprintf(stderr, "%s%s%.*s%s\n", colour ? paint[level] : "", tag[level], int(message.size()), message.data(), colour && *paint[level] ? "\033[0m" : "");
    if (has_status(s)) draw_status(s);
    append(s, tag[level], message);
}
}  // namespace

void set_file(const std::string& path) {
    State& s = state();
    std::lock_guard lock(s.mutex);
    if (s.file) std::fclose(s.file);
    s.file = nullptr;
    s.path = path;
    if (path.empty()) return;
    s.file = std::fopen(path.c_str(), "a");
    MOE_CHECK(s.file, io, "log file", path, "a file that can be written", "check the folder's permissions and the free space");
}

void close_file(const std::string& path) {
    {
        State& s = state();
        std::lock_guard lock(s.mutex);
        if (s.path != path) return;
    }
    set_file("");
}

void to_file(std::string_view line) {
    State& s = state();
    std::lock_guard lock(s.mutex);
    append(s, "", line);
}

void print(std::string_view text) {
    State& s = state();
    std::lock_guard lock(s.mutex);
    if (!s.prompt.empty()) {
        s.waiting += text;
        size_t end = s.waiting.rfind('\n');
        if (end == std::string::npos) return;
        hide_status(s);
        put(s.waiting.substr(0, end + 1));
        s.waiting.erase(0, end + 1);
        return draw_status(s);
    }
    hide_status(s);
    std::fwrite(text.data(), 1, text.size(), stdout);
    if (text.ends_with('\n') && has_status(s)) draw_status(s);
}

void prompt(std::string draw, std::string erase) {
    State& s = state();
    std::lock_guard lock(s.mutex);
    if (!s.prompt.empty()) put(s.erase_prompt);
    else if (!draw.empty()) hide_status(s);
    put(draw);
    s.prompt = erase.empty() ? "" : std::move(draw);
    s.erase_prompt = std::move(erase);
    if (s.prompt.empty()) {
        put(s.waiting);
        s.waiting.clear();
    }
    std::fflush(stdout);
}

void status(std::string_view line) {
    static const bool terminal = isatty(STDOUT_FILENO);
    if (!terminal) return;
    State& s = state();
    std::lock_guard lock(s.mutex);
    if (s.prompt.empty()) hide_status(s);
    s.status = line;
    if (s.prompt.empty()) draw_status(s);
}

void set_level(std::string_view level) {
    State& s = state();
    std::lock_guard lock(s.mutex);
    if (level == "debug") s.level = kDebug;
    else if (level == "info") s.level = kInfo;
    else if (level == "warn") s.level = kWarn;
    else if (level == "error") s.level = kError;
    else MOE_THROW(usage, "log level", std::string(level), "debug, info, warn or error", "");
}

void debug(std::string_view message) { write(kDebug, message); }
void info(std::string_view message) { write(kInfo, message); }
void warn(std::string_view message) { write(kWarn, message); }
void error(std::string_view message) { write(kError, message); }
}  // namespace moe::log
