#include "core/draw/font.h"

#include "core/base/error.h"

#include <array>
#include <memory>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#define STB_TRUETYPE_IMPLEMENTATION
#define STBTT_STATIC
#include <stb_truetype.h>
#pragma GCC diagnostic pop

// The assembler takes the files in as they are: no half a million numbers for the compiler to read.
__asm__(
    ".section .rodata\n"
    ".balign 16\n"
    "moe_font_regular:\n.incbin \"" MOE_FONTS "/DejaVuSans.ttf\"\n.byte 0\n"
    ".balign 16\n"
    "moe_font_bold:\n.incbin \"" MOE_FONTS "/DejaVuSans-Bold.ttf\"\n.byte 0\n"
    ".globl moe_font_regular\n.hidden moe_font_regular\n.globl moe_font_bold\n.hidden moe_font_bold\n"
    ".text\n");
extern "C" __attribute__((visibility("hidden"))) const unsigned char moe_font_regular[], moe_font_bold[];

namespace moe::draw {
namespace {
const stbtt_fontinfo& font(bool bold) {
    static const std::array<stbtt_fontinfo, 2> fonts = [] {
        std::array<stbtt_fontinfo, 2> out{};
        const unsigned char* data[] = {moe_font_regular, moe_font_bold};
        for (int i = 0; i < 2; ++i) MOE_CHECK(stbtt_InitFont(&out[size_t(i)], data[i], 0), internal, "font", "a file that is no font", "DejaVu Sans", "");
        return out;
    }();
    return fonts[bold];
}

/// The next code point of UTF-8 text; U+FFFD for a byte that fits nowhere.
int next_code_point(std::string_view text, size_t& at) {
    auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
    unsigned first = byte(at);
    int more = first < 0x80 ? 0 : first >> 5 == 6 ? 1 : first >> 4 == 14 ? 2 : first >> 3 == 30 ? 3 : -1;
    if (more == 0) return ++at, int(first);
    unsigned code = more < 0 ? 0 : first & (0x3fu >> more);
    for (int i = 1; i <= more; ++i) {
        if (byte(at + size_t(i)) >> 6 != 2) more = -1;
        else code = code << 6 | (byte(at + size_t(i)) & 0x3f);
    }
    at += more < 0 ? 1 : size_t(more) + 1;
    return more < 0 ? 0xfffd : int(code);
}

/// Calls f(glyph, x) for each character, x in the font's units, and returns the whole advance.
template <class F>
double each_glyph(std::string_view text, bool bold, F&& f) {
    const stbtt_fontinfo& info = font(bold);
    double x = 0;
    int before = 0;
    for (size_t at = 0; at < text.size();) {
        int glyph = stbtt_FindGlyphIndex(&info, next_code_point(text, at)), advance = 0, bearing = 0;
        if (before) x += stbtt_GetGlyphKernAdvance(&info, before, glyph);
        f(glyph, x);
        stbtt_GetGlyphHMetrics(&info, glyph, &advance, &bearing);
        x += advance;
        before = glyph;
    }
    return x;
}
}  // namespace

double text_width(std::string_view text, double size, bool bold) {
    return each_glyph(text, bold, [](int, double) {}) * double(stbtt_ScaleForMappingEmToPixels(&font(bold), float(size)));
}

std::vector<OutlinePart> text_outline(std::string_view text, double size, bool bold) {
    const stbtt_fontinfo& info = font(bold);
    double scale = double(stbtt_ScaleForMappingEmToPixels(&info, float(size)));
    std::vector<OutlinePart> out;
    each_glyph(text, bold, [&](int glyph, double x) {
        stbtt_vertex* vertices = nullptr;
        int count = stbtt_GetGlyphShape(&info, glyph, &vertices);
        std::unique_ptr<stbtt_vertex, void (*)(stbtt_vertex*)> guard(vertices, [](stbtt_vertex* v) { std::free(v); });
        for (int i = 0; i < count; ++i) {
            const stbtt_vertex& v = vertices[i];
            char kind = v.type == STBTT_vmove ? 'm' : v.type == STBTT_vline ? 'l' : 'q';
            out.push_back({kind, (x + v.x) * scale, -v.y * scale, (x + v.cx) * scale, -v.cy * scale});
        }
    });
    return out;
}

}  // namespace moe::draw
