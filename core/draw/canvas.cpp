#include "core/draw/canvas.h"

#include "core/base/error.h"
#include "core/draw/font.h"

#include <agg_conv_curve.h>
#include <agg_conv_dash.h>
#include <agg_conv_stroke.h>
#include <agg_conv_transform.h>
#include <agg_ellipse.h>
#include <agg_path_storage.h>
#include <agg_pixfmt_rgb.h>
#include <agg_rasterizer_scanline_aa.h>
#include <agg_renderer_scanline.h>
#include <agg_scanline_u.h>

#include <algorithm>
#include <cmath>

namespace moe::draw {
using PixelFormat = agg::pixfmt_rgb24;
using Renderer = agg::renderer_base<PixelFormat>;

Colour Colour::named(std::string_view text) {
    auto digit = [&](size_t i) {
        char c = text[i];
        return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
    };
    bool good = (text.size() == 7 || text.size() == 9) && text[0] == '#';
    for (size_t i = 1; good && i < text.size(); ++i) good = digit(i) >= 0;
    MOE_CHECK(good, usage, "colour", '"' + std::string(text) + '"', "\"#rrggbb\" or \"#rrggbbaa\"", "");
    auto byte = [&](size_t i) { return uint8_t(digit(i) * 16 + digit(i + 1)); };
    return {byte(1), byte(3), byte(5), text.size() == 9 ? byte(7) : uint8_t(255)};
}
Colour Colour::faded(double opacity) const {
    Colour c = *this;
    c.a = uint8_t(std::lround(std::clamp(opacity, 0.0, 1.0) * c.a));
    return c;
}

struct Canvas::Sheet {
    int width, height;
    double scale;
    std::vector<uint8_t> rgb;
    agg::rendering_buffer buffer;
    PixelFormat format;
    Renderer renderer;
    agg::rasterizer_scanline_aa<> rasterizer;
    agg::scanline_u8 scanline;

    Sheet(int w, int h, double s) : width(w), height(h), scale(s), rgb(size_t(w) * size_t(h) * 3, 255), buffer(rgb.data(), unsigned(w), unsigned(h), w * 3), format(buffer), renderer(format) {
        rasterizer.clip_box(0, 0, w, h);
    }
    /// The rasteriser counts in 1/256 pixels of an int: what lies far outside is brought nearer, where it cannot be seen either.
    double px(double v) const { return std::isfinite(v) ? std::clamp(v * scale, -1e5, 1e5) : 0; }

