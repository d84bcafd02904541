// Saved states of a run. A checkpoint is a folder with rank_K.safetensors, one a writing rank, and index.json, which says what is
// where: names, dtypes, global shapes, rectangles with file and CRC-32C, and whatever `meta` the run adds. A folder without
// index.json is not a checkpoint. Nothing here knows what the tensors mean or which rank wants which part of them.
#pragma once
#include <ATen/core/Tensor.h>
#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace moe::store {

/// A rectangle of a logical tensor: `data` (any device and stride; its sizes are the rectangle's) lies at `offset` in a tensor of
/// `global_shape`. offset and data have as many dims as global_shape. Where `read` is set, it gives the numbers when they are copied, of the sizes and dtype of data (which may
/// be a tensor without storage): only one such piece exists at a time.
struct Piece {
    std::string name;
    std::vector<int64_t> global_shape, offset;
    at::Tensor data;
    std::function<at::Tensor()> read = {};
    at::Tensor tensor() const { return read ? read() : data; }
};

/// A checkpoint of a folder of them.
struct SavedState {
    std::string path, name;               ///< name: the folder's, e.g. "step_20"
    int64_t step = 0, attempt = 0;        ///< attempt: how often its run had been resumed
};

/// "step_20".
std::string checkpoint_name(int64_t step);
/// True for "step_" and digits.
bool is_periodic_name(const std::string& name);
/// The complete checkpoints in a folder, oldest first: by attempt, then step. A folder that is missing gives none; what is
/// half-written or of another program is passed over. Throws moe::Error (io) where the folder cannot be read.
std::vector<SavedState> complete_checkpoints(const std::string& folder);
/// The newest of them.
std::optional<SavedState> last_checkpoint(const std::string& folder);

/// A complete checkpoint, for reading. Copies share it; files are mapped when first used, so that reading needs the memory of what
/// it returns. Not thread safe.
class Checkpoint {
public:
    /// Reads and checks the index. Throws moe::Error: (io) no such folder or an unreadable file; (data) not complete (no index.json),
    /// of another program or of an unknown version, an index that contradicts itself, pieces that do not cover their tensor, a file
    /// that is missing or of another size than the index says.
    explicit Checkpoint(const std::string& folder);
    const std::string& path() const;
    int64_t step() const;
    int64_t attempt() const;
    /// What the run added.
    const nlohmann::json& meta() const;
    /// Sorted.
    std::vector<std::string> names() const;
    bool contains(const std::string& name) const;
    /// Throw moe::Error (data) for an unknown name, with the nearest.
    std::vector<int64_t> shape(const std::string& name) const;
    at::ScalarType dtype(const std::string& name) const;
    /// The rectangle [offset, offset + shape) of a tensor, put together from the stored pieces: a new tensor on the host, of the
    /// stored dtype. The checksum of each piece is compared when it is first touched. Throws moe::Error (data) for a corrupt piece,
    /// with tensor and file, and for an unknown name; (shape) for a rectangle that is not inside.
    at::Tensor read(const std::string& name, const std::vector<int64_t>& offset, const std::vector<int64_t>& shape) const;
    at::Tensor read(const std::string& name) const;
    /// Reads every piece and compares its checksum. Throws as read().
    void verify() const;

private:
    struct State;
    std::shared_ptr<State> state_;
};

/// How a run saves. All ranks of a job have the same but for `rank`.
struct CheckpointWriterOptions {
    std::string folder;                   ///< of the periodic ones, made when the first is written; "" for none of those
    int rank = 0, world_size = 1;
    int64_t keep_last = 3;                ///< periodic ones that stay; at least 1
    int64_t attempt = 0;                  ///< how often the run had been resumed
    std::string id;                       ///< the same on all ranks, another in every attempt: tells files of a dead attempt apart
    double timeout_secs = 600;            ///< how long rank 0 waits for the others' files
    std::function<void(const std::string& stage)> on_stage;   ///< for tests: called in the writing thread before each stage
};

/// Writes checkpoints, one at a time, in a thread of its own. Ranks share the file system and nothing else: the thread of rank 0
/// waits for the others' files, writes index.json and makes the folder visible with one rename. A process that dies at any moment
/// leaves all complete checkpoints whole.
class CheckpointWriter {
public:
    /// Rank 0 clears away what dead runs left half done. Throws moe::Error (io, usage).
    explicit CheckpointWriter(CheckpointWriterOptions options);
    /// Waits; a failure that nobody asked for is logged.
    ~CheckpointWriter();
    CheckpointWriter(const CheckpointWriter&) = delete;
    CheckpointWriter& operator=(const CheckpointWriter&) = delete;

    /// Copies the tensors to the host (one copy, into memory that is used again) and returns; writing goes on in the background.
    /// All ranks call it, each with its own pieces; together they must cover every tensor once. `meta` is rank 0's. `path` is the
    /// folder to write, "" for <folder>/step_N; a checkpoint that is there is replaced, never leaving none. Waits for the save
    /// before, and throws its error. Throws moe::Error (usage) for a name twice in the same place or a path that is something else
    /// than a checkpoint, (shape), (dtype), (memory).
    void begin(int64_t step, const std::vector<Piece>& pieces, const nlohmann::json& meta, const std::string& path = "");
    /// begin() in two parts: what may fail on one rank, after which there is nothing to wait for, and the writing, once all ranks are so far.
    void prepare(int64_t step, const std::vector<Piece>& pieces, const nlohmann::json& meta, const std::string& path = "");
    void start();
    /// Until the last save is done. On ranks other than 0: until this rank's file is written. Throws its moe::Error (io, data,
    /// state) once; the partial folder is removed then and older checkpoints are whole.
    void wait();
    /// True while the thread writes.
    bool is_writing() const;
    /// True where wait() would throw, at once.
    bool has_failed() const;

private:
    struct Job;
    void snapshot(Job& job, const std::vector<Piece>& pieces);

    CheckpointWriterOptions options_;
    at::Tensor buffer_;                   ///< uint8 on the host, as large as the largest snapshot so far
    int64_t num_saves_ = 0;
    std::unique_ptr<Job> job_, prepared_;
};

}  // namespace moe::store
