// Errors as a person and a program read them.
#include "lua/session/modules.h"
#include "lua/session/session.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>

namespace moe::lua {
namespace {
/// A place in this program, "core/config/load.cpp:77": it says nothing to who did not write it. A user's own folders may have such names.
bool is_place_of_ours(const std::string& where) {
    std::string file = where.substr(0, where.find(':')), folder = file.substr(0, file.find('/'));
    auto ends = [&](const char* with) { return file.ends_with(with); };
    bool is_source = ends(".cpp") || ends(".h") || ends(".cu") || ends(".cuh");
    return (is_source && (folder == "core" || folder == "lua" || folder == "shell")) || !module_text(file).empty();
}
}  // namespace

std::string describe(const ErrorParts& error, bool colour) {
    std::string text = fmt::format("{}error:{} {}", colour ? "\033[31m" : "", colour ? "\033[0m" : "", Error(error).what());
    bool says_where = !error.where.empty() && (error.kind == ErrorKind::internal || !is_place_of_ours(error.where));
    if (says_where && text.find(error.where) == std::string::npos) text += "\n  at " + error.where;
    // A traceback of the main chunk alone, below functions of C++ and of our modules, says nothing that `where` does not say.
    size_t levels = 0;
    for (size_t at = error.traceback.find("\n\t"); at != std::string::npos; at = error.traceback.find("\n\t", at + 1)) {
        std::string_view line = std::string_view(error.traceback).substr(at + 2);
        levels += !line.starts_with("[C]") && !line.starts_with("lua/moe/") && !line.starts_with("(...");
    }
    // Nor does that of a command of ours to who typed it.
    bool deep = levels > 1 && !error.where.starts_with("lua/moe/commands/") && error.kind != ErrorKind::interrupted && error.kind != ErrorKind::usage && error.kind != ErrorKind::config;
    if (deep) text += "\n" + error.traceback;
    return text;
}

std::string to_json(const ErrorParts& e) {
    nlohmann::ordered_json object = {{"kind", to_string(e.kind)}, {"op", e.op}, {"got", e.got}, {"want", e.want}, {"hint", e.hint},
                                     {"where", e.where}, {"rank", e.rank}, {"traceback", e.traceback}};
    return nlohmann::ordered_json{{"error", object}}.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}
}  // namespace moe::lua
