// Lists of primitives as PNG, and what a layout must know of text. Plots are made in lua/moe/plot.
#include "core/draw/canvas.h"
#include "core/draw/font.h"
#include "lua/bind/bind.h"
#include "lua/bind/tensor.h"

#include <ATen/ATen.h>

#include <cstring>

namespace moe::lua {
namespace {
/// Fields of the primitive on the stack's top.
struct Primitive {
    lua_State* L;
    int index;
    lua_Integer number;

    [[noreturn]] void bad(const char* key, const std::string& want) const {
        lua_getfield(L, index, key);
        MOE_THROW(usage, fmt::format("moe.draw.png: primitive {}: {}", number, key), got_text(L, -1), want, "");
    }
    double number_of(const char* key, std::optional<double> fallback = {}) const {
        int type = lua_getfield(L, index, key);
        double value = lua_tonumber(L, -1);
        lua_pop(L, 1);
        if (type == LUA_TNIL && fallback) return *fallback;
        if (type != LUA_TNUMBER) bad(key, "a number");
        return value;
    }
    bool boolean(const char* key) const {
        lua_getfield(L, index, key);
        bool value = lua_toboolean(L, -1);
        lua_pop(L, 1);
        return value;
    }
    std::string text(const char* key, std::optional<std::string> fallback = {}) const {
        int type = lua_getfield(L, index, key);
        std::string value = type == LUA_TNIL && fallback ? *fallback : type == LUA_TSTRING || type == LUA_TNUMBER ? to_string(L, -1) : "";
        lua_pop(L, 1);
        if (type != LUA_TSTRING && type != LUA_TNUMBER && !(type == LUA_TNIL && fallback)) bad(key, "a text");
        return value;
    }
    std::vector<double> numbers(const char* key) const {
        std::vector<double> out;
        int type = lua_getfield(L, index, key);
        if (type == LUA_TTABLE) {
            for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, -1)); i <= n; ++i) {
                if (lua_rawgeti(L, -1, i) != LUA_TNUMBER) bad(key, "a list of numbers");
                out.push_back(lua_tonumber(L, -1));
                lua_pop(L, 1);
            }
        } else if (type != LUA_TNIL) {
            bad(key, "a list of numbers");
        }
        lua_pop(L, 1);
        return out;
    }
    std::vector<draw::Point> points(const char* key) const {
        std::vector<double> flat = numbers(key);
        if (flat.size() % 2) bad(key, "x and y in turn");
        std::vector<draw::Point> out(flat.size() / 2);
        for (size_t i = 0; i < out.size(); ++i) out[i] = {flat[2 * i], flat[2 * i + 1]};
        return out;
    }
    draw::Box box() const { return {number_of("x"), number_of("y"), number_of("width"), number_of("height")}; }
    /// The colour under key with the primitive's opacity; nothing where there is none.
    std::optional<draw::Colour> colour(const char* key) const {
        std::string name = text(key, "none");
        if (name == "none") return {};
        return draw::Colour::named(name).faded(number_of("opacity", 1));
    }
};

void draw_path(draw::Canvas& canvas, const Primitive& p) {
    auto points = p.points("points");
    if (auto fill = p.colour("fill")) canvas.fill(points, *fill);
    if (auto stroke = p.colour("stroke")) canvas.stroke(points, p.number_of("stroke_width", 1), *stroke, p.boolean("closed"), p.numbers("dash"));
}

void draw_rect(draw::Canvas& canvas, const Primitive& p) {
    draw::Box b = p.box();
    if (auto fill = p.colour("fill")) canvas.rect(b, *fill);
    draw::Point corners[] = {{b.x, b.y}, {b.x + b.width, b.y}, {b.x + b.width, b.y + b.height}, {b.x, b.y + b.height}};
    if (auto stroke = p.colour("stroke")) canvas.stroke(corners, p.number_of("stroke_width", 1), *stroke, true);
}

void draw_circle(draw::Canvas& canvas, const Primitive& p) {
    draw::Point centre{p.number_of("x"), p.number_of("y")};
    double radius = p.number_of("radius");
    if (auto stroke = p.colour("stroke")) canvas.circle(centre, radius + p.number_of("stroke_width", 1) / 2, *stroke);
    if (auto fill = p.colour("fill")) canvas.circle(centre, p.colour("stroke") ? radius - p.number_of("stroke_width", 1) / 2 : radius, *fill);
}

void draw_text(draw::Canvas& canvas, const Primitive& p) {
    std::string anchor = p.text("anchor", "start");
    auto fill = p.colour("fill");
    canvas.text({p.number_of("x"), p.number_of("y")}, p.text("text"), p.number_of("size", 12), fill ? *fill : draw::Colour{},
                anchor == "end" ? draw::Anchor::end : anchor == "middle" ? draw::Anchor::middle : draw::Anchor::start, p.boolean("bold"), p.number_of("turn", 0));
}

std::span<const uint8_t> bytes_of(const std::string& text) { return {reinterpret_cast<const uint8_t*>(text.data()), text.size()}; }

