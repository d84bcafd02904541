// Messages to a person: coloured on a terminal's standard error, and to the run's log file once there is one; the status line.
#pragma once
#include <string>
#include <string_view>

namespace moe::log {

/// Adds a file that gets every message from now on; throws moe::Error (io) where it cannot be written. "" removes it.
void set_file(const std::string& path);
/// Ends set_file(path); nothing happens where another file has taken its place.
void close_file(const std::string& path);
/// A line for the file alone.
void to_file(std::string_view line);
/// Text for standard output, as it is: above the status line, where there is one.
void print(std::string_view text);
/// One line that stays at the bottom of a terminal while other lines scroll above it; "" removes it. Nothing happens where standard
/// output is no terminal.
void status(std::string_view line);
/// The input line of an interactive prompt: it stays below all output. `draw` is written now and again after each output of whole lines,
/// `erase` takes it away again from where `draw` left the cursor. Without `erase` the text is written for the last time and the prompt
/// ends. Meanwhile output without a line end waits for one, and no status line is shown.
void prompt(std::string draw, std::string erase);
/// Messages below this level are dropped: "debug", "info" (default), "warn", "error". Throws moe::Error (usage) for another word.
void set_level(std::string_view level);
void debug(std::string_view message);
void info(std::string_view message);
void warn(std::string_view message);
void error(std::string_view message);

}  // namespace moe::log
