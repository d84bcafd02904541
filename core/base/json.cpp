#include "core/base/json.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <unistd.h>

namespace moe {
namespace {
struct Place {
    size_t line = 1, column = 1;
};

Place place_of(const std::string& text, size_t byte) {
    size_t end = std::min(byte, text.size());
    Place p;
    p.line = 1 + size_t(std::count(text.begin(), text.begin() + long(end), '\n'));
    size_t start = end == 0 ? std::string::npos : text.rfind('\n', end - 1);
    p.column = start == std::string::npos ? end + 1 : end - start;
    return p;
}

/// The parser's own sentence, without its number and position: "syntax error while parsing …".
std::string reason(const nlohmann::json::parse_error& e) {
    std::string text = e.what();
    size_t start = text.find(": ");
    return start == std::string::npos ? text : text.substr(start + 2);
}
}  // namespace

nlohmann::json parse_json(const std::string& text, const std::string& source, ErrorKind kind) {
    std::vector<std::set<std::string>> keys;
    std::string twice;
    auto watch = [&](int, nlohmann::json::parse_event_t event, nlohmann::json& value) {
        using Event = nlohmann::json::parse_event_t;
        if (event == Event::object_start) keys.emplace_back();
        else if (event == Event::object_end) keys.pop_back();
        else if (event == Event::key && !keys.back().insert(value.get<std::string>()).second && twice.empty()) twice = value.get<std::string>();
        return true;
    };
    nlohmann::json value;
    try {
        value = nlohmann::json::parse(text, watch, true, true);
    } catch (const nlohmann::json::parse_error& e) {
        Place p = place_of(text, e.byte > 0 ? e.byte - 1 : 0);
        throw_error(kind, fmt::format("{}:{}:{}", source, p.line, p.column), reason(e), "JSON", "check commas, quotes and brackets near this place",
                    fmt::format("{}:{}", source, p.line));
    }
    if (!twice.empty()) {
        size_t first = text.find("\"" + twice + "\""), line = place_of(text, first).line;
        throw_error(kind, source, fmt::format("the key \"{}\" twice in one object (first seen on line {})", twice, line), "each key once", "remove one of them", source);
    }
    return value;
}

std::string read_text(const std::string& path) {
    std::error_code error;
    MOE_CHECK(!std::filesystem::is_directory(path, error), io, path, "a folder", "a file", "");
    std::ifstream in(path, std::ios::binary);
    MOE_CHECK(in, io, path, std::strerror(errno), "a file that can be read", "check the path and its permissions");
    std::ostringstream text;
    text << in.rdbuf();
    MOE_CHECK(!in.bad(), io, path, "a read error", "a file that can be read", "");
    return text.str();
}

nlohmann::json read_json(const std::string& path, ErrorKind kind) { return parse_json(read_text(path), path, kind); }

void write_text(const std::string& path, const std::string& text) {
    // A device or a pipe is written to; renaming over it would replace it by a file.
    bool direct = std::filesystem::exists(path) && !std::filesystem::is_regular_file(path);
    std::string target = direct ? path : fmt::format("{}.{}.tmp", path, ::getpid());
    std::FILE* file = std::fopen(target.c_str(), "wb");
    MOE_CHECK(file, io, path, std::strerror(errno), "a file that can be written", "check the folder and its permissions");
    bool written = std::fwrite(text.data(), 1, text.size(), file) == text.size() && std::fflush(file) == 0 && (direct || ::fsync(::fileno(file)) == 0);
    int reason = errno;
    std::fclose(file);
    if (written && (direct || std::rename(target.c_str(), path.c_str()) == 0)) return;
    if (written) reason = errno;
    if (!direct) std::remove(target.c_str());
    MOE_THROW(io, path, std::strerror(reason), fmt::format("{} bytes written", text.size()), "check the free space and the folder's permissions");
}

std::string brief(const nlohmann::json& value, size_t width) {
    std::string text = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    if (text.size() <= width) return text;
    size_t end = width - 1;
    while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;      // never half a UTF-8 character
    return text.substr(0, end) + "…";
}
}  // namespace moe
