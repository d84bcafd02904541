// Messages to a person: coloured on a terminal's standard error, and to the run's log file once there is one.
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
/// Messages below this level are dropped: "debug", "info" (default), "warn", "error". Throws moe::Error (usage) for another word.
void set_level(std::string_view level);
void debug(std::string_view message);
void info(std::string_view message);
void warn(std::string_view message);
void error(std::string_view message);

}  // namespace moe::log
