// index.json, as the writer makes it and the reader checks it. Internal to the folder.
#pragma once
#include "core/base/error.h"

#include <c10/core/ScalarType.h>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace moe::store {

constexpr const char* kCheckpointFormat = "moelab checkpoint";
constexpr int64_t kCheckpointVersion = 1;
constexpr const char* kCheckpointIndex = "index.json";

/// Where one rectangle of a tensor is: tensor `key` of a file of the folder.
struct StoredPiece {
    std::string file, key;
    std::vector<int64_t> offset, shape;
    uint32_t crc32c = 0;                  ///< of its bytes
};

struct StoredTensor {
    at::ScalarType dtype = at::ScalarType::Float;
    std::vector<int64_t> shape;
    std::vector<StoredPiece> pieces;
};

/// What the index's first line says; a listing reads no more.
struct IndexHead {
    int64_t step = 0, attempt = 0;
};

struct CheckpointIndex : IndexHead {
    nlohmann::json meta;
    std::map<std::string, int64_t> file_bytes;
    std::map<std::string, StoredTensor> tensors;
};

std::string index_text(const CheckpointIndex& index);
/// The head of a parsed index, or of its first line. Throws moe::Error (data) for another format or version.
IndexHead read_index_head(const nlohmann::json& json, const std::string& path);
/// The whole index, checked. Throws moe::Error (data, io) that names `path`.
CheckpointIndex read_index(const std::string& path);

/// What one rank adds to an index, as it leaves it for rank 0. `token` tells saves apart.
nlohmann::json part_json(const std::string& token, const std::string& file, int64_t bytes, const std::map<std::string, StoredTensor>& tensors);
/// Throws moe::Error (data) where ranks contradict each other.
void add_part(CheckpointIndex& index, const nlohmann::json& part, const std::string& where);

/// Throws moe::Error of `kind` unless the pieces lie inside of the tensor and apart from each other. `where` begins the message.
void check_apart(ErrorKind kind, const std::string& where, const std::string& name, const StoredTensor& tensor);
/// And unless they are all of it.
void check_cover(ErrorKind kind, const std::string& where, const std::string& name, const StoredTensor& tensor);

/// Product of the sizes; −1 where it overflows.
int64_t volume(const std::vector<int64_t>& shape);
/// The overlap of two rectangles; false where there is none. Of tensors without dims: both are all of it.
bool intersect(const std::vector<int64_t>& a_offset, const std::vector<int64_t>& a_shape, const std::vector<int64_t>& b_offset, const std::vector<int64_t>& b_shape,
               std::vector<int64_t>& offset, std::vector<int64_t>& shape);

}  // namespace moe::store
