// Outlines and widths of text in DejaVu Sans, regular and bold.
#pragma once
#include <string_view>
#include <vector>

namespace moe::draw {

/// A piece of an outline, y downwards: `kind` m(ove to), l(ine to), q(uadratic to, with the control point cx, cy).
struct OutlinePart {
    char kind;
    double x, y, cx, cy;
};

/// Width of a line of UTF-8 text in pixels at a font size in pixels. What is not UTF-8 counts as U+FFFD; the same in text_outline.
double text_width(std::string_view text, double size, bool bold);

/// Outline of a line of text whose baseline starts at (0, 0).
std::vector<OutlinePart> text_outline(std::string_view text, double size, bool bold);

}  // namespace moe::draw
