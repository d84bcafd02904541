// Models in the folders of Hugging Face: config.json to our configuration, stored tensors under our parameters' names.
#pragma once
#include "core/config/config.h"
#include "core/store/safetensors.h"

#include <string>
#include <vector>

namespace moe::store {

/// A configuration whose `model` section is the folder's, everything else default.
struct HfConfig {
    Config config;
    std::string model_type;           ///< deepseek_v3 or deepseek_v2
    std::string dtype;                ///< of the stored weights as config.json says, "" where it does not
    int64_t num_nextn_predict_layers = 0;   ///< MTP layers in the files; the configuration does not ask for them
    std::vector<std::string> notes;   ///< what has no counterpart here, a sentence each
};

/// Reads config.json of deepseek_v3 and deepseek_v2, with the settings of rope under `rope_theta` and `rope_scaling` or under
/// `rope_parameters`. Throws moe::Error (io, data) for what cannot be read, (config) for a missing key and for a setting that
/// would change the result and is not built: biases, FP8 files, other activations, scores or rope types.
HfConfig config_from_hf(const std::string& folder);

/// All tensors of a folder under the names of logical parameters, one matrix an expert
/// (model.layers.1.mlp.experts.3.gate_proj.weight), sorted by name. Experts stored stacked (mlp.experts.gate_up_proj [E, 2F, D],
/// gate above up, and mlp.experts.down_proj [E, D, F]) become views of their parts. Tables of rotary frequencies, which follow
/// from the configuration, are left out, and with num_layers ≥ 0 the layers from num_layers on (MTP). Nothing is copied or read
/// before it is used. Throws as SafetensorsFolder, and (data) for stacked tensors of another shape.
NamedTensors hf_tensors(const std::string& folder, int64_t num_layers = -1);

}  // namespace moe::store
