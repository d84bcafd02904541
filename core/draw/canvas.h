// A white sheet that shapes and text are drawn on, anti-aliased; read as PNG. Lengths are in units of the sheet, y downwards.
#pragma once
#include "core/draw/png.h"

#include <memory>

namespace moe::draw {

struct Colour {
    uint8_t r = 0, g = 0, b = 0, a = 255;
    /// "#rrggbb" or "#rrggbbaa". Throws moe::Error (usage).
    static Colour named(std::string_view text);
    Colour faded(double opacity) const;   ///< its alpha times opacity in [0, 1]
};

struct Point {
    double x = 0, y = 0;
};
struct Box {
    double x = 0, y = 0, width = 0, height = 0;
};

enum class Anchor { start, middle, end };

/// Pixels a side and in all, above which a canvas is an error and not a full memory.
inline constexpr int kMaxCanvasSide = 20000;
inline constexpr int64_t kMaxCanvasPixels = 120'000'000;

class Canvas {
public:
    /// A white sheet of width x height units, `scale` pixels a unit. Throws moe::Error (usage) for sizes that are not in reach.
    Canvas(double width, double height, double scale = 1);
    ~Canvas();
    int pixel_width() const;
    int pixel_height() const;

    /// What follows is drawn inside of the box only; nothing: everywhere.
    void clip(const Box* box);
    /// Fills a polygon (even–odd).
    void fill(std::span<const Point> points, Colour colour);
    /// A line through points, round joins; dash: lengths on and off in turn, empty for a solid line.
    void stroke(std::span<const Point> points, double width, Colour colour, bool closed = false, std::span<const double> dash = {});
    void rect(const Box& box, Colour colour);
    void circle(Point centre, double radius, Colour colour);
    /// A line of text; `at` is the baseline's start, middle or end; turned by degrees, clockwise, around `at`.
    void text(Point at, std::string_view text, double size, Colour colour, Anchor anchor = Anchor::start, bool bold = false, double turn_degrees = 0);
    /// Cells of one colour each, rows x cols, filling the box without seams; rgb is rows · cols · 3 long. Throws moe::Error (shape).
    void cells(const Box& box, int rows, int cols, std::span<const uint8_t> rgb);

    std::string png() const;
    const std::vector<uint8_t>& rgb() const;

private:
    struct Sheet;
    std::unique_ptr<Sheet> sheet_;
};

}  // namespace moe::draw
