#include "core/base/crc32c.h"
#include "core/base/error.h"
#include "core/base/json.h"
#include "core/base/log.h"
#include "core/base/units.h"
#include "core/store/checkpoint.h"
#include "core/store/checkpoint_index.h"
#include "core/store/safetensors.h"
#include "core/tensor/check.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <new>
#include <set>
#include <sys/statvfs.h>
#include <thread>
#include <unistd.h>

namespace fs = std::filesystem;

namespace moe::store {
namespace {
using Json = nlohmann::json;
constexpr const char* kFolderHint = "check the folder and its permissions";
// Of every tensor in the snapshot: any dtype may start there.
constexpr int64_t kSnapshotAlignment = 64;

[[noreturn]] void throw_io(const fs::path& path, const std::string& what) { MOE_THROW(io, "checkpoint", fmt::format("{}: {}", path.string(), what), "a folder that can be written", kFolderHint); }

/// A rename must survive a crash as well; file systems that cannot sync a folder are left alone.
void sync_folder(const fs::path& folder) {
    int descriptor = open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor < 0) return;
    fsync(descriptor);
    close(descriptor);
}

void rename_folder(const fs::path& from, const fs::path& to) {
    std::error_code error;
    fs::rename(from, to, error);
    if (error) throw_io(to, error.message());
}

void remove_folder(const fs::path& folder) {
    std::error_code error;
    fs::remove_all(folder, error);
    if (error) throw_io(folder, error.message());
}

fs::path hidden(const fs::path& target, const char* ending) { return target.parent_path() / ("." + target.filename().string() + ending); }

/// The new folder takes the place of the old one at once, or, where the file system cannot exchange two, after the old one has
/// stepped aside under a name that readers still find.
void put_in_place(const fs::path& partial, const fs::path& target) {
    if (!fs::exists(target)) return rename_folder(partial, target);
    if (renameat2(AT_FDCWD, partial.c_str(), AT_FDCWD, target.c_str(), RENAME_EXCHANGE) == 0) {
        sync_folder(target.parent_path());
        return remove_folder(partial);
    }
    fs::path aside = hidden(target, ".old");
    remove_folder(aside);
    rename_folder(target, aside);
    rename_folder(partial, target);
    sync_folder(target.parent_path());
    remove_folder(aside);
}

/// What dead runs left: half-written and half-deleted folders go, a checkpoint that had stepped aside comes back.
void clear_away(const fs::path& folder) {
    std::error_code error;
    std::vector<fs::path> left;
    for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) left.push_back(it->path());
    for (const auto& path : left) {
        std::string file = path.filename().string(), ending = path.extension().string();
        if (!file.starts_with('.') || path.stem() == file) continue;
        fs::path target = folder / path.stem().string().substr(1);
        if (ending == ".old" && !fs::exists(target)) rename_folder(path, target);
        else if (ending == ".old" || ending == ".partial" || ending == ".removed") remove_folder(path);
    }
}

/// Oldest periodic ones beyond keep_last. They are hidden first: a kill halfway leaves nothing that looks complete.
void prune(const fs::path& folder, int64_t keep_last) {
    std::vector<SavedState> periodic;
    for (auto& saved : complete_checkpoints(folder.string()))
        if (is_periodic_name(saved.name)) periodic.push_back(saved);
    for (size_t i = 0; int64_t(i) + keep_last < int64_t(periodic.size()); ++i) {
        fs::path gone = hidden(folder / periodic[i].name, ".removed");
        remove_folder(gone);
        rename_folder(periodic[i].path, gone);
        remove_folder(gone);
    }
}

/// Throws (usage) for a place that holds something else than a checkpoint: it would be deleted.
void check_replaceable(const fs::path& target, bool is_ours) {
    MOE_CHECK(!target.filename().empty() && !target.filename().string().starts_with('.'), usage, "checkpoint", target.string(), "the path of a folder", "");
    std::error_code error;
    if (is_ours || !fs::exists(target, error)) return;
    if (fs::is_directory(target, error) && fs::is_empty(target, error)) return;
    for (const auto& saved : complete_checkpoints(target.parent_path().string()))
        if (saved.name == target.filename()) return;
    MOE_THROW(usage, "checkpoint", fmt::format("{}: something else is there", target.string()), "a new folder, or a checkpoint to replace", "choose another name");
}

