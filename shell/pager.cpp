#include "shell/pager.h"

#include "core/base/log.h"
#include "shell/screen.h"
#include "shell/terminal.h"

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace moe::shell {
namespace {
constexpr int kNoSuchCommand = 127;

std::vector<std::string_view> lines_of(std::string_view text) {
    std::vector<std::string_view> lines;
    for (size_t at = 0; at < text.size();) {
        size_t end = std::min(text.find('\n', at), text.size());
        lines.push_back(text.substr(at, end - at));
        at = end + 1;
    }
    return lines;
}

int rows_of(std::string_view line, int columns) { return std::max(1, (width_of(line) + columns - 1) / columns); }

/// False where the command does not exist.
bool page_through(const std::string& command, std::string_view text) {
    std::fflush(stdout);
    // The pager may end before it has read all, and Ctrl-C is for it.
    struct sigaction ignore = {}, pipe_before, interrupt_before;
    ignore.sa_handler = SIG_IGN;
    sigaction(SIGPIPE, &ignore, &pipe_before);
    sigaction(SIGINT, &ignore, &interrupt_before);
    std::FILE* pager = popen(command.c_str(), "w");
    int status = kNoSuchCommand << 8;
    if (pager) {
        std::fwrite(text.data(), 1, text.size(), pager);
        status = pclose(pager);
    }
    sigaction(SIGPIPE, &pipe_before, nullptr);
    sigaction(SIGINT, &interrupt_before, nullptr);
    return !(WIFEXITED(status) && WEXITSTATUS(status) == kNoSuchCommand);
}

void page_here(const std::vector<std::string_view>& lines) {
    TerminalSize size = terminal_size();
    int room = size.rows - 1, used = 0;
    for (auto& line : lines) {
        int rows = rows_of(line, size.columns);
        if (used > 0 && used + rows > room) {
            std::fputs("\033[7m-- more: space, return: a line, q: no more --\033[0m", stdout);
            std::fflush(stdout);
            char key = read_key();
            std::fputs("\r\033[K", stdout);
            if (key == 'q' || key == 0 || key == 3 || key == 4) break;
            used = key == '\n' || key == '\r' ? room - rows : 0;
        }
        std::fwrite(line.data(), 1, line.size(), stdout);
        std::fputc('\n', stdout);
        used += rows;
    }
    std::fflush(stdout);
}
}  // namespace

void page(std::string_view text) {
    TerminalSize size = terminal_size();
    std::vector<std::string_view> lines = lines_of(text);
    int rows = 0;
    for (auto& line : lines) {
        rows += rows_of(line, size.columns);
        if (rows > size.rows) break;
    }
    const char* pager = std::getenv("PAGER");
    if (rows < size.rows || !is_interactive_terminal() || (pager && std::string_view(pager) == "cat")) return log::print(text);
    if (pager && *pager && page_through(std::string(pager) + " 2> /dev/null", text)) return;
    if (!(pager && *pager) && page_through("less -R 2> /dev/null", text)) return;
    page_here(lines);
}
}  // namespace moe::shell
