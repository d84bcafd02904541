// What the terminal is: its size, whether it takes colours; single keys.
#pragma once
#include <string>

namespace moe::shell {

struct TerminalSize {
    int rows = 24, columns = 80;
};
/// Of standard output; the default where it is no terminal.
TerminalSize terminal_size();
/// Standard input and output are terminals that take escape sequences.
bool is_interactive_terminal();
/// A terminal on standard output, no NO_COLOR, TERM not dumb.
bool takes_colour();
/// Waits for one key without its echo; 0 at the end of input or an interrupt.
char read_key();
/// Keeps the terminal's settings now; restore_terminal() puts them back, also from a signal handler.
void keep_terminal();
void restore_terminal() noexcept;

}  // namespace moe::shell