/// The error of a failed write; of a full disk with what it would need.
Error with_free_space(const Error& e, const fs::path& folder, int64_t needed) {
    ErrorParts parts = e.parts();
    if (parts.op.find('/') != std::string::npos) parts.got = parts.op + ": " + parts.got;        // of files other than tensors
    parts.op = "checkpoint";
    bool is_full = parts.got.find(std::strerror(ENOSPC)) != std::string::npos || parts.got.find(std::strerror(EDQUOT)) != std::string::npos;
    fs::path place = folder;
    while (place.has_relative_path() && !fs::exists(place)) place = place.parent_path();
    struct statvfs disk {};
    if (e.kind() == ErrorKind::io && is_full && statvfs(place.c_str(), &disk) == 0)
        parts.hint = fmt::format("{} are needed, {} are free there: free some space, lower checkpointing.keep_last or set checkpointing.dir; earlier checkpoints are whole", format_bytes(double(needed)),
                                 format_bytes(double(disk.f_bavail) * double(disk.f_frsize)));
    return Error(parts);
}

std::string file_of_rank(int rank, const char* ending) { return fmt::format("rank_{}.{}", rank, ending); }
}  // namespace

/// One save: what is to be written, and the thread that does it.
struct CheckpointWriter::Job {
    const CheckpointWriterOptions& options;
    int64_t step = 0, bytes = 0;
    std::string token;
    Json meta;
    fs::path target, partial;
    bool is_periodic = false;
    NamedTensors tensors;                                  ///< by key: views of the snapshot
    std::map<std::string, StoredTensor> pieces;            ///< of this rank
    std::atomic<bool> is_done = false;
    std::exception_ptr error;
    std::thread thread;

    explicit Job(const CheckpointWriterOptions& o) : options(o) {}
    void stage(const char* name) const {
        if (options.on_stage) options.on_stage(name);
    }
    std::string own_file() const { return file_of_rank(options.rank, "safetensors"); }
    void run();
    Json write_own();
    void fail_own(const std::string& message);
    void await_others();
    std::vector<Json> collect(const Json& own);
    std::optional<Json> report_of(int rank);
    void publish(const std::vector<Json>& parts);
};

/// This rank's file, and its part of the index.
Json CheckpointWriter::Job::write_own() {
    stage("folder");
    std::error_code code;
    fs::create_directories(partial, code);
    if (code) throw_io(partial, code.message());
    for (const char* ending : {"safetensors", "json", "failed"}) fs::remove(partial / file_of_rank(options.rank, ending), code);
    stage("tensors");
    std::map<std::string, uint32_t> crcs;
    for (const auto& [key, tensor] : tensors) crcs[key] = crc32c(tensor.const_data_ptr(), tensor.nbytes());
    for (auto& [name, tensor] : pieces)
        for (auto& p : tensor.pieces) p.crc32c = crcs.at(p.key);
    std::string path = (partial / own_file()).string();
    save_safetensors(path, tensors);
    stage("part");
    Json part = part_json(token, own_file(), int64_t(fs::file_size(path)), pieces);
    if (options.rank != 0) write_text((partial / file_of_rank(options.rank, "json")).string(), part.dump());
    return part;
}

/// Makes room and tells rank 0. A message that cannot be left either is what rank 0's time limit is for.
void CheckpointWriter::Job::fail_own(const std::string& message) {
    std::error_code code;
    fs::remove(partial / own_file(), code);
    if (options.rank == 0) return;
    try {
        write_text((partial / file_of_rank(options.rank, "failed")).string(), Json({{"token", token}, {"message", message}}).dump(-1, ' ', false, Json::error_handler_t::replace));
    } catch (const Error&) {
    }
}

/// What a rank left for this save: its part, or its failure; none yet.
std::optional<Json> CheckpointWriter::Job::report_of(int rank) {
    for (const char* ending : {"json", "failed"}) {
        fs::path path = partial / file_of_rank(rank, ending);
        if (!fs::exists(path)) continue;
        Json report = read_json(path.string());                // written with one rename: whole
        if (report.value("token", "") == token) return report;
    }
    return {};
}

