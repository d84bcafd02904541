#include "core/base/error.h"
#include "core/metrics/file.h"
#include "core/metrics/run_log.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <unistd.h>

namespace moe::metrics {
namespace {
template <class T>
std::vector<T> values_of(RecordReader& record, int64_t rows, int64_t cols) {
    int64_t count = 0;
    if (rows < 0 || cols < 0 || __builtin_mul_overflow(rows, cols, &count) || record.left() / sizeof(T) < size_t(count)) record.fail(fmt::format("a matrix of {} x {} in a shorter record", rows, cols));
    std::vector<T> values(static_cast<size_t>(count));
    auto bytes = record.take(size_t(count) * sizeof(T));
    if (count > 0) std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
}
}  // namespace

double Matrix::at(int64_t row, int64_t col) const {
    MOE_CHECK(row >= 0 && row < rows && col >= 0 && col < cols, shape, "matrix", fmt::format("({}, {})", row, col), fmt::format("inside {} x {}", rows, cols), "");
    return std::visit([&](const auto& v) { return double(v[size_t(row * cols + col)]); }, values);
}

Reader::Reader(const std::string& folder) : path_(run_log_path(folder)) {}

Reader::~Reader() {
    if (descriptor_ >= 0) close(descriptor_);
}

bool Reader::open_file() {
    if (descriptor_ < 0) descriptor_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor_ < 0 && (errno == ENOENT || errno == ENOTDIR)) return false;   // the run has not begun to write
    if (descriptor_ < 0) throw_file_error(path_, errno);
    if (offset_ > 0) return true;
    std::string head(kMagic.size(), '\0');
    ssize_t got = pread(descriptor_, head.data(), head.size(), 0);
    if (got < 0) throw_file_error(path_, errno);
    head.resize(size_t(got));
    MOE_CHECK(kMagic.starts_with(head), data, "metrics", fmt::format("{}: not a run log", path_), "a run log of this version", "");
    if (head.size() < kMagic.size()) return false;
    offset_ = int64_t(kMagic.size());
    return true;
}

int64_t Reader::poll() {
    if (!open_file()) return 0;
    int64_t count = 0;
    scan_records(descriptor_, path_, offset_, [&](std::string_view payload, int64_t end) {
        take(payload);
        offset_ = end;
        ++count;
    });
    return count;
}

void Reader::take(std::string_view payload) {
    RecordReader record(payload, path_);
    auto kind = RecordKind(record.get<uint8_t>());
    int64_t attempt = record.get<uint32_t>(), step = record.get<int64_t>();
    if (kind == RecordKind::scalars) {
        auto count = record.get<uint32_t>();
        for (uint32_t i = 0; i < count; ++i) {
            std::string name = record.get_name();
            auto value = record.get<double>();
            auto [column, is_first] = scalars_.try_emplace(name);
            if (is_first) scalar_names_.push_back(name);
            auto [entry, first] = column->second.try_emplace(step, Value{attempt, value});
            if (!first && attempt >= entry->second.attempt) entry->second = {attempt, value};
        }
    } else if (kind == RecordKind::matrix) {
        take_matrix(payload.substr(payload.size() - record.left()), step, attempt);
    } else {
        record.fail(fmt::format("a record of kind {}", int(kind)));
    }
    if (attempt > last_attempt_) last_step_ = step;
    if (attempt == last_attempt_) last_step_ = std::max(last_step_, step);
    last_attempt_ = std::max(last_attempt_, attempt);
}

void Reader::take_matrix(std::string_view payload, int64_t step, int64_t attempt) {
    RecordReader record(payload, path_);
    std::string name = record.get_name();
    auto type = record.get<uint8_t>();
    Matrix m{step, attempt, 0, 0, {}};
    m.rows = record.get<int64_t>();
    m.cols = record.get<int64_t>();
    if (type == 0) m.values = values_of<int64_t>(record, m.rows, m.cols);
    else if (type == 1) m.values = values_of<float>(record, m.rows, m.cols);
    else record.fail(fmt::format("a matrix of type {}", int(type)));
    auto [steps, is_first] = matrices_.try_emplace(name);
    if (is_first) matrix_names_.push_back(name);
    auto [entry, first] = steps->second.try_emplace(step);
    if (first || attempt >= entry->second.attempt) entry->second = std::move(m);
}

Column Reader::column(const std::string& name) const {
    Column column;
    auto it = scalars_.find(name);
    if (it == scalars_.end()) return column;
    for (const auto& [step, value] : it->second) {
        column.steps.push_back(step);
        column.attempts.push_back(value.attempt);
        column.values.push_back(value.value);
    }
    return column;
}

std::vector<int64_t> Reader::matrix_steps(const std::string& name) const {
    std::vector<int64_t> steps;
    if (auto it = matrices_.find(name); it != matrices_.end()) {
        for (const auto& [step, matrix] : it->second) steps.push_back(step);
    }
    return steps;
}

const Matrix* Reader::matrix(const std::string& name, int64_t step) const {
    auto it = matrices_.find(name);
    if (it == matrices_.end()) return nullptr;
    auto entry = it->second.find(step);
    return entry == it->second.end() ? nullptr : &entry->second;
}

}  // namespace moe::metrics
