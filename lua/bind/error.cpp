#include "core/base/host_memory.h"
#include "core/base/suggest.h"
#include "core/base/units.h"
#include "lua/bind/lua.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <stdexcept>

namespace moe::lua {
namespace {
constexpr const char* kErrorType = "error";
constexpr ErrorKind kAllKinds[] = {ErrorKind::usage, ErrorKind::config, ErrorKind::shape, ErrorKind::dtype, ErrorKind::device, ErrorKind::memory, ErrorKind::state,
                                   ErrorKind::io, ErrorKind::data, ErrorKind::dist, ErrorKind::cuda, ErrorKind::lua, ErrorKind::interrupted, ErrorKind::internal};

std::string field(lua_State* L, int index, const char* name) {
    std::string text;
    lua_pushstring(L, name);
    lua_rawget(L, index);
    if (lua_isstring(L, -1)) text = lua_tostring(L, -1);
    lua_pop(L, 1);
    return text;
}

int error_to_string(lua_State* L) {
    // The object goes out of scope before lua_error could be thrown by pushing: the text is copied first.
    std::string text = Error(error_parts(L, 1)).what();
    push_string(L, text);
    return 1;
}

std::string first_line(const char* text) {
    std::string_view view(text);
    return std::string(view.substr(0, view.find('\n')));
}

/// LibTorch's messages tell shapes and types apart only by their words.
ErrorKind kind_of_torch_message(const std::string& message) {
    auto has = [&](const char* word) { return message.find(word) != std::string::npos; };
    if (has("out of memory") || has("can't allocate memory")) return ErrorKind::memory;
    for (const char* library : {"CUDA error", "CUDA driver", "cuDNN", "CUDNN", "CUBLAS", "cuBLAS", "NCCL", "nvrtc"})
        if (has(library)) return ErrorKind::cuda;
    if (has("same device") || has("on device") || has("not linked with support")) return ErrorKind::device;
    if (has("dtype") || has("scalar type") || has("not implemented for '")) return ErrorKind::dtype;
    if (has("size") || has("shape") || has("imension") || has("range")) return ErrorKind::shape;
    if (has("backward through the graph") || has("requires grad") || has("inplace operation")) return ErrorKind::state;
    if (has("xpected") || has("must") || has("subscript") || has("not support") || has("can't be cast") || has("cannot") || has("multiple times") || has("at least") || has("required") || has("Supports") || has("overflow") || has("unsupported operation") || has("supposed to") || has("ZeroDivision") || has("einsum()")) return ErrorKind::usage;
    return ErrorKind::internal;
}

/// Of LibTorch's message or of none. A GPU's says itself what was asked for and what there is; the CPU's in bytes what was asked for.
ErrorParts out_of_memory(const std::string& message = "") {
    constexpr std::string_view kAsked = "DefaultCPUAllocator: can't allocate memory: you tried to allocate ";
    ErrorParts parts;
    parts.kind = ErrorKind::memory, parts.op = "out of memory", parts.got = message.substr(0, message.find(" Of the allocated"));
    parts.hint = "x:free() gives memory back at once; smaller sizes or dtypes ask for less";
    size_t at = message.find(kAsked);
    if (at != std::string::npos) parts.got = format_bytes(std::strtod(message.c_str() + at + kAsked.size(), nullptr));
    if (at != std::string::npos || message.empty()) parts.want = format_bytes(double(host_memory().available)) + " at most, what is free on this host";
    return parts;
}
}  // namespace

std::string lua_place(lua_State* L) {
    lua_Debug frame;
    std::string in_module;
    for (int level = 0; lua_getstack(L, level, &frame); ++level) {
        lua_getinfo(L, "Sl", &frame);
        if (frame.currentline <= 0) continue;
        std::string place = fmt::format("{}:{}", frame.short_src, frame.currentline);
        if (!std::string_view(frame.source).starts_with("@lua/moe/")) return place;
        if (in_module.empty()) in_module = place;
    }
    return in_module;
}

void push_error(lua_State* L, const ErrorParts& parts) {
    luaL_checkstack(L, 8, "error object");
    std::string place = lua_place(L);
    lua_createtable(L, 0, 8);
    auto set = [&](const char* name, const std::string& text) {
        push_string(L, text);
        lua_setfield(L, -2, name);
    };
    set("kind", to_string(parts.kind));
    set("op", parts.op);
    set("got", parts.got);
    set("want", parts.want);
    set("hint", parts.hint);
    set("where", place.empty() || !parts.traceback.empty() ? parts.where : place);    // with a traceback it went through C++ from another place of Lua's
    lua_pushinteger(L, parts.rank);
    lua_setfield(L, -2, "rank");
    set("traceback", parts.traceback);
    if (luaL_newmetatable(L, kErrorType)) {
        lua_pushcfunction(L, error_to_string);
        lua_setfield(L, -2, "__tostring");
        set("__name", kErrorType);
    }
    lua_setmetatable(L, -2);
}

bool is_error(lua_State* L, int index) {
    if (!lua_istable(L, index) || !lua_getmetatable(L, index)) return false;
    luaL_getmetatable(L, kErrorType);
    bool same = lua_rawequal(L, -1, -2);
    lua_pop(L, 2);
    return same;
}

void add_traceback_to_error(lua_State* L) {
    if (!is_error(L, 1)) {
        ErrorParts parts = error_parts(L, 1);
        if (size_t at = parts.op.find("a nil value (global '"); at != std::string::npos) {
            lua_pushglobaltable(L);
            at += std::strlen("a nil value (global '");
            parts.hint = did_you_mean(parts.op.substr(at, parts.op.find('\'', at) - at), ordered_keys(L, -1));
            lua_pop(L, 1);
        }
        push_error(L, parts);
        if (!parts.where.empty()) {
            push_string(L, parts.where);
            lua_setfield(L, -2, "where");
        }
        lua_replace(L, 1);
    }
    lua_settop(L, 1);
    // An error that went through C++, out of a function that autograd or a callback called, brings the inner stack's; where that is a part of this stack, it says all.
    std::string inner = error_parts(L, 1).traceback, header = "stack traceback:";
    luaL_traceback(L, L, nullptr, 1);
    std::string outer = lua_tostring(L, -1);
    lua_pop(L, 1);
    push_string(L, inner.empty() ? outer : inner.ends_with(outer.substr(header.size())) ? inner : inner + "\n" + outer);
    lua_setfield(L, 1, "traceback");
}

ErrorParts error_parts(lua_State* L, int index) {
    index = lua_absindex(L, index);
    ErrorParts parts;
    parts.kind = ErrorKind::lua;
    if (!is_error(L, index)) {
        // A text "file:12: message" as error() makes it, or any value that a script raised.
        std::string text = to_string(L, index);
        size_t at = text.find(": "), colon = text.rfind(':', at == std::string::npos ? 0 : at - 1);
        bool placed = at != std::string::npos && colon != std::string::npos && colon < at && colon + 1 < at &&
                      std::all_of(text.begin() + long(colon) + 1, text.begin() + long(at), [](char c) { return c >= '0' && c <= '9'; });
        if (placed) {
            parts.where = text.substr(0, at);
            text = text.substr(at + 2);
        }
        parts.op = text;
        return parts;
    }
    std::string kind = field(L, index, "kind");
    for (ErrorKind k : kAllKinds) {
        if (kind == to_string(k)) parts.kind = k;
    }
    parts.op = field(L, index, "op");
    parts.got = field(L, index, "got");
    parts.want = field(L, index, "want");
    parts.hint = field(L, index, "hint");
    parts.where = field(L, index, "where");
    parts.traceback = field(L, index, "traceback");
    lua_pushliteral(L, "rank");
    lua_rawget(L, index);
    parts.rank = lua_isinteger(L, -1) ? int(lua_tointeger(L, -1)) : -1;
    lua_pop(L, 1);
    return parts;
}

ErrorParts current_exception_parts() {
    ErrorParts parts;
    try {
        throw;
    } catch (const Error& e) {
        parts = e.parts();
    } catch (const c10::Error& e) {
        parts.op = first_line(e.what_without_backtrace());
        parts.kind = kind_of_torch_message(parts.op);
        if (parts.kind == ErrorKind::memory) parts = out_of_memory(parts.op);
        if (parts.kind == ErrorKind::internal && parts.op.find("INTERNAL ASSERT") == std::string::npos) parts.kind = ErrorKind::usage;      // its checks are of arguments
    } catch (const std::bad_alloc&) {
        parts = out_of_memory();
    } catch (const std::length_error&) {
        parts.op = "allocation failed: more elements than there can be";
        parts.kind = ErrorKind::memory;
    } catch (const std::filesystem::filesystem_error& e) {
        parts.op = first_line(e.path1().c_str()).substr(0, 200);
        parts.got = e.code().message();
        parts.want = "a path that can be used";
        parts.kind = ErrorKind::io;
    } catch (const std::exception& e) {
        parts.op = first_line(e.what());
        parts.kind = kind_of_torch_message(parts.op);
    }
    return parts;
}
}  // namespace moe::lua
