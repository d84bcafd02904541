// The domains that a configuration names, opened.
#pragma once
#include "core/config/config.h"
#include "core/data/domain.h"

#include <memory>
#include <vector>

namespace moe::data {

/// Domains and their weights in the mixture, which are not normalised.
struct Sources {
    std::vector<std::unique_ptr<Domain>> domains;
    std::vector<double> weights;
};

/// Opens the sources of `config.data` or, with `validation`, of `config.validation`. Throws moe::Error (data, io, config).
Sources open_sources(const Config& config, bool validation);

}  // namespace moe::data
