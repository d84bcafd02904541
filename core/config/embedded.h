// The files of configs/ as the build put them into the binary.
#pragma once
#include <string>
#include <vector>

namespace moe {

struct EmbeddedFile {
    const char* name;   ///< ready name, e.g. "tiny"
    const char* text;   ///< JSON
};

/// Defined in a source file that cmake/MoeEmbed.cmake writes.
const std::vector<EmbeddedFile>& embedded_files();

}  // namespace moe
