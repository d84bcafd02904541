#include "core/store/checkpoint_index.h"

#include "core/base/error.h"
#include "core/base/json.h"
#include "core/store/safetensors.h"
#include "core/tensor/check.h"

#include <algorithm>
#include <filesystem>

namespace moe::store {
namespace {
using Json = nlohmann::json;
using Sizes = std::vector<int64_t>;

[[noreturn]] void throw_bad_index(const std::string& path, const std::string& what) {
    MOE_THROW(data, "checkpoint", fmt::format("{}: {}", path, what), "a whole index.json of moelab", "the file was changed or damaged: use another checkpoint");
}

/// Inside of one, where the place is known further out.
[[noreturn]] void bad_part(const std::string& what) { MOE_THROW(data, "checkpoint", what, "", ""); }

std::string reason_of(const std::exception& e) {
    auto* error = dynamic_cast<const Error*>(&e);
    return error ? error->parts().got : e.what();
}

std::string dumped(const Json& value) { return value.dump(-1, ' ', false, Json::error_handler_t::replace); }

Sizes read_sizes(const Json& value, size_t dims) {
    Sizes sizes;
    if (!value.is_array()) bad_part(fmt::format("sizes {}", brief(value)));
    for (const auto& n : value) {
        if (!n.is_number_integer() || n.get<int64_t>() < 0) bad_part(fmt::format("sizes {}", brief(value)));
        sizes.push_back(n.get<int64_t>());
    }
    if (sizes.size() != dims) bad_part(fmt::format("{} of {} dims, not {}", brief(value), sizes.size(), dims));
    return sizes;
}

/// Files are the folder's own: a name such as ../x would leave it.
std::string read_file_name(const Json& value) {
    auto name = value.get<std::string>();
    if (name.empty() || name.find('/') != std::string::npos || name.starts_with('.')) bad_part(fmt::format("a file called \"{}\"", name));
    return name;
}

Json piece_json(const StoredPiece& p) { return {{"file", p.file}, {"key", p.key}, {"offset", p.offset}, {"shape", p.shape}, {"crc32c", p.crc32c}}; }

StoredPiece read_piece(const Json& j, size_t dims) {
    StoredPiece p;
    p.file = read_file_name(j.at("file"));
    p.key = j.at("key").get<std::string>();
    p.offset = read_sizes(j.at("offset"), dims);
    p.shape = read_sizes(j.at("shape"), dims);
    p.crc32c = j.at("crc32c").get<uint32_t>();
    return p;
}

at::ScalarType read_dtype(const Json& j) {
    auto dtype = safetensors_dtype_named(j.get<std::string>());
    if (!dtype) bad_part(fmt::format("dtype {}", brief(j)));
    return *dtype;
}

StoredTensor read_tensor(const Json& j) {
    StoredTensor t;
    t.dtype = read_dtype(j.at("dtype"));
    t.shape = read_sizes(j.at("shape"), j.at("shape").size());
    for (const auto& piece : j.at("pieces")) t.pieces.push_back(read_piece(piece, t.shape.size()));
    return t;
}

std::string rectangle_text(const StoredPiece& p) { return fmt::format("{} at {}", shape_text(p.shape), shape_text(p.offset)); }
}  // namespace

int64_t volume(const Sizes& shape) {
    int64_t n = 1;
    for (int64_t size : shape) {
        if (size < 0 || __builtin_mul_overflow(n, size, &n)) return -1;
    }
    return n;
}

bool intersect(const Sizes& a_offset, const Sizes& a_shape, const Sizes& b_offset, const Sizes& b_shape, Sizes& offset, Sizes& shape) {
    offset.clear();
    shape.clear();
    for (size_t d = 0; d < a_offset.size(); ++d) {
        int64_t begin = std::max(a_offset[d], b_offset[d]), end = std::min(a_offset[d] + a_shape[d], b_offset[d] + b_shape[d]);
        if (begin >= end) return false;
        offset.push_back(begin);
        shape.push_back(end - begin);
    }
    return true;
}

void check_apart(ErrorKind kind, const std::string& where, const std::string& name, const StoredTensor& tensor) {
    auto fail = [&](const std::string& got) {
        throw_error(kind, "checkpoint", fmt::format("{}: {} of {}", where, got, name), fmt::format("rectangles inside of {} that do not overlap", shape_text(tensor.shape)), "", MOE_WHERE);
    };
    for (const auto& p : tensor.pieces) {
        bool inside = p.offset.size() == tensor.shape.size() && p.shape.size() == tensor.shape.size() && volume(tensor.shape) >= 0;
        for (size_t d = 0; inside && d < p.shape.size(); ++d) inside = p.offset[d] >= 0 && p.shape[d] >= 0 && p.offset[d] <= tensor.shape[d] && p.shape[d] <= tensor.shape[d] - p.offset[d];
        if (!inside) fail(fmt::format("a piece {}", rectangle_text(p)));
    }
    Sizes offset, shape;
    for (size_t i = 0; i < tensor.pieces.size(); ++i)
        for (size_t k = 0; k < i; ++k) {
            const auto &a = tensor.pieces[i], &b = tensor.pieces[k];
            if (intersect(a.offset, a.shape, b.offset, b.shape, offset, shape)) fail(fmt::format("overlapping pieces {} and {}", rectangle_text(b), rectangle_text(a)));
        }
}

void check_cover(ErrorKind kind, const std::string& where, const std::string& name, const StoredTensor& tensor) {
    check_apart(kind, where, name, tensor);
    int64_t got = 0, want = volume(tensor.shape);
    for (const auto& p : tensor.pieces) got += volume(p.shape);
    if (got != want)
        throw_error(kind, "checkpoint", fmt::format("{}: pieces with {} of {}'s {} elements", where, got, name, want), fmt::format("pieces that cover {}", shape_text(tensor.shape)),
                    "a rank's part is missing", MOE_WHERE);
}

std::string index_text(const CheckpointIndex& index) {
    std::string text = fmt::format("{{\"format\": \"{}\", \"version\": {}, \"step\": {}, \"attempt\": {},\n\"files\": {},\n\"meta\": {},\n\"tensors\": {{", kCheckpointFormat, kCheckpointVersion,
                                   index.step, index.attempt, dumped(index.file_bytes), dumped(index.meta));
    const char* separator = "\n";
    for (const auto& [name, tensor] : index.tensors) {
        Json pieces = Json::array();
        for (const auto& p : tensor.pieces) pieces.push_back(piece_json(p));
        text += fmt::format("{}{}: {}", separator, dumped(name), dumped({{"dtype", safetensors_dtype(tensor.dtype)}, {"shape", tensor.shape}, {"pieces", pieces}}));
        separator = ",\n";
    }
    return text + "\n}}\n";
}

IndexHead read_index_head(const Json& json, const std::string& path) {
    if (!json.is_object() || json.value("format", Json()) != kCheckpointFormat)
        MOE_THROW(data, "checkpoint", fmt::format("{}: an index of another program", path), "a checkpoint of moelab", "weights of other programs are read by moe.load_hf and moe.load_safetensors");
    if (json.value("version", Json()) != kCheckpointVersion)
        MOE_THROW(data, "checkpoint", fmt::format("{}: version {} of the format", path, brief(json.value("version", Json()))), fmt::format("version {}", kCheckpointVersion),
                  "it was written by another version of moelab");
    try {
        return {json.at("step").get<int64_t>(), json.at("attempt").get<int64_t>()};
    } catch (const Json::exception& e) {
        throw_bad_index(path, e.what());
    }
}

CheckpointIndex read_index(const std::string& path) {
    Json json = read_json(path, ErrorKind::data);
    CheckpointIndex index;
    static_cast<IndexHead&>(index) = read_index_head(json, path);
    std::string at = "the index";
    try {
        index.meta = json.at("meta");
        for (const auto& [file, bytes] : json.at("files").items()) index.file_bytes[read_file_name(file)] = bytes.get<int64_t>();
        for (const auto& [name, tensor] : json.at("tensors").items()) {
            at = name;
            index.tensors[name] = read_tensor(tensor);
            for (const auto& p : index.tensors[name].pieces)
                if (!index.file_bytes.contains(p.file)) bad_part(fmt::format("a piece in {}, which is not among the files", p.file));
        }
    } catch (const std::exception& e) {
        throw_bad_index(path, fmt::format("{}: {}", at, reason_of(e)));
    }
    for (const auto& [name, tensor] : index.tensors) check_cover(ErrorKind::data, path, name, tensor);
    return index;
}

Json part_json(const std::string& token, const std::string& file, int64_t bytes, const std::map<std::string, StoredTensor>& tensors) {
    Json list = Json::object();
    for (const auto& [name, tensor] : tensors) {
        Json pieces = Json::array();
        for (const auto& p : tensor.pieces) pieces.push_back(piece_json(p));
        list[name] = {{"dtype", safetensors_dtype(tensor.dtype)}, {"shape", tensor.shape}, {"pieces", pieces}};
    }
    return {{"token", token}, {"file", file}, {"bytes", bytes}, {"tensors", list}};
}

void add_part(CheckpointIndex& index, const Json& part, const std::string& where) {
    std::string at = "the part";
    try {
        index.file_bytes[read_file_name(part.at("file"))] = part.at("bytes").get<int64_t>();
        for (const auto& [name, json] : part.at("tensors").items()) {
            at = name;
            StoredTensor tensor = read_tensor(json);
            auto [known, added] = index.tensors.emplace(name, tensor);
            if (added) continue;
            if (known->second.dtype != tensor.dtype || known->second.shape != tensor.shape)
                bad_part(fmt::format("{} {}, on another rank {} {}", safetensors_dtype(tensor.dtype), shape_text(tensor.shape), safetensors_dtype(known->second.dtype),
                                                     shape_text(known->second.shape)));
            auto& pieces = known->second.pieces;
            pieces.insert(pieces.end(), tensor.pieces.begin(), tensor.pieces.end());
        }
    } catch (const std::exception& e) {
        throw_bad_index(where, fmt::format("{}: {}", at, reason_of(e)));
    }
}

}  // namespace moe::store
