#include "core/base/error.h"
#include "core/base/json.h"
#include "core/store/safetensors.h"

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tuple>
#include <unistd.h>

namespace fs = std::filesystem;

namespace moe::store {
namespace {
using Json = nlohmann::json;
// The reference implementation's limit: a longer header is a damaged or hostile file.
constexpr int64_t kMaxHeaderBytes = 100'000'000;
constexpr const char* kIndexName = "model.safetensors.index.json";

struct DtypeName {
    at::ScalarType dtype;
    const char* name;
};
constexpr std::array kDtypes = {
    DtypeName{at::kDouble, "F64"},   DtypeName{at::kFloat, "F32"}, DtypeName{at::kHalf, "F16"}, DtypeName{at::kBFloat16, "BF16"},       DtypeName{at::kLong, "I64"},          DtypeName{at::kInt, "I32"},
    DtypeName{at::kShort, "I16"},    DtypeName{at::kChar, "I8"},   DtypeName{at::kByte, "U8"},  DtypeName{at::kBool, "BOOL"}, DtypeName{at::kFloat8_e4m3fn, "F8_E4M3"}, DtypeName{at::kFloat8_e5m2, "F8_E5M2"},
};

[[noreturn]] void throw_damaged(const std::string& path, const std::string& what) {
    MOE_THROW(data, "safetensors", fmt::format("{}: {}", path, what), "a whole safetensors file", "the file is truncated, damaged or of another format: copy or download it again");
}

at::ScalarType dtype_of(const std::string& path, const std::string& name, const std::string& word) {
    if (auto dtype = safetensors_dtype_named(word)) return *dtype;
    MOE_THROW(data, "safetensors", fmt::format("{}: dtype \"{}\" of {}", path, word, name), "F64, F32, F16, BF16, F8_E4M3, F8_E5M2, I64, I32, I16, I8, U8 or BOOL", "");
}

// Bytes of a tensor, or −1 where its shape overflows.
int64_t num_bytes(const TensorInfo& info) {
    auto bytes = int64_t(c10::elementSize(info.dtype));
    for (int64_t n : info.shape) {
        if (n < 0 || __builtin_mul_overflow(bytes, n, &bytes)) return -1;
    }
    return bytes;
}

TensorInfo read_info(const std::string& path, const std::string& name, const Json& entry) {
    try {
        TensorInfo info;
        info.dtype = dtype_of(path, name, entry.at("dtype").get<std::string>());
        for (const auto& n : entry.at("shape")) {
            if (!n.is_number_integer()) throw_damaged(path, fmt::format("shape {} of {}", brief(entry.at("shape")), name));
            info.shape.push_back(n.get<int64_t>());
        }
        const auto& offsets = entry.at("data_offsets");
        if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() || !offsets[1].is_number_unsigned()) throw_damaged(path, fmt::format("data_offsets {} of {}", brief(offsets), name));
        info.begin = offsets[0].get<int64_t>();
        info.end = offsets[1].get<int64_t>();
        if (info.begin < 0 || info.end < info.begin || num_bytes(info) != info.end - info.begin)
            throw_damaged(path, fmt::format("{} has shape {} but bytes [{}, {})", name, brief(entry.at("shape")), info.begin, info.end));
        return info;
    } catch (const Json::exception& e) {
        throw_damaged(path, fmt::format("entry {} of the header: {}", name, e.what()));
    }
}
}  // namespace

const char* safetensors_dtype(at::ScalarType dtype) {
    for (const auto& d : kDtypes) {
        if (dtype == d.dtype) return d.name;
    }
    MOE_THROW(dtype, "save_safetensors", c10::toString(dtype), "a real, integer or boolean dtype", "convert the tensor first");
}

std::optional<at::ScalarType> safetensors_dtype_named(const std::string& word) {
    for (const auto& d : kDtypes) {
        if (word == d.name) return d.dtype;
    }
    return {};
}

struct SafetensorsFile::Mapping {
    char* bytes = nullptr;
    int64_t size = 0;