    template <class Source>
    void draw(Source& source, Colour c, agg::filling_rule_e rule = agg::fill_non_zero) {
        rasterizer.reset();
        rasterizer.filling_rule(rule);
        rasterizer.add_path(source);
        agg::render_scanlines_aa_solid(rasterizer, scanline, renderer, agg::rgba8(c.r, c.g, c.b, c.a));
    }
    agg::path_storage path(std::span<const Point> points, bool closed) const {
        agg::path_storage out;
        for (size_t i = 0; i < points.size(); ++i) {
            if (i == 0) out.move_to(px(points[i].x), px(points[i].y));
            else out.line_to(px(points[i].x), px(points[i].y));
        }
        if (closed) out.close_polygon();
        return out;
    }
};

Canvas::Canvas(double width, double height, double scale) {
    double w = std::ceil(width * scale), h = std::ceil(height * scale);
    MOE_CHECK(w >= 1 && h >= 1 && w <= kMaxCanvasSide && h <= kMaxCanvasSide && w * h <= double(kMaxCanvasPixels), usage, "picture", fmt::format("{:g} x {:g} pixels", w, h),
              fmt::format("1 to {} a side, at most {} million in all", kMaxCanvasSide, kMaxCanvasPixels / 1'000'000), "a smaller width, height or scale");
    sheet_ = std::make_unique<Sheet>(int(w), int(h), scale);
}
Canvas::~Canvas() = default;
int Canvas::pixel_width() const { return sheet_->width; }
int Canvas::pixel_height() const { return sheet_->height; }

void Canvas::clip(const Box* box) {
    auto& s = *sheet_;
    if (box) s.rasterizer.clip_box(std::max(0.0, s.px(box->x)), std::max(0.0, s.px(box->y)), std::min(double(s.width), s.px(box->x + box->width)), std::min(double(s.height), s.px(box->y + box->height)));
    else s.rasterizer.clip_box(0, 0, s.width, s.height);
}

void Canvas::fill(std::span<const Point> points, Colour colour) {
    agg::path_storage path = sheet_->path(points, true);
    sheet_->draw(path, colour, agg::fill_even_odd);
}

void Canvas::stroke(std::span<const Point> points, double width, Colour colour, bool closed, std::span<const double> dash) {
    auto& s = *sheet_;
    agg::path_storage path = s.path(points, closed);
    auto draw = [&](auto& source) {
        agg::conv_stroke<std::remove_reference_t<decltype(source)>> line(source);
        line.width(std::max(0.01, width * s.scale));
        line.line_join(agg::round_join);
        line.line_cap(dash.empty() ? agg::round_cap : agg::butt_cap);
        s.draw(line, colour);
    };
    double length = 0;
    for (double d : dash) length += d;
    if (length <= 0 || dash.size() < 2) return draw(path);
    agg::conv_dash<agg::path_storage> dashed(path);
    for (size_t i = 0; i + 1 < dash.size(); i += 2) dashed.add_dash(std::max(0.1, dash[i] * s.scale), std::max(0.1, dash[i + 1] * s.scale));
    draw(dashed);
}

void Canvas::rect(const Box& b, Colour colour) {
    Point corners[] = {{b.x, b.y}, {b.x + b.width, b.y}, {b.x + b.width, b.y + b.height}, {b.x, b.y + b.height}};
    fill(corners, colour);
}

void Canvas::circle(Point centre, double radius, Colour colour) {
    auto& s = *sheet_;
    agg::ellipse round(s.px(centre.x), s.px(centre.y), s.px(radius), s.px(radius));
    s.draw(round, colour);
}

void Canvas::text(Point at, std::string_view text, double size, Colour colour, Anchor anchor, bool bold, double turn_degrees) {
    auto& s = *sheet_;
    double pixels = size * s.scale;
    agg::path_storage path;
    for (auto& part : text_outline(text, pixels, bold)) {
        if (part.kind == 'm') path.move_to(part.x, part.y);
        else if (part.kind == 'l') path.line_to(part.x, part.y);
        else path.curve3(part.cx, part.cy, part.x, part.y);
    }
    agg::trans_affine place;
    if (anchor != Anchor::start) place *= agg::trans_affine_translation(-text_width(text, pixels, bold) * (anchor == Anchor::middle ? 0.5 : 1), 0);
    place *= agg::trans_affine_rotation(turn_degrees * M_PI / 180);
    // Baselines on whole pixels: horizontal strokes of the letters stay sharp.
    place *= agg::trans_affine_translation(s.px(at.x), turn_degrees == 0 ? std::round(s.px(at.y)) : s.px(at.y));
    agg::conv_curve<agg::path_storage> curves(path);
    agg::conv_transform<agg::conv_curve<agg::path_storage>> placed(curves, place);
    s.draw(placed, colour);
}

void Canvas::cells(const Box& box, int rows, int cols, std::span<const uint8_t> rgb) {
    MOE_CHECK(rows > 0 && cols > 0 && rgb.size() == size_t(rows) * size_t(cols) * 3, shape, "picture: cells", fmt::format("{} bytes for {} x {}", rgb.size(), rows, cols), "three a cell", "");
    auto& s = *sheet_;
    int left = int(std::lround(s.px(box.x))), top = int(std::lround(s.px(box.y)));
    int width = int(std::lround(s.px(box.x + box.width))) - left, height = int(std::lround(s.px(box.y + box.height))) - top;
    for (int y = std::max(0, -top); y < std::min(height, s.height - top); ++y) {
        for (int x = std::max(0, -left); x < std::min(width, s.width - left); ++x) {
            auto* from = &rgb[(size_t(int64_t(y) * rows / height) * size_t(cols) + size_t(int64_t(x) * cols / width)) * 3];
            std::copy_n(from, 3, &s.rgb[(size_t(top + y) * size_t(s.width) + size_t(left + x)) * 3]);
        }
    }
}

std::string Canvas::png() const { return encode_png(sheet_->width, sheet_->height, sheet_->rgb); }
const std::vector<uint8_t>& Canvas::rgb() const { return sheet_->rgb; }

}  // namespace moe::draw
