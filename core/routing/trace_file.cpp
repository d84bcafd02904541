#include "core/routing/trace_file.h"

#include "core/base/crc32c.h"
#include "core/base/error.h"
#include "core/base/json.h"

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <functional>

namespace moe::routing {
namespace {
constexpr uint32_t kTraceVersion = 2;
constexpr uint32_t kMaxHeaderBytes = 1 << 20;

struct ChunkHead {
    char magic[4] = {'C', 'H', 'N', 'K'};
    uint32_t crc = 0;
    uint64_t bytes = 0, tokens = 0, layers = 0;
};
struct LayerHead {
    int32_t layer, top_k, id_bytes, flags;
};

/// The chunk's tensors in the file's order.
void each_tensor(const TraceChunk& chunk, const std::function<void(const at::Tensor&)>& f) {
    for (auto* t : {&chunk.ids, &chunk.domain, &chunk.position}) f(*t);
    for (auto& [layer, l] : chunk.layers)
        for (auto* t : {&l.experts, &l.weights, &l.margin, &l.entropy, &l.changed, &l.dropped, &l.probability})
            if (t->defined()) f(*t);
}
std::vector<LayerHead> heads_of(const TraceChunk& chunk) {
    std::vector<LayerHead> heads;
    for (auto& [layer, l] : chunk.layers)
        heads.push_back({int32_t(layer), int32_t(l.experts.size(1)), int32_t(l.experts.element_size()), (l.weights.defined() ? 1 : 0) + (l.margin.defined() ? 2 : 0) + (l.dropped.defined() ? 4 : 0)});
    return heads;
}
}  // namespace

int64_t bytes_of(const TraceChunk& chunk) {
    int64_t bytes = 0;
    each_tensor(chunk, [&](const at::Tensor& t) { bytes += int64_t(t.nbytes()); });
    return bytes;
}

TraceFile::~TraceFile() {
    if (file_) std::fclose(file_);
}

void TraceFile::damaged(const std::string& got) const { MOE_THROW(data, "trace: " + path_, got, "a whole trace file", "traces are written by model:trace, run:trace and tr:save"); }

void TraceFile::write(const void* bytes, size_t size) {
    if (std::fwrite(bytes, 1, size, file_) == size) return;
    MOE_THROW(io, "trace: " + (path_.empty() ? "temporary file" : path_), std::strerror(errno), "room to write", path_.empty() ? "TMPDIR names the folder; or give file =" : "");
}

bool TraceFile::try_read(void* bytes, size_t size) const { return std::fread(bytes, 1, size, file_) == size; }

std::unique_ptr<TraceFile> TraceFile::create(const std::string& path, const TraceFacts& facts) {
    std::error_code ignored;
    if (auto folder = std::filesystem::path(path).parent_path(); !folder.empty()) std::filesystem::create_directories(folder, ignored);
    std::FILE* file = path.empty() ? std::tmpfile() : std::fopen(path.c_str(), "w+b");
    MOE_CHECK(file, io, "trace: " + (path.empty() ? "temporary file" : path), std::strerror(errno), "a file that can be written", "");
    std::unique_ptr<TraceFile> out(new TraceFile(path, file));
    out->facts_ = facts;
    nlohmann::ordered_json json = {{"num_experts", facts.num_experts}, {"num_groups", facts.num_groups}, {"seq_length", facts.seq_length}, {"tokenizer", facts.tokenizer}, {"domains", facts.domains}};
    std::string text = json.dump();
    uint32_t numbers[] = {kTraceVersion, uint32_t(text.size())};
    out->write("MOETRACE", 8);
    out->write(numbers, sizeof(numbers));
    out->write(text.data(), text.size());
    return out;
}

std::unique_ptr<TraceFile> TraceFile::open(const std::string& path) {
    std::FILE* file = std::fopen(path.c_str(), "rb");
    MOE_CHECK(file, io, "trace: " + path, std::strerror(errno), "a trace file that can be read", "");
    std::unique_ptr<TraceFile> out(new TraceFile(path, file));
    char magic[8];
    uint32_t numbers[2];
    if (!out->try_read(magic, 8) || std::memcmp(magic, "MOETRACE", 8) != 0) out->damaged("another kind of file");
    if (!out->try_read(numbers, sizeof(numbers)) || numbers[1] > kMaxHeaderBytes) out->damaged("a torn header");
    if (numbers[0] < 1 || numbers[0] > kTraceVersion) out->damaged(fmt::format("version {}", numbers[0]));
    std::string text(numbers[1], ' ');
    if (!out->try_read(text.data(), text.size())) out->damaged("a torn header");
    nlohmann::json json = parse_json(text, path);
    try {
        auto& f = out->facts_;
        f.num_experts = json.at("num_experts").get<int64_t>();
        f.num_groups = json.at("num_groups").get<int64_t>();
        f.seq_length = json.at("seq_length").get<int64_t>();
        f.domains = json.at("domains").get<std::vector<std::string>>();
        f.tokenizer = json.at("tokenizer").get<std::string>();
    } catch (const nlohmann::json::exception& e) {
        out->damaged(e.what());
    }
    auto& f = out->facts_;
    if (f.num_experts < 1 || f.num_experts > 32767 || f.num_groups < 1 || f.domains.size() > 32767) out->damaged(fmt::format("{} experts in {} groups", f.num_experts, f.num_groups));
    std::error_code code;
    int64_t end = int64_t(std::filesystem::file_size(path, code));
    ChunkHead head;
    while (out->try_read(&head, sizeof(head))) {
        if (std::memcmp(head.magic, "LAST", 4) == 0) {
            out->complete_ = true;
            break;
        }
        int64_t begin = ftello(file);
        if (std::memcmp(head.magic, "CHNK", 4) != 0) out->damaged(fmt::format("no chunk at byte {}", begin - int64_t(sizeof(head))));
        if (head.bytes > uint64_t(end - begin)) break;
        if (head.tokens > head.bytes || head.layers > head.bytes) out->damaged(fmt::format("{} tokens of {} layers in {} bytes", head.tokens, head.layers, head.bytes));
        out->chunks_.push_back({begin, int64_t(head.bytes), int64_t(head.tokens), int64_t(head.layers), head.crc});
        if (fseeko(file, begin + int64_t(head.bytes), SEEK_SET) != 0) break;
    }
    return out;
}

int64_t TraceFile::num_tokens() const {
    int64_t sum = 0;
    for (auto& c : chunks_) sum += c.tokens;
    return sum;
}

void TraceFile::append(const TraceChunk& chunk) {
    auto heads = heads_of(chunk);
    ChunkHead head;
    head.tokens = uint64_t(chunk.ids.size(0));
    head.layers = heads.size();
    head.bytes = heads.size() * sizeof(LayerHead);
    head.crc = crc32c(heads.data(), head.bytes);
    each_tensor(chunk, [&](const at::Tensor& t) {
        head.crc = crc32c(t.const_data_ptr(), t.nbytes(), head.crc);
        head.bytes += t.nbytes();
    });
    fseeko(file_, 0, SEEK_END);
    int64_t begin = ftello(file_) + int64_t(sizeof(head));
    write(&head, sizeof(head));
    write(heads.data(), heads.size() * sizeof(LayerHead));
    each_tensor(chunk, [&](const at::Tensor& t) { write(t.const_data_ptr(), t.nbytes()); });
    chunks_.push_back({begin, int64_t(head.bytes), int64_t(head.tokens), int64_t(head.layers), head.crc});
}

void TraceFile::finish() {
    if (complete_) return;
    ChunkHead head;
    std::memcpy(head.magic, "LAST", 4);
    fseeko(file_, 0, SEEK_END);
    write(&head, sizeof(head));
    MOE_CHECK(std::fflush(file_) == 0, io, "trace: " + path_, std::strerror(errno), "room to write", "");
    complete_ = true;
}

TraceChunk TraceFile::read(size_t i) const {
    const Place& place = chunks_[i];
    std::vector<char> bytes(size_t(place.bytes));
    std::fflush(file_);
    if (fseeko(file_, place.begin, SEEK_SET) != 0 || !try_read(bytes.data(), bytes.size())) damaged(fmt::format("chunk {} cut short", i));
    if (crc32c(bytes.data(), bytes.size()) != place.crc) damaged(fmt::format("chunk {} with a wrong checksum", i));
    size_t at = 0;
    auto take = [&](at::IntArrayRef shape, at::ScalarType dtype) {
        at::Tensor t = at::empty(shape, dtype);
        if (at + t.nbytes() > bytes.size()) damaged(fmt::format("chunk {} cut short", i));
        std::memcpy(t.data_ptr(), bytes.data() + at, t.nbytes());
        at += t.nbytes();
        return t;
    };
    std::vector<LayerHead> heads(size_t(place.layers));
    at::Tensor raw = take({place.layers * int64_t(sizeof(LayerHead))}, at::kByte);
    std::memcpy(heads.data(), raw.const_data_ptr(), raw.nbytes());
    int64_t n = place.tokens, D = int64_t(facts_.domains.size());
    TraceChunk out{take({n}, at::kInt), take({n}, at::kShort), take({n}, at::kInt), {}};
    for (auto& h : heads) {
        if (h.top_k < 1 || h.top_k > facts_.num_experts || (h.id_bytes != 1 && h.id_bytes != 2)) damaged(fmt::format("chunk {} with top {}", i, h.top_k));
        auto& l = out.layers[h.layer];
        l.experts = take({n, h.top_k}, h.id_bytes == 1 ? at::kByte : at::kShort);
        if (h.flags & 1) l.weights = take({n, h.top_k}, at::kHalf);
        if (h.flags & 2) {
            l.margin = take({n}, at::kHalf);
            l.entropy = take({n}, at::kHalf);
            l.changed = take({n}, at::kByte);
        }
        if (h.flags & 4) l.dropped = take({n}, at::kByte);
        if (h.flags & 2) {
            l.probability = take({D, facts_.num_experts}, at::kDouble);
        }
    }
    return out;
}

}  // namespace moe::routing
