// The append-only log of a run: scalars and matrices by step. One writer, any number of readers in any process, at any time.
// File: "moelog1\n", then records of {uint32 length, uint32 CRC-32C of the payload, payload}, little-endian. A payload is
// {uint8 kind, uint32 attempt, int64 step, …}; kind 1: uint32 count, then {uint16 length, name, float64} each; kind 2: uint16
// length, name, uint8 type (0 int64, 1 float32), int64 rows, int64 columns, values by rows.
#pragma once
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace moe::metrics {

/// Appends to <folder>/run.moelog, which it creates with its folder. A record is in the file, whole, when a call returns: a reader
/// or a crash afterwards sees it. Not thread safe.
class Writer {
public:
    /// Takes an exclusive lock; a torn record at the end, left by a crash, is cut off. Throws moe::Error (io) where the file cannot
    /// be written, (state) where another writer holds it, (data) where it is not a run log or is damaged before its end.
    explicit Writer(const std::string& folder);
    ~Writer();
    Writer(const Writer&) = delete;
    Writer& operator=(const Writer&) = delete;

    /// Values of one step. Steps written again under a higher attempt (after a resume) replace the earlier ones for readers.
    /// Throws moe::Error (io), also for a full disk: nothing of the record is left in the file then.
    void scalars(int64_t step, int64_t attempt, const std::vector<std::pair<std::string, double>>& values);
    /// A rows × columns matrix, by rows, e.g. counts by layer and expert. Throws moe::Error (io); (shape) for another number of values.
    void matrix(int64_t step, int64_t attempt, std::string_view name, int64_t rows, int64_t cols, std::span<const int64_t> values);
    void matrix(int64_t step, int64_t attempt, std::string_view name, int64_t rows, int64_t cols, std::span<const float> values);
    /// Highest attempt in the file, −1 in a new one: a resumed run writes under the next.
    int64_t last_attempt() const { return last_attempt_; }

private:
    void append(int64_t attempt, const std::string& payload);
    void write_bytes(const std::string& bytes);

    std::string path_;
    int descriptor_ = -1;
    int64_t size_ = 0, last_attempt_ = -1;
};

/// One scalar's values by ascending step, the latest attempt of each step.
struct Column {
    std::vector<int64_t> steps, attempts;
    std::vector<double> values;
};

/// One matrix of one step.
struct Matrix {
    int64_t step = 0, attempt = 0, rows = 0, cols = 0;
    std::variant<std::vector<int64_t>, std::vector<float>> values;   ///< rows × cols, by rows
    /// Value (row, col) as a float64. Throws moe::Error (shape) outside.
    double at(int64_t row, int64_t col) const;
};

/// Reads what a writer, here or elsewhere, has appended so far. Not thread safe.
class Reader {
public:
    /// The file need not exist yet. Throws nothing.
    explicit Reader(const std::string& folder);
    ~Reader();
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;

    /// Takes in new records; returns how many. A record that is not whole yet is left for the next call. Throws moe::Error (io)
    /// where the file cannot be read, (data) where it is not a run log, or a record with others behind it is damaged.
    int64_t poll();
    /// Names of the scalars, in the order of their first appearance.
    const std::vector<std::string>& scalar_names() const { return scalar_names_; }
    /// Names of the matrices, in the order of their first appearance.
    const std::vector<std::string>& matrix_names() const { return matrix_names_; }
    /// A scalar's column; empty for an unknown name. Steps that a later attempt has not reached keep the earlier attempt's value.
    Column column(const std::string& name) const;
    /// Steps that a matrix was written for, ascending, as for column().
    std::vector<int64_t> matrix_steps(const std::string& name) const;
    /// The matrix of a step; null where there is none. Valid until the next poll().
    const Matrix* matrix(const std::string& name, int64_t step) const;
    /// The last step of the latest attempt, −1 before the first record.
    int64_t last_step() const { return last_step_; }
    /// The latest attempt, −1 before the first record.
    int64_t last_attempt() const { return last_attempt_; }

private:
    struct Value {
        int64_t attempt;
        double value;
    };
    bool open_file();
    void take(std::string_view payload);
    void take_matrix(std::string_view payload, int64_t step, int64_t attempt);

    std::string path_;
    int descriptor_ = -1;
    int64_t offset_ = 0;
    std::vector<std::string> scalar_names_, matrix_names_;
    std::map<std::string, std::map<int64_t, Value>> scalars_;
    std::map<std::string, std::map<int64_t, Matrix>> matrices_;
    int64_t last_attempt_ = -1, last_step_ = -1;
};

/// Path of the log inside a run's metrics folder.
std::string run_log_path(const std::string& folder);

}  // namespace moe::metrics
