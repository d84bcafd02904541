// PNG files in memory.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace moe::draw {

/// 8-bit RGB by rows, top first.
struct Pixels {
    int width = 0, height = 0;
    std::vector<uint8_t> rgb;   ///< width · height · 3
};

/// A PNG file's bytes. Throws moe::Error (shape) where rgb is not width · height · 3 long.
std::string encode_png(int width, int height, std::span<const uint8_t> rgb);

/// Pixels of a PNG file, alpha dropped. Throws moe::Error (data) for what is none.
Pixels decode_png(std::string_view bytes);

}  // namespace moe::draw