void draw_primitive(draw::Canvas& canvas, const Primitive& p) {
    std::string kind = p.text("kind");
    auto clip = p.numbers("clip");
    if (!clip.empty() && clip.size() != 4) p.bad("clip", "{x, y, width, height}");
    draw::Box box;
    if (!clip.empty()) box = {clip[0], clip[1], clip[2], clip[3]};
    canvas.clip(clip.empty() ? nullptr : &box);
    if (kind == "path") draw_path(canvas, p);
    else if (kind == "rect") draw_rect(canvas, p);
    else if (kind == "circle") draw_circle(canvas, p);
    else if (kind == "text") draw_text(canvas, p);
    else if (kind == "cells") canvas.cells(p.box(), int(p.number_of("rows")), int(p.number_of("cols")), bytes_of(p.text("rgb")));
    else p.bad("kind", "path, rect, circle, text or cells");
}

int png(lua_State* L) {
    check_table(L, 1, "primitives");
    Options o(L, 2, {"width", "height", "scale"});
    draw::Canvas canvas(o.number("width", 640), o.number("height", 400), o.number("scale", 2));
    for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, 1)); i <= n; ++i) {
        lua_settop(L, 2);
        if (lua_rawgeti(L, 1, i) != LUA_TTABLE) MOE_THROW(usage, fmt::format("moe.draw.png: primitive {}", i), got_text(L, -1), "a table {kind = …}", "");
        luaL_checkstack(L, 16, "primitives");
        draw_primitive(canvas, {L, 3, i});
    }
    push_string(L, canvas.png());
    return 1;
}

int width_of_text(lua_State* L) {
    double size = lua_isnoneornil(L, 2) ? 12 : check_number(L, 2, "size");
    lua_pushnumber(L, draw::text_width(to_string(L, 1), size, lua_toboolean(L, 3)));
    return 1;
}

std::string base64(std::string_view bytes) {
    static constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string out;
    for (size_t i = 0; i < bytes.size(); i += 3) {
        auto byte = [&](size_t k) { return k < bytes.size() ? uint32_t(uint8_t(bytes[k])) : 0u; };
        uint32_t three = byte(i) << 16 | byte(i + 1) << 8 | byte(i + 2);
        for (int k = 0; k < 4; ++k) out += i + size_t(k) <= bytes.size() ? kDigits[three >> (18 - 6 * k) & 63] : '=';
    }
    return out;
}

int data_uri(lua_State* L) {
    std::string rgb = check_string(L, 1, "rgb");
    push_string(L, "data:image/png;base64," + base64(draw::encode_png(int(check_integer(L, 2, "cols")), int(check_integer(L, 3, "rows")), bytes_of(rgb))));
    return 1;
}

int decode(lua_State* L) {
    draw::Pixels p = draw::decode_png(check_string(L, 1, "png"));
    at::Tensor out = at::empty({p.height, p.width, 3}, at::kByte);
    std::memcpy(out.data_ptr(), p.rgb.data(), p.rgb.size());
    return push_tensor(L, out);
}

const Binding kFunctions[] = {
    {"png", png,
     "moe.draw.png(primitives, {width = 640, height = 400, scale = 2}): bytes of a PNG file, white behind. A primitive is a table with its kind and, in units of the sheet with y downwards: "
     "path {points = {x1, y1, x2, …}, fill =, stroke =, stroke_width = 1, closed =, dash = {on, off}}, rect {x, y, width, height, fill =, stroke =}, circle {x, y, radius, fill =, stroke =}, "
     "text {x, y, text, size = 12, fill =, anchor = \"start\" | \"middle\" | \"end\", bold =, turn = degrees}, cells {x, y, width, height, rows, cols, rgb = 3 bytes a cell}; any of them opacity = 0 … 1 and clip = {x, y, width, height}. "
     "Colours are \"#rrggbb\". \nExample: print(#moe.draw.png({ { kind = \"circle\", x = 8, y = 8, radius = 6, fill = \"#0072b2\" } }, { width = 16, height = 16 }) > 0)"},
    {"text_width", width_of_text, "moe.draw.text_width(text, size = 12, bold = false): width in pixels of a line in DejaVu Sans at a font size in pixels.\nExample: print(moe.draw.text_width(\"loss\", 12))"},
    {"data_uri", data_uri, "moe.draw.data_uri(rgb, cols, rows): an image of 3 bytes a pixel, rows top first, as the text data:image/png;base64,… that SVG and HTML take.\nExample: print(moe.draw.data_uri(\"\\xff\\0\\0\", 1, 1))"},
    {"decode", decode, "moe.draw.decode(png): pixels of a PNG file's bytes, uint8 [height, width, 3]; alpha is dropped.\nExample: print(moe.draw.decode(moe.draw.png({}, { width = 4, height = 2, scale = 1 })).shape)"},
};
}  // namespace

void open_draw(lua_State* L) {
    lua_newtable(L);
    set_functions(L, "moe.draw.", kFunctions);
    set_help(L, -1, "moe.draw", "moe.draw: shapes and text as PNG; what moe.plot is written on.");
    lua_setfield(L, -2, "draw");
}
}  // namespace moe::lua
