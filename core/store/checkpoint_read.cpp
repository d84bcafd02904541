#include "core/base/crc32c.h"
#include "core/base/error.h"
#include "core/base/json.h"
#include "core/base/suggest.h"
#include "core/store/checkpoint.h"
#include "core/store/checkpoint_index.h"
#include "core/store/safetensors.h"
#include "core/tensor/check.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>
#include <tuple>

namespace fs = std::filesystem;

namespace moe::store {
namespace {
/// The head of an index, none where it is not one of ours: its first line is tried before the whole file is read.
std::optional<IndexHead> head_of(const std::string& path) {
    std::ifstream in(path);
    std::string line;
    if (!std::getline(in, line)) return {};
    if (line.ends_with(',')) line.back() = '}';
    auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    try {
        return read_index_head(json.is_object() ? json : read_json(path), path);
    } catch (const Error&) {
        return {};                                     // listings pass over what opening it would explain
    }
}

/// ".name.old" → "name": a checkpoint that was set aside while another took its place.
std::string name_set_aside(const std::string& file) {
    bool is_aside = file.size() > 5 && file.starts_with('.') && file.ends_with(".old");
    return is_aside ? file.substr(1, file.size() - 5) : "";
}

[[noreturn]] void throw_not_complete(const fs::path& folder) {
    std::string hint = "a save that did not end leaves no checkpoint";
    if (fs::is_directory(folder / "checkpoints")) hint = "this is a run's folder: its checkpoints are in " + (folder / "checkpoints").string();
    else if (auto last = last_checkpoint(folder.string())) hint = "it holds checkpoints, the newest is " + last->path;
    else if (auto beside = last_checkpoint(folder.parent_path().string())) hint = "the newest complete one beside it is " + beside->path;
    MOE_THROW(data, "checkpoint", fmt::format("{}: not complete ({})", folder.string(), fs::exists(folder / kCheckpointIndex) ? "its save was cut off" : "it has no index.json"), "a complete checkpoint", hint);
}

/// A view of a rectangle of t.
at::Tensor part(at::Tensor t, const std::vector<int64_t>& offset, const std::vector<int64_t>& shape) {
    for (size_t d = 0; d < offset.size(); ++d) t = t.narrow(int64_t(d), offset[d], shape[d]);
    return t;
}
}  // namespace

std::string checkpoint_name(int64_t step) { return fmt::format("step_{}", step); }

bool is_periodic_name(const std::string& name) {
    return name.size() > 5 && name.starts_with("step_") && std::all_of(name.begin() + 5, name.end(), [](char c) { return c >= '0' && c <= '9'; });
}

std::vector<SavedState> complete_checkpoints(const std::string& folder) {
    std::vector<SavedState> list;
    std::error_code error;
    fs::directory_iterator it(folder, error), end;
    if (error == std::errc::no_such_file_or_directory) return list;
    for (; !error && it != end; it.increment(error)) {
        std::string file = it->path().filename().string(), name = file.starts_with('.') ? name_set_aside(file) : file;
        if (name.empty() || (name != file && fs::exists(fs::path(folder) / name))) continue;
        if (auto head = head_of((it->path() / kCheckpointIndex).string())) list.push_back({it->path().string(), name, head->step, head->attempt});
    }
    MOE_CHECK(!error, io, "checkpoints", fmt::format("{}: {}", folder, error.message()), "a folder that can be read", "check the path and its permissions");
    std::sort(list.begin(), list.end(), [](const auto& a, const auto& b) { return std::tie(a.attempt, a.step, a.name) < std::tie(b.attempt, b.step, b.name); });
    return list;
}

std::optional<SavedState> last_checkpoint(const std::string& folder) {
    auto list = complete_checkpoints(folder);
    if (list.empty()) return {};
    return list.back();
}

struct Checkpoint::State {
    fs::path folder;
    CheckpointIndex index;
    std::map<std::string, std::unique_ptr<SafetensorsFile>> files;
    std::set<const StoredPiece*> verified;

