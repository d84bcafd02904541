// What TAB offers, and what `?` explains: names under a cursor, looked up in the live state without running any Lua function.
#pragma once
#include <lua.hpp>

#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace moe::lua {

/// `matches` are sorted texts, each of which may replace the bytes [begin, end) of the code. `note`: what the arguments of the call are, where one begins at the cursor.
struct Completion {
    size_t begin = 0, end = 0;
    std::vector<std::string> matches;
    std::string note = {};
};

/// `text` explains the name at the cursor: its help text, or what it holds; "" where nothing is known. `source` is the source of a
/// function written in Lua, with its place in the first line.
struct Inspection {
    std::string name, text, source;
    bool found() const { return !text.empty(); }
};

/// At byte `cursor`: globals, names in the code and keywords; fields and methods after "." and ":"; keys of option tables by the help of
/// the function that gets them, also where the table itself would begin; keys of configurations; ids after "layers["; in texts: words that the function's help quotes, ready
/// configurations, saves of runs, modules, names that help knows, paths. May raise Lua's errors.
Completion complete(lua_State* L, std::string_view code, size_t cursor);

/// Explains the name that the cursor touches, else the function whose arguments it is in; with `detail`, of words that are no name, what help finds for them. `source_of` gives the text of a chunk by its
/// name as debug.getinfo has it ("=input 3", "@file.lua"), "" for none. May raise Lua's errors.
Inspection inspect(lua_State* L, std::string_view code, size_t cursor, bool detail, const std::function<std::string(const std::string&)>& source_of);

}  // namespace moe::lua
