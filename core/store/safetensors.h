// The safetensors format: 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes without gaps.
// Source: github.com/huggingface/safetensors, "Format".
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace moe::store {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// What the header says of one tensor.
struct TensorInfo {
    at::ScalarType dtype = at::ScalarType::Float;
    std::vector<int64_t> shape;
    int64_t begin = 0, end = 0;   ///< bytes, from the end of the header
};

/// The spelling of a dtype in a header, e.g. "BF16". Throws moe::Error (dtype) for one that the format has no word for.
const char* safetensors_dtype(at::ScalarType dtype);
/// The dtype that a header's word stands for; none for an unknown word.
std::optional<at::ScalarType> safetensors_dtype_named(const std::string& word);

/// One file, mapped into memory. Opening reads and checks the whole header: throws moe::Error (io) for a file that cannot be read,
/// (data) for one that is truncated, damaged or of another format. Reading is thread safe.
class SafetensorsFile {
public:
    explicit SafetensorsFile(const std::string& path);
    const std::string& path() const { return path_; }
    /// In the order of the data.
    const std::vector<std::string>& names() const { return names_; }
    bool contains(const std::string& name) const { return infos_.count(name) > 0; }
    /// Throws moe::Error (data) for an unknown name.
    const TensorInfo& info(const std::string& name) const;
    /// A tensor on the host. It shares the mapped pages and keeps them alive; pages that are written to become private, the file
    /// never changes. A tensor whose bytes are not aligned to its dtype is a copy. Throws moe::Error (data) for an unknown name.
    at::Tensor get(const std::string& name) const;
    /// The header's __metadata__.
    const std::map<std::string, std::string>& metadata() const { return metadata_; }

private:
    struct Mapping;
    void read_header();

    std::string path_;
    std::shared_ptr<Mapping> mapping_;
    int64_t data_begin_ = 0;
    std::vector<std::string> names_;
    std::map<std::string, TensorInfo> infos_;
    std::map<std::string, std::string> metadata_;
};

/// All tensors of one file, or of a folder with model.safetensors.index.json, or with *.safetensors files whose names are disjoint.
/// An index must name every tensor of its files and no other. Errors as SafetensorsFile.
class SafetensorsFolder {
public:
    explicit SafetensorsFolder(const std::string& path);
    /// Sorted.
    std::vector<std::string> names() const;
    bool contains(const std::string& name) const { return file_of_.count(name) > 0; }
    const TensorInfo& info(const std::string& name) const { return file(name).info(name); }
    at::Tensor get(const std::string& name) const { return file(name).get(name); }

private:
    const SafetensorsFile& file(const std::string& name) const;
    void add_file(const std::string& path);
    void check_index(const std::string& index_path, const std::map<std::string, std::string>& file_names) const;

    std::string path_;
    std::vector<std::unique_ptr<SafetensorsFile>> files_;
    std::map<std::string, const SafetensorsFile*> file_of_;
};

/// Writes a file through a temporary one in the same folder, fsync and one rename: a reader sees the old file or the whole new one.
/// Tensors of any device and stride; one at a time is copied to the host. Throws moe::Error (io), also for a full disk, where the
/// temporary file is removed; (usage) for a name twice; (dtype).
void save_safetensors(const std::string& path, const NamedTensors& tensors, const std::map<std::string, std::string>& metadata = {});

}  // namespace moe::store
