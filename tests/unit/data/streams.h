// What the tests of readers and loaders share: configurations, files in several formats, comparison of batches.
#pragma once
#include "core/data/loader.h"
#include "tests/error_of.h"
#include "tests/folder.h"

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>
#include <zlib.h>
#include <zstd.h>

#include <string>
#include <vector>

namespace moe::test {

inline Config data_config(const Folder& folder, const std::string& type, const std::string& path, int64_t seq_length) {
    Config config;
    config.model.vocab_size = 300;
    config.training.seq_length = seq_length;
    config.data.dataset_type = type;
    config.data.cache_dir = folder / "cache";
    if (!path.empty()) config.data.path = path;
    return config;
}

inline bool equal(const data::Batch& a, const data::Batch& b) {
    return at::equal(a.ids, b.ids) && at::equal(a.targets, b.targets) && at::equal(a.domain, b.domain) && at::equal(a.doc_start, b.doc_start) && a.first_sequence == b.first_sequence;
}

/// Texts of odd lengths, the longest about five sequences of 32; all bytes are ASCII.
inline std::vector<std::string> some_texts(int count, int seed) {
    std::vector<std::string> texts;
    for (int d = 0; d < count; ++d) {
        std::string text;
        for (int i = 0; i < 1 + (d * 29 + seed * 13) % 167; ++i) text.push_back(char(32 + (d * 37 + i * 11 + i * i * seed) % 90));
        texts.push_back(text);
    }
    return texts;
}

inline std::string as_jsonl(const std::vector<std::string>& texts) {
    std::string lines;
    for (const auto& t : texts) lines += nlohmann::json{{"id", lines.size()}, {"text", t}}.dump() + "\n";
    return lines;
}

inline std::string gzipped(const std::string& text) {
    z_stream stream{};
    REQUIRE(deflateInit2(&stream, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY) == Z_OK);
    std::string out(deflateBound(&stream, text.size()) + 64, '\0');
    stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
    stream.avail_in = unsigned(text.size());
    stream.next_out = reinterpret_cast<Bytef*>(out.data());
    stream.avail_out = unsigned(out.size());
    REQUIRE(deflate(&stream, Z_FINISH) == Z_STREAM_END);
    out.resize(stream.total_out);
    deflateEnd(&stream);
    return out;
}

inline std::string zstandard(const std::string& text) {
    std::string out(ZSTD_compressBound(text.size()), '\0');
    out.resize(ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
    return out;
}

/// The ids of the texts, each ended by 256 if `ended`, the last one only if `last_ended`.
inline std::vector<int64_t> ids_of(const std::vector<std::string>& texts, bool last_ended = true) {
    std::vector<int64_t> ids;
    for (size_t i = 0; i < texts.size(); ++i) {
        for (char c : texts[i]) ids.push_back(uint8_t(c));
        if (last_ended || i + 1 < texts.size()) ids.push_back(256);
    }
    return ids;
}

template <class T>
std::string raw(const std::vector<int64_t>& ids) {
    std::vector<T> narrow(ids.begin(), ids.end());
    return std::string(reinterpret_cast<const char*>(narrow.data()), narrow.size() * sizeof(T));
}

/// A .npy file as numpy.save writes it: the header is filled up to a multiple of 64 bytes.
inline std::string npy(const std::string& descr, const std::string& shape, const std::string& content, int version = 1) {
    std::string header = "{'descr': '" + descr + "', 'fortran_order': False, 'shape': " + shape + ", }";
    size_t before = version == 1 ? 10 : 12;
    header.append(63 - (before + header.size()) % 64, ' ').push_back('\n');
    std::string out = "\x93NUMPY";
    out += {char(version), '\0', char(header.size() & 255), char(header.size() >> 8)};
    if (version > 1) out += {'\0', '\0'};
    return out + header + content;
}

}  // namespace moe::test
