// Safetensors files and Hugging Face folders.
#include "core/base/log.h"
#include "core/base/suggest.h"
#include "core/store/huggingface.h"
#include "core/tensor/check.h"
#include "lua/bind/bind.h"
#include "lua/bind/model.h"
#include "lua/bind/ranks.h"
#include "lua/bind/tensor.h"

#include <set>

namespace moe::lua {
namespace {
constexpr size_t kMaxListed = 8;

int load_safetensors(lua_State* L) {
    store::SafetensorsFolder folder(check_string(L, 1, "path"));
    auto names = folder.names();
    push_ordered_table(L, names);
    for (auto& name : names) {
        push_tensor(L, folder.get(name));
        lua_setfield(L, -2, name.c_str());
    }
    return 1;
}

int save_safetensors(lua_State* L) {
    std::string path = check_string(L, 1, "path");
    check_table(L, 2, "tensors");
    store::NamedTensors tensors;
    for (auto& name : ordered_keys(L, 2)) {
        lua_getfield(L, 2, name.c_str());
        tensors.emplace_back(name, check_tensor(L, -1, ("tensors." + name).c_str()));
        lua_pop(L, 1);
    }
    lua_pushnil(L);
    while (lua_next(L, 2)) {
        lua_pop(L, 1);
        if (lua_type(L, -1) != LUA_TSTRING) bad_argument(L, -1, "key of tensors", "a name");
    }
    std::map<std::string, std::string> metadata;
    if (!lua_isnoneornil(L, 3)) {
        check_table(L, 3, "metadata");
        for (auto& key : ordered_keys(L, 3)) {
            lua_getfield(L, 3, key.c_str());
            metadata[key] = check_string(L, -1, ("metadata." + key).c_str());
            lua_pop(L, 1);
        }
    }
    store::save_safetensors(path, tensors, metadata);
    return 0;
}

std::string listed(const std::vector<std::string>& names) {
    std::string text;
    for (size_t i = 0; i < names.size() && i < kMaxListed; ++i) text += (i ? ", " : "") + names[i];
    if (names.size() > kMaxListed) text += fmt::format(" and {} more", names.size() - kMaxListed);
    return text;
}

/// Copies a folder's tensors into the model; what is missing and what is left over are one error.
void fill(Model& m, const std::string& path, store::NamedTensors tensors) {
    std::map<std::string, at::Tensor> biases;
    for (int64_t layer : m.routed_layers()) {
        if (at::Tensor b = m.bias(layer); b.defined()) biases[Model::bias_name(layer)] = b;
    }
    std::vector<std::string> unexpected, missing;
    std::set<std::string> seen;
    for (auto& [name, tensor] : tensors) {
        seen.insert(name);
        if (auto bias = biases.find(name); bias != biases.end()) {
            check_shape("moe.load_hf", {name, tensor}, {bias->second.size(0)});
            bias->second.copy_(tensor);
        } else if (m.store().has(name)) {
            m.store().set(name, tensor);
        } else {
            unexpected.push_back(name);
        }
        tensor = at::Tensor();    // its pages can go
    }
    for (auto& name : m.store().names()) {
        if (!seen.contains(name)) missing.push_back(name);
    }
    for (auto& [name, bias] : biases) {
        if (!seen.contains(name)) missing.push_back(name);
    }
    if (missing.empty() && unexpected.empty()) return;
    std::string got;
    if (!missing.empty()) got += fmt::format("{} missing ({})", missing.size(), listed(missing));
    if (!unexpected.empty()) got += fmt::format("{}{} not expected ({})", got.empty() ? "" : "; ", unexpected.size(), listed(unexpected));
    MOE_THROW(data, "moe.load_hf: " + path, "tensors: " + got, "exactly the tensors that config.json describes", "");
}

int load_hf(lua_State* L) {
    std::string path = check_string(L, 1, "folder");
    Options o(L, 2, {"dtype", "training"});
    store::HfConfig hf = store::config_from_hf(path);
    for (auto& note : hf.notes) log::warn("moe.load_hf: " + note);
    std::string dtype = o.string("dtype", hf.dtype == "bfloat16" ? "bf16" : "fp32");
    auto model = build_model(L, hf.config, dtype, o.boolean("training", true));
    fill(*model, path, store::hf_tensors(path, hf.config.model.num_layers));
    push<ModelValue>(L, {model});
    return 1;
}

const Binding kFunctions[] = {
    {"load_safetensors", load_safetensors, "moe.load_safetensors(path): name → tensor of a file, or of a folder of them. Tensors share the file's pages; writing to them never changes the file.\n"
     "Example: local path = os.tmpname(); moe.save_safetensors(path, { a = moe.ones { 2 } }); print(moe.load_safetensors(path).a); os.remove(path)"},
    {"save_safetensors", save_safetensors, "moe.save_safetensors(path, tensors, metadata): writes name → tensor as one file, at once: a reader never sees half of it. metadata: texts by name."},
    {"load_hf", on_all_ranks<load_hf>,
     "moe.load_hf(folder, {dtype = \"fp32\" | \"fp64\" | \"bf16\", training = true}): a model of a Hugging Face folder (deepseek_v3, deepseek_v2). dtype defaults to that of the files. Missing and unexpected tensors are one error."},
};
}  // namespace

void open_store(lua_State* L) { set_functions(L, "moe.", kFunctions); }
}  // namespace moe::lua
