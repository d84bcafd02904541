#include "lua/bind/bytecode.h"

#include <cstring>
#include <map>

namespace moe::lua {
namespace {
enum Op : uint32_t { kMove = 0, kGetUpvalue = 9, kSetUpvalue = 10, kGetTabUp = 11, kGetTable = 12, kGetI = 13, kGetField = 14, kSetTabUp = 15, kSetTable = 16, kSetI = 17, kSetField = 18 };

/// A stripped dump from its first function on.
class Dump {
public:
    explicit Dump(lua_State* L, int index) {
        lua_pushvalue(L, index);
        auto append = [](lua_State*, const void* data, size_t size, void* out) {
            static_cast<std::string*>(out)->append(static_cast<const char*>(data), size);
            return 0;
        };
        lua_dump(L, append, &bytes, /*strip=*/1);
        lua_pop(L, 1);
        at = 4 + 1 + 1 + 6 + 3 + sizeof(lua_Integer) + sizeof(lua_Number) + 1;       // header, number of upvalues
    }
    uint8_t byte() { return at < bytes.size() ? uint8_t(bytes[at++]) : 0; }
    size_t number() {
        size_t x = 0;
        for (uint8_t b = 0; at < bytes.size() && !(b & 0x80);) {
            b = byte();
            x = x << 7 | (b & 0x7f);
        }
        return x;
    }
    std::string text() {
        size_t n = number();
        std::string out = n ? bytes.substr(std::min(at, bytes.size()), n - 1) : "";
        at += n ? n - 1 : 0;
        return out;
    }
    /// A function up to its upvalues.
    struct Body {
        std::vector<uint32_t> code;
        std::vector<std::string> constants;        // texts; others are empty
    };
    Body body() {
        Body b;
        number(), number();                        // first and last line
        at += 3;                                   // parameters, vararg, stack
        b.code.resize(std::min(number(), bytes.size()));
        if (at + b.code.size() * 4 > bytes.size()) b.code.clear();
        std::memcpy(b.code.data(), bytes.data() + std::min(at, bytes.size()), b.code.size() * 4);
        at += b.code.size() * 4;
        for (size_t n = number(); n > 0 && at < bytes.size(); --n) {
            int type = byte();
            bool is_number = type == LUA_TNUMBER || type == (LUA_TNUMBER | 1 << 4), is_text = type == LUA_TSTRING || type == (LUA_TSTRING | 1 << 4);
            if (is_number) at += 8;
            b.constants.push_back(is_text ? text() : "");
        }
        return b;
    }
    std::string bytes;
    size_t at;
};

struct Scan {
    Dump& dump;
    OuterNames& names;
    int environment;                               // the outermost function's upvalue _ENV, -1 for none

    /// upvalues: for each of the function's own, which of the outermost function's it is; -1: a local of one between.
    void function(const std::vector<int>* parent) {
        dump.text();                               // source
        Dump::Body body = dump.body();
        std::vector<int> own(std::min(dump.number(), dump.bytes.size()));
        for (size_t i = 0; i < own.size(); ++i) {
            bool of_stack = dump.byte();
            size_t place = dump.byte();
            dump.byte();                           // kind
            own[i] = !parent ? int(i) : of_stack || place >= parent->size() ? -1 : (*parent)[place];
        }
        code(body, own);
        for (size_t n = dump.number(); n > 0 && dump.at < dump.bytes.size(); --n) function(&own);
        for (int debug = 0; debug < 4; ++debug) dump.number();      // empty lists
    }
    void code(const Dump::Body& body, const std::vector<int>& upvalues) {
        std::map<uint32_t, std::string> held;      // registers with a global's value, or an element of it
        auto upvalue = [&](uint32_t i) { return i < upvalues.size() ? upvalues[i] : -1; };
        auto constant = [&](uint32_t i) { return i < body.constants.size() ? body.constants[i] : ""; };
        auto move = [&](uint32_t to, uint32_t from) {
            auto it = held.find(from);
            if (it == held.end()) held.erase(to);
            else held[to] = std::string(it->second);
        };
        for (uint32_t i : body.code) {
            const uint32_t a = i >> 7 & 0xff, b = i >> 16 & 0xff, c = i >> 24;
            switch (i & 0x7f) {
                case kSetUpvalue:
                    if (upvalue(b) >= 0) names.assigned.insert(upvalue(b));
                    break;
                case kGetTabUp:
                    held.erase(a);
                    if (environment >= 0 && upvalue(b) == environment) names.read.insert(held[a] = constant(c));
                    break;
                case kSetTabUp:
                    if (environment >= 0 && upvalue(a) == environment) names.written.insert(constant(b));
                    break;
                case kMove: case kGetTable: case kGetI: case kGetField: move(a, b); break;
                case kSetTable: case kSetI: case kSetField:
                    if (auto it = held.find(a); it != held.end()) names.written.insert(it->second);
                    break;
                default: held.erase(a);            // most write there; forgetting one too many says less
            }
        }
    }
};
}  // namespace

std::string code_of(lua_State* L, int index) {
    Dump dump(L, index);
    dump.text();                                   // source
    size_t begin = dump.at;
    dump.body();
    size_t end = dump.at, upvalues = dump.number();
    if (dump.at > dump.bytes.size()) return dump.bytes;
    return dump.bytes.substr(begin, end - begin) + dump.bytes.substr(std::min(dump.bytes.size(), dump.at + 3 * upvalues));
}

OuterNames outer_names(lua_State* L, int index) {
    index = lua_absindex(L, index);
    OuterNames names;
    int environment = -1;
    for (int i = 1; const char* name = lua_getupvalue(L, index, i); ++i) {
        if (std::string_view(name) == "_ENV") environment = i - 1;
        lua_pop(L, 1);
    }
    Dump dump(L, index);
    Scan{dump, names, environment}.function(nullptr);
    return names;
}
}  // namespace moe::lua
