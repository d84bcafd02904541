// Files of the repository that the build put into the binary (cmake/MoeEmbed.cmake).
#pragma once
#include <string_view>
#include <vector>

namespace moe {

struct EmbeddedFile {
    std::string_view path;   ///< below the folder they were taken from, "models/moonlight_16b.json"
    std::string_view text;
};

}  // namespace moe