    const StoredTensor& tensor(const std::string& name) const;
    const SafetensorsFile& file(const std::string& name);
    at::Tensor piece(const std::string& name, const StoredTensor& tensor, const StoredPiece& piece);
};

const StoredTensor& Checkpoint::State::tensor(const std::string& name) const {
    auto found = index.tensors.find(name);
    if (found != index.tensors.end()) return found->second;
    std::vector<std::string> names;
    for (const auto& [known, t] : index.tensors) names.push_back(known);
    MOE_THROW(data, "checkpoint", fmt::format("no tensor \"{}\" in {}", name, folder.string()), fmt::format("one of its {} names", names.size()), did_you_mean(name, names));
}

const SafetensorsFile& Checkpoint::State::file(const std::string& name) {
    auto& file = files[name];
    if (!file) file = std::make_unique<SafetensorsFile>((folder / name).string());
    return *file;
}

/// The stored rectangle, a view of the mapped file; checked once.
at::Tensor Checkpoint::State::piece(const std::string& name, const StoredTensor& tensor, const StoredPiece& piece) {
    const SafetensorsFile& source = file(piece.file);
    auto check = [&](bool good, const std::string& got, const std::string& want) {
        MOE_CHECK(good, data, "checkpoint", fmt::format("{}: {}: {}", source.path(), name, got), want, "the file is corrupt: resume from another checkpoint");
    };
    check(source.contains(piece.key), fmt::format("no tensor \"{}\"", piece.key), "what the index names");
    const TensorInfo& info = source.info(piece.key);
    check(info.dtype == tensor.dtype && info.shape == piece.shape, fmt::format("{} {}", dtype_text(info.dtype), shape_text(info.shape)), fmt::format("{} {}", dtype_text(tensor.dtype), shape_text(piece.shape)));
    at::Tensor t = source.get(piece.key);
    if (verified.contains(&piece)) return t;
    uint32_t crc = crc32c(t.const_data_ptr(), t.nbytes());
    check(crc == piece.crc32c, fmt::format("corrupt bytes (CRC-32C {:08x})", crc), fmt::format("{:08x}", piece.crc32c));
    verified.insert(&piece);
    return t;
}

Checkpoint::Checkpoint(const std::string& path) : state_(std::make_shared<State>()) {
    fs::path folder = fs::path(path).lexically_normal();
    if (!folder.has_filename()) folder = folder.parent_path();             // "step_3/"
    std::error_code error;
    auto status = fs::status(folder, error);
    MOE_CHECK(fs::exists(status), io, "checkpoint", fmt::format("{}: {}", path, error ? error.message() : "No such file or directory"), "the folder of a checkpoint", "check the path");
    MOE_CHECK(fs::is_directory(status), io, "checkpoint", fmt::format("{}: a file", path), "the folder of a checkpoint", "name the folder, not a file in it");
    bool is_partial = folder.filename().string().starts_with('.') && folder.extension() == ".partial";
    if (is_partial || !fs::exists(folder / kCheckpointIndex)) throw_not_complete(folder);
    state_->folder = folder;
    state_->index = read_index((folder / kCheckpointIndex).string());
    for (const auto& [file, bytes] : state_->index.file_bytes) {
        auto size = fs::file_size(folder / file, error);
        MOE_CHECK(!error, data, "checkpoint", fmt::format("{}: {}", (folder / file).string(), error.message()), "a file that the index names", "the checkpoint was copied or deleted in part: use another one");
        MOE_CHECK(int64_t(size) == bytes, data, "checkpoint", fmt::format("{}: {} bytes", (folder / file).string(), size), fmt::format("{} bytes", bytes),
                  "the file is truncated or was changed: use another checkpoint");
    }
}

const std::string& Checkpoint::path() const { return state_->folder.native(); }
int64_t Checkpoint::step() const { return state_->index.step; }
int64_t Checkpoint::attempt() const { return state_->index.attempt; }
const nlohmann::json& Checkpoint::meta() const { return state_->index.meta; }
bool Checkpoint::contains(const std::string& name) const { return state_->index.tensors.contains(name); }
std::vector<int64_t> Checkpoint::shape(const std::string& name) const { return state_->tensor(name).shape; }
at::ScalarType Checkpoint::dtype(const std::string& name) const { return state_->tensor(name).dtype; }

std::vector<std::string> Checkpoint::names() const {
    std::vector<std::string> names;
    for (const auto& [name, tensor] : state_->index.tensors) names.push_back(name);
    return names;
}

at::Tensor Checkpoint::read(const std::string& name) const { return read(name, std::vector<int64_t>(shape(name).size(), 0), shape(name)); }

at::Tensor Checkpoint::read(const std::string& name, const std::vector<int64_t>& offset, const std::vector<int64_t>& shape) const {
    const StoredTensor& tensor = state_->tensor(name);
    bool inside = offset.size() == tensor.shape.size() && shape.size() == tensor.shape.size();
    for (size_t d = 0; inside && d < shape.size(); ++d) inside = offset[d] >= 0 && shape[d] >= 0 && offset[d] <= tensor.shape[d] && shape[d] <= tensor.shape[d] - offset[d];
    MOE_CHECK(inside, shape, "checkpoint", fmt::format("{} at {} of {}", shape_text(shape), shape_text(offset), name), fmt::format("a rectangle inside of {}", shape_text(tensor.shape)), "");
    at::Tensor out = at::empty(shape, tensor.dtype);
    std::vector<int64_t> begin, size;
    for (const auto& p : tensor.pieces) {
        if (!intersect(p.offset, p.shape, offset, shape, begin, size)) continue;
        std::vector<int64_t> from = begin, to = begin;
        for (size_t d = 0; d < begin.size(); ++d) from[d] -= p.offset[d], to[d] -= offset[d];
        part(out, to, size).copy_(part(state_->piece(name, tensor, p), from, size));
    }
    return out;
}

void Checkpoint::verify() const {
    for (const auto& [name, tensor] : state_->index.tensors)
        for (const auto& p : tensor.pieces) state_->piece(name, tensor, p);
}

}  // namespace moe::store
