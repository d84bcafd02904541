#include "core/train/checkpointing.h"

#include "core/base/error.h"
#include "core/base/problem.h"
#include "core/store/huggingface.h"
#include "core/tensor/check.h"
#include "core/train/agree.h"
#include "core/train/resume.h"

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <map>

namespace moe::train {
namespace {
constexpr const char* kOptimizer = "optimizer/";
// Names in one message.
constexpr size_t kMaxProblems = 20;

/// Stored tensors by logical name, of a checkpoint or of another program's files.
struct TensorSource {
    std::string path;
    std::map<std::string, std::vector<int64_t>> shapes;
    std::function<Tensor(const std::string& name, const std::vector<int64_t>& offset, const std::vector<int64_t>& shape)> read;
};

/// A place of this rank's state that a stored rectangle fills.
struct Target {
    std::string name;
    std::vector<int64_t> global_shape, offset;
    Master data;
};

std::string optimizer_name(size_t i, const std::string& name) { return fmt::format("{}{}/{}", kOptimizer, i, name); }

std::vector<Target> targets_of(Model& model, bool once, bool with_optimizer) {
    std::vector<Target> list;
    for (const OwnedPiece& p : model.store().owned(once)) {
        list.push_back({p.rectangle.name, p.global_shape, p.rectangle.offset, p.master});
        for (size_t i = 0; with_optimizer && i < p.state.size(); ++i) list.push_back({optimizer_name(i, p.rectangle.name), p.global_shape, p.rectangle.offset, {p.state[i], {}}});
    }
    if (once && model.mesh().stage.rank() != 0) return list;             // biases are the same on all ranks of a stage
    for (int64_t layer : model.routed_layers())
        if (Tensor bias = model.bias(layer); bias.defined()) list.push_back({Model::bias_name(layer), bias.sizes().vec(), {0}, {bias, {}}});
    return list;
}

/// What is missing, of another shape, or left over by all ranks together.
void check_names(const TensorSource& source, const std::vector<Target>& targets, const dist::Group& world) {
    std::vector<Problem> problems;
    std::map<std::string, bool> used;
    for (const Target& t : targets) {
        if (!used.emplace(t.name, true).second) continue;
        auto found = source.shapes.find(t.name);
        if (found == source.shapes.end()) problems.push_back({t.name, "nothing", shape_text(t.global_shape), ""});
        else if (found->second != t.global_shape) problems.push_back({t.name, shape_text(found->second), shape_text(t.global_shape), ""});
    }
    Tensor taken = at::zeros({int64_t(source.shapes.size())}, at::kLong);
    int64_t i = 0;
    for (const auto& [name, shape] : source.shapes) taken[i++] = used.contains(name) ? 1 : 0;
    if (taken.numel() > 0) world.all_reduce(taken, dist::ReduceOp::max);
    i = 0;
    for (const auto& [name, shape] : source.shapes)
        if (taken[i++].item<int64_t>() == 0) problems.push_back({name, shape_text(shape), "nothing: the model has no such tensor", ""});
    if (size_t all = problems.size(); all > kMaxProblems) {
        problems.resize(kMaxProblems);
        problems.push_back({"…", fmt::format("{} more", all - kMaxProblems), "", ""});
    }
    agree(world, [&] { throw_problems(ErrorKind::data, fmt::format("{}: tensors that do not fit the model", source.path), problems); });
}

void fill_model(Model& model, const TensorSource& source, bool with_optimizer) {
    const auto& world = model.mesh().world;
    auto targets = targets_of(model, /*once=*/false, with_optimizer);
    check_names(source, targets, world);
    agree(world, [&] {
        for (Target& t : targets) t.data.write(source.read(t.name, t.offset, t.data.data.sizes().vec()));
    });
    model.store().gather_values();
}

TensorSource source_of(const store::Checkpoint& checkpoint, bool with_optimizer) {
    TensorSource source{checkpoint.path(), {}, [&checkpoint](const auto& name, const auto& offset, const auto& shape) { return checkpoint.read(name, offset, shape); }};
    for (const auto& name : checkpoint.names())
        if (with_optimizer || !name.starts_with(kOptimizer)) source.shapes[name] = checkpoint.shape(name);
    return source;
}

TensorSource source_of(const std::string& path, const store::NamedTensors& list) {
    std::map<std::string, Tensor> tensors(list.begin(), list.end());
    TensorSource source{path, {}, {}};
    for (const auto& [name, tensor] : tensors) source.shapes[name] = tensor.sizes().vec();
    source.read = [tensors](const auto& name, const auto& offset, const auto& shape) {
        Tensor t = tensors.at(name);
        for (size_t d = 0; d < shape.size(); ++d) t = t.narrow(int64_t(d), offset[d], shape[d]);
        return t;
    };
    return source;
}
}  // namespace

std::vector<store::Piece> pieces_of(Model& model) {
    std::vector<store::Piece> pieces;
    for (Target& t : targets_of(model, /*once=*/true, /*with_optimizer=*/true)) {
        store::Piece piece{t.name, t.global_shape, t.offset, t.data.data, {}};
        if (t.data.is_split()) {
            piece.data = at::empty(t.data.data.sizes(), at::TensorOptions().dtype(t.data.dtype()).device(at::kMeta));
            piece.read = [master = t.data] { return master.read(); };
        }
        pieces.push_back(std::move(piece));
    }
    return pieces;
}

void load_state(Model& model, const store::Checkpoint& checkpoint) { fill_model(model, source_of(checkpoint, true), true); }

void load_weights(Model& model, const std::string& path) {
    const auto& world = model.mesh().world;
    std::unique_ptr<store::Checkpoint> checkpoint;
    TensorSource source;
    agree(world, [&] {
        namespace fs = std::filesystem;
        std::string found = find_checkpoint(path.find('/') == std::string::npos ? "./" + path : path, "", "");
        if (fs::exists(fs::path(found) / "index.json")) {
            checkpoint = std::make_unique<store::Checkpoint>(found);
            source = source_of(*checkpoint, false);
        } else {
            source = source_of(path, store::hf_tensors(path, model.config().training.use_mtp ? -1 : model.config().model.num_layers));
        }
    });
    fill_model(model, source, false);
}

Checkpointing::Checkpointing(const Config& config, const std::string& folder, int64_t attempt, const std::string& id, const dist::Group& world) : world_(world) {
    store::CheckpointWriterOptions options;
    options.folder = folder;
    options.rank = world.rank();
    options.world_size = world.size();
    options.keep_last = config.checkpointing.keep_last;
    options.attempt = attempt;
    options.id = id;
    options.timeout_secs = double(config.distributed.timeout_secs);
    agree(world_, [&] { writer_ = std::make_unique<store::CheckpointWriter>(options); });      // rank 0 clears away before anybody writes
}

void Checkpointing::begin(Model& model, int64_t step, const nlohmann::json& meta, const std::string& path) {
    finish();
    agree(world_, [&] { writer_->prepare(step, pieces_of(model), meta, path); });
    writer_->start();
}

void Checkpointing::finish() {
    agree(world_, [&] { writer_->wait(); });
}

}  // namespace moe::train