/// The parts of all ranks, rank 0's first. Waits for them; throws what the first that failed said.
std::vector<Json> CheckpointWriter::Job::collect(const Json& own) {
    std::vector<Json> parts = {own};
    auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(options.timeout_secs);
    auto pause = std::chrono::milliseconds(2);
    std::string failure;
    for (int rank = 1; rank < options.world_size;) {
        if (auto report = report_of(rank)) {
            if (failure.empty() && report->contains("message")) failure = fmt::format("rank {}: {}", rank, report->at("message").get<std::string>());
            parts.push_back(std::move(*report));
            ++rank;
            continue;
        }
        MOE_CHECK(std::chrono::steady_clock::now() < end, io, "checkpoint", fmt::format("nothing from rank {} within {}", rank, format_secs(options.timeout_secs)), "its part of " + target.string(),
                  "all ranks must see the same folder, and distributed.timeout_secs must be enough to write a rank's part");
        std::this_thread::sleep_for(pause);
        pause = std::min(2 * pause, std::chrono::milliseconds(100));
    }
    MOE_CHECK(failure.empty(), io, "checkpoint", failure, "files of all ranks", "");
    return parts;
}

/// After a failure of rank 0, whose error is the one that counts: the folder goes when nobody writes to it any more.
void CheckpointWriter::Job::await_others() {
    if (options.rank != 0 || !fs::exists(partial)) return;
    try {
        collect({});
    } catch (const Error&) {
    }
}

/// Makes the folder complete and visible.
void CheckpointWriter::Job::publish(const std::vector<Json>& parts) {
    CheckpointIndex index;
    index.step = step;
    index.attempt = options.attempt;
    index.meta = meta;
    for (const auto& part : parts) add_part(index, part, target.string());
    for (const auto& [name, tensor] : index.tensors) check_cover(ErrorKind::state, target.string(), name, tensor);
    std::vector<fs::path> others;                              // parts, and what a dead run of more ranks left
    for (const auto& entry : fs::directory_iterator(partial))
        if (!index.file_bytes.contains(entry.path().filename().string())) others.push_back(entry.path());
    for (const auto& path : others) remove_folder(path);
    stage("index");
    write_text((partial / kCheckpointIndex).string(), index_text(index));
    sync_folder(partial);
    stage("rename");
    put_in_place(partial, target);
    sync_folder(target.parent_path());
    if (!is_periodic) return;
    stage("prune");
    prune(options.folder, options.keep_last);
}

void CheckpointWriter::Job::run() {
    try {
        Json own;
        try {
            own = write_own();
        } catch (const std::exception& e) {
            fail_own(e.what());
            await_others();
            throw;
        }
        if (options.rank == 0) publish(collect(own));
    } catch (const Error& e) {
        error = std::make_exception_ptr(with_free_space(e, target.parent_path(), bytes));
    } catch (const std::exception& e) {
        error = std::make_exception_ptr(Error({ErrorKind::io, "checkpoint", fmt::format("{}: {}", target.string(), e.what()), "a folder that can be written", kFolderHint, MOE_WHERE, -1, ""}));
    }
    std::error_code code;
    if (error && options.rank == 0) fs::remove_all(partial, code);
    is_done = true;
}

CheckpointWriter::CheckpointWriter(CheckpointWriterOptions options) : options_(std::move(options)) {
    MOE_CHECK(options_.keep_last >= 1 && options_.rank >= 0 && options_.rank < options_.world_size, usage, "checkpoint writer",
              fmt::format("keep_last {}, rank {} of {}", options_.keep_last, options_.rank, options_.world_size), "at least 1, a rank below their number", "");
    if (options_.rank == 0 && !options_.folder.empty()) clear_away(options_.folder);
}

CheckpointWriter::~CheckpointWriter() {
    try {
        wait();
    } catch (const std::exception& e) {
        log::error(e.what());
    }
}

void CheckpointWriter::begin(int64_t step, const std::vector<Piece>& pieces, const Json& meta, const std::string& path) {
    prepare(step, pieces, meta, path);
    start();
}

