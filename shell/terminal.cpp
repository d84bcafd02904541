#include "shell/terminal.h"

#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include <cstdlib>
#include <string_view>

namespace moe::shell {
namespace {
termios kept_settings;
bool is_kept = false;

bool is_dumb() {
    const char* term = std::getenv("TERM");
    return !term || !*term || std::string_view(term) == "dumb";
}
}  // namespace

TerminalSize terminal_size() {
    winsize size{};
    if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_row == 0 || size.ws_col == 0) return {};
    return {size.ws_row, size.ws_col};
}

bool is_interactive_terminal() { return isatty(STDIN_FILENO) && isatty(STDOUT_FILENO) && !is_dumb(); }

bool takes_colour() {
    const char* no = std::getenv("NO_COLOR");
    return isatty(STDOUT_FILENO) && !(no && *no) && !is_dumb();
}

char read_key() {
    termios before{}, raw{};
    bool changed = tcgetattr(STDIN_FILENO, &before) == 0;
    raw = before;
    raw.c_lflag &= ~tcflag_t(ICANON | ECHO);
    if (changed) tcsetattr(STDIN_FILENO, TCSADRAIN, &raw);
    char key = 0;
    if (read(STDIN_FILENO, &key, 1) != 1) key = 0;
    if (changed) tcsetattr(STDIN_FILENO, TCSADRAIN, &before);
    return key;
}

void keep_terminal() { is_kept = tcgetattr(STDIN_FILENO, &kept_settings) == 0; }

void restore_terminal() noexcept {
    if (is_kept) tcsetattr(STDIN_FILENO, TCSANOW, &kept_settings);
}
}  // namespace moe::shell
