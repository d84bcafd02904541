#include "core/draw/png.h"

#include "core/base/error.h"

#include <zlib.h>

#include <cstdlib>
#include <memory>

namespace {
/// zlib in stb's place: a third smaller than stb's own. The caller frees.
unsigned char* deflate_all(unsigned char* data, int size, int* out_size, int quality) {
    uLongf length = compressBound(uLong(size));
    auto* out = static_cast<unsigned char*>(std::malloc(length));
    if (!out || compress2(out, &length, data, uLong(size), quality) != Z_OK) return std::free(out), nullptr;
    *out_size = int(length);
    return out;
}
}  // namespace

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#define STB_IMAGE_WRITE_STATIC
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STBI_WRITE_NO_STDIO
#define STBIW_ZLIB_COMPRESS deflate_all
#include <stb_image_write.h>
#define STB_IMAGE_STATIC
#define STB_IMAGE_IMPLEMENTATION
#define STBI_NO_STDIO
#define STBI_ONLY_PNG
#include <stb_image.h>
#pragma GCC diagnostic pop

namespace moe::draw {

std::string encode_png(int width, int height, std::span<const uint8_t> rgb) {
    MOE_CHECK(width > 0 && height > 0 && rgb.size() == size_t(width) * size_t(height) * 3, shape, "encode_png", fmt::format("{} bytes for {} x {}", rgb.size(), width, height), "three a pixel", "");
    int size = 0;
    std::unique_ptr<unsigned char, void (*)(void*)> bytes(stbi_write_png_to_mem(rgb.data(), width * 3, width, height, 3, &size), std::free);
    MOE_CHECK(bytes, memory, "encode_png", fmt::format("{} x {}", width, height), "memory for it", "a smaller picture");
    return {reinterpret_cast<char*>(bytes.get()), size_t(size)};
}

Pixels decode_png(std::string_view bytes) {
    Pixels p;
    int channels = 0;
    std::unique_ptr<stbi_uc, void (*)(void*)> rgb(stbi_load_from_memory(reinterpret_cast<const stbi_uc*>(bytes.data()), int(bytes.size()), &p.width, &p.height, &channels, 3), std::free);
    MOE_CHECK(rgb, data, "decode_png", fmt::format("{} bytes: {}", bytes.size(), stbi_failure_reason()), "a PNG file", "");
    p.rgb.assign(rgb.get(), rgb.get() + size_t(p.width) * size_t(p.height) * 3);
    return p;
}

}  // namespace moe::draw