void CheckpointWriter::prepare(int64_t step, const std::vector<Piece>& pieces, const Json& meta, const std::string& path) {
    wait();
    MOE_CHECK(!path.empty() || !options_.folder.empty(), usage, "checkpoint", "no path and no folder of checkpoints", "one of them", "");
    auto job = std::make_unique<Job>(options_);
    job->is_periodic = path.empty();
    job->step = step;
    job->meta = meta;
    fs::path target = path.empty() ? fs::path(options_.folder) / checkpoint_name(step) : fs::path(path);
    target = fs::absolute(target).lexically_normal();
    if (!target.has_filename()) target = target.parent_path();             // "a/b/"
    check_replaceable(target, path.empty());
    job->target = target;
    job->partial = hidden(target, ".partial");
    snapshot(*job, pieces);
    prepared_ = std::move(job);
}

/// Tokens count what all ranks have started.
void CheckpointWriter::start() {
    MOE_CHECK(prepared_, internal, "checkpoint", "start() without prepare()", "both", "");
    auto job = std::move(prepared_);
    job->token = fmt::format("{} {}", options_.id, ++num_saves_);
    job->thread = std::thread([job = job.get()] { job->run(); });
    job_ = std::move(job);
}

void CheckpointWriter::snapshot(Job& job, const std::vector<Piece>& pieces) {
    std::map<std::string, int> times;
    std::vector<int64_t> starts;
    bool any_cuda = false;
    for (const Piece& p : pieces) {
        MOE_CHECK(p.data.defined() && !p.name.empty(), usage, "checkpoint", fmt::format("piece \"{}\": {}", p.name, describe(p.data)), "a name and a tensor", "");
        safetensors_dtype(p.data.scalar_type());                           // throws for one that has no word
        int nth = times[p.name]++;
        StoredTensor& tensor = job.pieces.try_emplace(p.name, StoredTensor{p.data.scalar_type(), p.global_shape, {}}).first->second;
        MOE_CHECK(tensor.dtype == p.data.scalar_type() && tensor.shape == p.global_shape, usage, "checkpoint", fmt::format("pieces of {} as {} {} and {} {}", p.name, dtype_text(tensor.dtype),
                  shape_text(tensor.shape), dtype_text(p.data.scalar_type()), shape_text(p.global_shape)), "one dtype and shape", "");
        tensor.pieces.push_back({job.own_file(), nth == 0 ? p.name : fmt::format("{}#{}", p.name, nth), p.offset, p.data.sizes().vec(), 0});
        starts.push_back(job.bytes);
        job.bytes += (int64_t(p.data.nbytes()) + kSnapshotAlignment - 1) / kSnapshotAlignment * kSnapshotAlignment;
        any_cuda = any_cuda || p.data.is_cuda();
    }
    for (const auto& [name, tensor] : job.pieces) check_apart(ErrorKind::usage, job.target.string(), name, tensor);
    try {
        if (!buffer_.defined() || buffer_.numel() < job.bytes) {
            buffer_.reset();
            buffer_ = at::empty({job.bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(any_cuda));
        }
    } catch (const std::exception& e) {
        MOE_THROW(memory, "checkpoint", std::string(e.what()).substr(0, std::string(e.what()).find('\n')), fmt::format("{} on the host for a copy of this rank's part", format_bytes(double(job.bytes))), "");
    }
    times.clear();
    for (size_t i = 0; i < pieces.size(); ++i) {
        const Piece& p = pieces[i];
        int nth = times[p.name]++;
        at::Tensor copy = buffer_.narrow(0, starts[i], int64_t(p.data.nbytes())).view(p.data.scalar_type()).view(p.data.sizes());
        copy.copy_(p.tensor().detach());
        job.tensors.emplace_back(nth == 0 ? p.name : fmt::format("{}#{}", p.name, nth), copy);
    }
}

void CheckpointWriter::wait() {
    if (!job_) return;
    auto job = std::move(job_);
    job->thread.join();
    if (job->error) std::rethrow_exception(job->error);
}

bool CheckpointWriter::is_writing() const { return job_ && !job_->is_done; }
bool CheckpointWriter::has_failed() const { return job_ && job_->is_done && job_->error; }

}  // namespace moe::store
