#include "core/base/error.h"
#include "core/draw/canvas.h"
#include "core/draw/font.h"
#include "tests/catch.h"

#include <cmath>

using namespace moe;
using namespace moe::draw;

namespace {
std::vector<int> pixel(const Pixels& p, int x, int y) {
    auto* rgb = &p.rgb[size_t(y * p.width + x) * 3];
    return {rgb[0], rgb[1], rgb[2]};
}
const std::vector<int> kWhite = {255, 255, 255}, kBlue = {0, 114, 178}, kRed = {255, 0, 0};
const Colour blue = Colour::named("#0072b2"), red{255, 0, 0};
}  // namespace

TEST_CASE("canvas: shapes are where they should be after a PNG was written and read", "[draw]") {
    Canvas canvas(40, 20, 2);
    canvas.rect({2, 2, 10, 6}, blue);
    canvas.circle({30, 10}, 5, red);
    Point line[] = {{2, 15}, {20, 15}};
    canvas.stroke(line, 2, blue);
    Pixels p = decode_png(canvas.png());
    REQUIRE((p.width == 80 && p.height == 40));
    REQUIRE(p.rgb == canvas.rgb());
    REQUIRE(pixel(p, 4, 4) == kBlue);
    REQUIRE(pixel(p, 23, 15) == kBlue);
    REQUIRE(pixel(p, 24, 16) == kWhite);
    REQUIRE(pixel(p, 3, 3) == kWhite);
    REQUIRE(pixel(p, 60, 20) == kRed);
    REQUIRE(pixel(p, 60, 31) == kWhite);
    REQUIRE(pixel(p, 20, 29) == kBlue);
    REQUIRE(pixel(p, 20, 27) == kWhite);
}

TEST_CASE("canvas: an edge between pixels is half of each colour", "[draw]") {
    Canvas canvas(4, 4);
    canvas.rect({1, 0, 1.5, 4}, {0, 0, 0});
    REQUIRE(std::abs(canvas.rgb()[2 * 3] - 128) <= 2);
    canvas.rect({0, 0, 1, 4}, Colour{0, 0, 0}.faded(0.25));
    REQUIRE(std::abs(canvas.rgb()[0] - 191) <= 2);
}

TEST_CASE("canvas: cells fill their box, what is clipped stays white", "[draw]") {
    Canvas canvas(12, 8);
    uint8_t two[] = {255, 0, 0, 0, 114, 178};
    canvas.cells({2, 2, 8, 4}, 1, 2, two);
    Pixels p = decode_png(canvas.png());
    REQUIRE((pixel(p, 2, 2) == kRed && pixel(p, 5, 5) == kRed && pixel(p, 6, 2) == kBlue && pixel(p, 9, 5) == kBlue));
    REQUIRE((pixel(p, 1, 2) == kWhite && pixel(p, 10, 2) == kWhite && pixel(p, 2, 6) == kWhite));
    REQUIRE_THROWS_AS(canvas.cells({0, 0, 4, 4}, 2, 2, two), Error);
    Box box{0, 0, 2, 8};
    canvas.clip(&box);
    canvas.rect({0, 0, 12, 8}, blue);
    p = decode_png(canvas.png());
    REQUIRE((pixel(p, 1, 7) == kBlue && pixel(p, 2, 7) == kWhite));
}

TEST_CASE("canvas: text leaves ink inside of its width, also turned", "[draw]") {
    auto ink = [](Anchor anchor, double turn) {
        Canvas canvas(100, 100);
        canvas.text({50, 50}, "Hx", 20, {}, anchor, false, turn);
        int left = 100, right = -1, top = 100, bottom = -1;
        for (int y = 0; y < 100; ++y)
            for (int x = 0; x < 100; ++x)
                if (canvas.rgb()[size_t(y * 100 + x) * 3] < 128) left = std::min(left, x), right = std::max(right, x), top = std::min(top, y), bottom = std::max(bottom, y);
        return std::vector<int>{left, right, top, bottom};
    };
    double width = text_width("Hx", 20, false);
    REQUIRE((width > 20 && width < 32));
    auto start = ink(Anchor::start, 0), end = ink(Anchor::end, 0), turned = ink(Anchor::start, 90);
    REQUIRE((start[0] >= 50 && start[1] <= 50 + width && start[3] < 50 && start[2] >= 32));
    REQUIRE((end[0] >= 50 - width && end[1] <= 50));
    REQUIRE((turned[2] >= 50 && turned[3] <= 50 + width && turned[0] >= 50));
}

TEST_CASE("font: widths add up but for kerning, odd bytes have a width and do no harm", "[draw]") {
    REQUIRE(text_width("", 12, false) == 0);
    REQUIRE(std::abs(text_width("0000", 12, false) - 4 * text_width("0", 12, false)) < 1e-4);
    REQUIRE(text_width("a", 12, true) > text_width("a", 12, false));
    REQUIRE(text_width("é", 12, false) == text_width("e", 12, false));
    REQUIRE(std::abs(text_width("\xff\xc3", 12, false) - 2 * text_width("\xef\xbf\xbd", 12, false)) < 1e-4);
    REQUIRE(!text_outline("\xff", 12, false).empty());
}

TEST_CASE("canvas: wrong colours, sizes and files are errors, coordinates without bounds are not", "[draw]") {
    REQUIRE_THROWS_AS(Colour::named("blue"), Error);
    REQUIRE_THROWS_AS(Colour::named("#12345g"), Error);
    REQUIRE(Colour::named("#0102ff80").a == 128);
    REQUIRE_THROWS_AS(Canvas(0, 10), Error);
    REQUIRE_THROWS_AS(Canvas(1e9, 10), Error);
    REQUIRE_THROWS_AS(Canvas(std::nan(""), 10), Error);
    REQUIRE_THROWS_AS(decode_png("no picture"), Error);
    Canvas canvas(10, 10);
    Point far[] = {{-1e300, 5}, {1e300, 5}, {std::nan(""), INFINITY}};
    canvas.stroke(far, 1, red);
    canvas.circle({1e30, -1e30}, 3, red);
    REQUIRE(canvas.rgb()[size_t(5 * 10 + 5) * 3] > 100);
}
