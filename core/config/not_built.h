// The one list of keys whose feature is not built yet. A feature that gets built takes its lines out of it; at the end it is empty.
#pragma once
#include "core/config/config.h"

#include <string>
#include <vector>

namespace moe {

/// A key that is accepted but refused when a model or a run is built.
struct NotBuilt {
    std::string path;                      ///< a key, or a section: all keys in it
    std::vector<std::string> values;       ///< refused values as JSON; empty: all but the default
};

const std::vector<NotBuilt>& not_built();

}  // namespace moe
