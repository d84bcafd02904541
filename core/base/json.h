// Reading and writing JSON with errors that name the file and the line.
#pragma once
#include "core/base/error.h"

#include <nlohmann/json_fwd.hpp>

#include <string>

namespace moe {

/// JSON with // and /* */ comments. `source` is the name that errors show. Throws moe::Error of `kind` with source:line:column
/// for what is malformed, and for a key that an object has twice.
nlohmann::json parse_json(const std::string& text, const std::string& source, ErrorKind kind = ErrorKind::data);

/// A file's JSON. Throws moe::Error (io) where it cannot be read, else as parse_json.
nlohmann::json read_json(const std::string& path, ErrorKind kind = ErrorKind::data);

/// Whole content of a file. Throws moe::Error (io).
std::string read_text(const std::string& path);

/// Writes text through a temporary file in the same folder and one rename, so that a reader never sees half of it; straight into
/// what is not a regular file, such as /dev/stdout. Throws moe::Error (io), also when the disk is full.
void write_text(const std::string& path, const std::string& text);

/// One line at most `width` characters long: the value for an error message.
std::string brief(const nlohmann::json& value, size_t width = 60);

}  // namespace moe
