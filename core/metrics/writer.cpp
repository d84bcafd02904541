#include "core/base/error.h"
#include "core/metrics/file.h"
#include "core/metrics/run_log.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

namespace moe::metrics {
namespace {
template <class T>
std::string matrix_payload(int64_t step, int64_t attempt, std::string_view name, int64_t rows, int64_t cols, std::span<const T> values, uint8_t type) {
    MOE_CHECK(rows >= 0 && cols >= 0 && rows * cols == int64_t(values.size()), shape, "metrics.matrix", fmt::format("{} values for {} x {}", values.size(), rows, cols), "rows x columns values", "");
    RecordWriter record(RecordKind::matrix, attempt, step);
    record.put_name(name);
    record.put(type);
    record.put(rows);
    record.put(cols);
    record.put_bytes(values.data(), values.size_bytes());
    return record.payload();
}
}  // namespace

std::string run_log_path(const std::string& folder) { return (std::filesystem::path(folder) / "run.moelog").string(); }

Writer::Writer(const std::string& folder) : path_(run_log_path(folder)) {
    std::error_code code;
    std::filesystem::create_directories(folder, code);
    if (code) throw_file_error(folder, code.value());
    descriptor_ = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (descriptor_ < 0) throw_file_error(path_, errno);
    try {
        if (flock(descriptor_, LOCK_EX | LOCK_NB) != 0) {
            if (errno != EWOULDBLOCK) throw_file_error(path_, errno);
            MOE_THROW(state, "metrics", fmt::format("{}: another writer has it open", path_), "one writer a run", "the run is still going on: stop it first, or give this one another name");
        }
        struct stat status {};
        if (fstat(descriptor_, &status) != 0) throw_file_error(path_, errno);
        std::string head(kMagic.size(), '\0');
        auto got = status.st_size > 0 ? std::max<ssize_t>(0, pread(descriptor_, head.data(), head.size(), 0)) : 0;
        head.resize(size_t(got));
        MOE_CHECK(kMagic.starts_with(head), data, "metrics", fmt::format("{}: not a run log", path_), "a run log of this version or no file", "move the file away");
        if (head.size() == kMagic.size()) {
            size_ = scan_records(descriptor_, path_, int64_t(kMagic.size()), [&](std::string_view payload, int64_t) {
                RecordReader record(payload, path_);
                record.get<uint8_t>();
                last_attempt_ = std::max(last_attempt_, int64_t(record.get<uint32_t>()));
            });
        }
        // What follows the last whole record is what a crash left of the next.
        if (status.st_size > size_ && ftruncate(descriptor_, size_) != 0) throw_file_error(path_, errno);
        if (size_ == 0) write_bytes(std::string(kMagic));
    } catch (...) {
        close(descriptor_);
        throw;
    }
}

Writer::~Writer() { close(descriptor_); }

void Writer::write_bytes(const std::string& bytes) {
    int64_t done = 0, size = int64_t(bytes.size());
    while (done < size) {
        ssize_t put = pwrite(descriptor_, bytes.data() + done, size_t(size - done), size_ + done);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) {
            int error = put < 0 ? errno : ENOSPC;
            // Half a record must not stay: the next one would come behind it. Where cutting fails too, the next call writes over it.
            if (ftruncate(descriptor_, size_) != 0) throw_file_error(path_, error);
            throw_file_error(path_, error);
        }
        done += put;
    }
    size_ += size;
}

void Writer::append(int64_t attempt, const std::string& payload) {
    write_bytes(framed(payload));
    last_attempt_ = std::max(last_attempt_, attempt);
}

void Writer::scalars(int64_t step, int64_t attempt, const std::vector<std::pair<std::string, double>>& values) {
    RecordWriter record(RecordKind::scalars, attempt, step);
    record.put(uint32_t(values.size()));
    for (const auto& [name, value] : values) {
        record.put_name(name);
        record.put(value);
    }
    append(attempt, record.payload());
}

void Writer::matrix(int64_t step, int64_t attempt, std::string_view name, int64_t rows, int64_t cols, std::span<const int64_t> values) {
    append(attempt, matrix_payload(step, attempt, name, rows, cols, values, 0));
}

void Writer::matrix(int64_t step, int64_t attempt, std::string_view name, int64_t rows, int64_t cols, std::span<const float> values) {
    append(attempt, matrix_payload(step, attempt, name, rows, cols, values, 1));
}

}  // namespace moe::metrics