    explicit Mapping(const std::string& path) {
        int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        struct stat status {};
        bool good = descriptor >= 0 && fstat(descriptor, &status) == 0;
        if (good && S_ISDIR(status.st_mode)) good = false, errno = EISDIR;
        size = status.st_size;
        void* address = MAP_FAILED;
        // Private and writable: a tensor that a user changes in place gets pages of its own.
        if (good && size > 0) address = mmap(nullptr, size_t(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, descriptor, 0);
        int error = errno;
        if (descriptor >= 0) close(descriptor);
        MOE_CHECK(good && (size == 0 || address != MAP_FAILED), io, "safetensors", fmt::format("{}: {}", path, std::strerror(error)), "a readable file", "check the path and its permissions");
        if (size > 0) bytes = static_cast<char*>(address);
    }
    ~Mapping() {
        if (bytes) munmap(bytes, size_t(size));
    }
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
};

SafetensorsFile::SafetensorsFile(const std::string& path) : path_(path), mapping_(std::make_shared<Mapping>(path)) { read_header(); }

void SafetensorsFile::read_header() {
    if (mapping_->size < 8) throw_damaged(path_, fmt::format("{} bytes", mapping_->size));
    uint64_t length = 0;
    std::memcpy(&length, mapping_->bytes, 8);
    if (length > uint64_t(kMaxHeaderBytes)) throw_damaged(path_, fmt::format("a header of {} bytes", length));
    if (int64_t(length) > mapping_->size - 8) throw_damaged(path_, fmt::format("a header of {} bytes in a file of {}", length, mapping_->size));
    data_begin_ = 8 + int64_t(length);
    Json header = parse_json(std::string(mapping_->bytes + 8, length), path_ + " (header)", ErrorKind::data);
    if (!header.is_object()) throw_damaged(path_, "a header that is not an object");
    for (const auto& [name, entry] : header.items()) {
        if (name == "__metadata__") {
            for (const auto& [key, value] : entry.items()) {
                if (!value.is_string()) throw_damaged(path_, fmt::format("metadata {} is {}", key, brief(value)));
                metadata_[key] = value.get<std::string>();
            }
            continue;
        }
        infos_[name] = read_info(path_, name, entry);
        names_.push_back(name);
    }
    std::sort(names_.begin(), names_.end(), [&](const auto& a, const auto& b) {
        const auto &x = infos_[a], &y = infos_[b];
        return std::tie(x.begin, x.end, a) < std::tie(y.begin, y.end, b);
    });
    int64_t at = 0;
    for (const auto& name : names_) {
        const auto& info = infos_[name];
        if (info.begin != at) throw_damaged(path_, fmt::format("{} begins at byte {}, {} byte {}", name, info.begin, info.begin < at ? "inside the tensor that ends at" : "after a gap from", at));
        at = info.end;
    }
    if (data_begin_ + at != mapping_->size) throw_damaged(path_, fmt::format("{} bytes of data, the header names {}", mapping_->size - data_begin_, at));
}

const TensorInfo& SafetensorsFile::info(const std::string& name) const {
    auto it = infos_.find(name);
    MOE_CHECK(it != infos_.end(), data, "safetensors", fmt::format("no tensor \"{}\" in {}", name, path_), fmt::format("one of its {} names", names_.size()), "");
    return it->second;
}

at::Tensor SafetensorsFile::get(const std::string& name) const {
    const auto& i = info(name);
    char* bytes = mapping_->bytes + data_begin_ + i.begin;
    if (i.begin == i.end) return at::empty(i.shape, i.dtype);
    if (reinterpret_cast<uintptr_t>(bytes) % c10::elementSize(i.dtype) != 0) {
        at::Tensor copy = at::empty(i.shape, i.dtype);
        std::memcpy(copy.data_ptr(), bytes, size_t(i.end - i.begin));
        return copy;
    }
    return at::from_blob(bytes, i.shape, [mapping = mapping_](void*) {}, at::TensorOptions(i.dtype));
}

SafetensorsFolder::SafetensorsFolder(const std::string& path) : path_(path) {
    std::error_code code;
    auto status = fs::status(path, code);
    MOE_CHECK(fs::exists(status), io, "safetensors", fmt::format("{}: {}", path, code ? code.message() : "No such file or directory"), "a safetensors file or a folder of them", "check the path");
    if (!fs::is_directory(status)) {
        add_file(path);
        return;
    }
    std::string index_path = (fs::path(path) / kIndexName).string();
    if (fs::exists(index_path)) {
        Json index = read_json(index_path, ErrorKind::data);
        std::map<std::string, std::string> file_names;
        try {
            for (const auto& [name, file] : index.at("weight_map").items()) file_names[name] = file.get<std::string>();
        } catch (const Json::exception& e) {
            throw_damaged(index_path, e.what());
        }
        std::map<std::string, int> files;
        for (const auto& [name, file] : file_names) {
            // A name such as ../x would leave the folder.
            if (file.find('/') != std::string::npos) throw_damaged(index_path, fmt::format("file \"{}\" of {}", file, name));
            if (files[file]++ == 0) add_file((fs::path(path) / file).string());
        }
        check_index(index_path, file_names);
        return;
    }
    std::vector<std::string> files;
    for (const auto& entry : fs::directory_iterator(path, code)) {
        if (entry.path().extension() == ".safetensors") files.push_back(entry.path().string());
    }
    // model.safetensors alone is the model: other files beside it are something else (adapters, expected values of a test).
    std::string single = (fs::path(path) / "model.safetensors").string();
    if (std::find(files.begin(), files.end(), single) != files.end()) files = {single};
    MOE_CHECK(!code && !files.empty(), io, "safetensors", fmt::format("{}: {}", path, code ? code.message() : "no .safetensors file in it"), "a folder with model.safetensors or several files and their index", "");
    std::sort(files.begin(), files.end());
    for (const auto& file : files) add_file(file);
}

void SafetensorsFolder::add_file(const std::string& path) {
    files_.push_back(std::make_unique<SafetensorsFile>(path));
    for (const auto& name : files_.back()->names()) {
        auto [it, fresh] = file_of_.emplace(name, files_.back().get());
        MOE_CHECK(fresh, data, "safetensors", fmt::format("\"{}\" in {} and in {}", name, it->second->path(), path), "every tensor once", "files of two models are in one folder");
    }
}

void SafetensorsFolder::check_index(const std::string& index_path, const std::map<std::string, std::string>& file_names) const {
    for (const auto& [name, file] : file_names) {
        auto it = file_of_.find(name);
        if (it == file_of_.end() || fs::path(it->second->path()).filename() != file) throw_damaged(index_path, fmt::format("{} is not in {}", name, file));
    }
    for (const auto& [name, file] : file_of_) {
        if (!file_names.count(name)) throw_damaged(index_path, fmt::format("{} of {} is not listed", name, file->path()));
    }
}

const SafetensorsFile& SafetensorsFolder::file(const std::string& name) const {
    auto it = file_of_.find(name);
    MOE_CHECK(it != file_of_.end(), data, "safetensors", fmt::format("no tensor \"{}\" in {}", name, path_), fmt::format("one of its {} names", file_of_.size()), "");
    return *it->second;
}

std::vector<std::string> SafetensorsFolder::names() const {
    std::vector<std::string> names;
    for (const auto& [name, file] : file_of_) names.push_back(name);
    return names;
}

}  // namespace moe::store
