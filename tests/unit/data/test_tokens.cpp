#include "core/data/token_shard.h"
#include "tests/unit/data/streams.h"

#include <filesystem>

using namespace moe;
using namespace moe::data;
using namespace moe::test;

namespace {
TokenOptions options_in(const Folder& folder, int64_t vocab_size = 300) { return {folder / "cache", 256, vocab_size}; }

std::vector<std::vector<int64_t>> documents_of(const std::string& path, const TokenOptions& options) {
    auto shard = open_token_file(path, options, "data.path");
    std::vector<std::vector<int64_t>> documents;
    for (int64_t i = 0; i < shard->index().facts().num_documents; ++i) {
        documents.emplace_back(size_t(shard->index()[i].tokens));
        shard->read(shard->index()[i], 0, documents.back());
    }
    return documents;
}

std::string shape_of(const std::vector<int64_t>& ids) { return fmt::format("({},)", ids.size()); }
}  // namespace

TEST_CASE("tokens: every type of .npy and .bin gives the documents that text gives", "[data][tokens]") {
    Folder folder;
    std::vector<std::string> texts = some_texts(23, 7);
    for (size_t i = 0; i < texts.size(); ++i) folder.write(fmt::format("text/{:02}.txt", i), texts[i]);
    std::vector<int64_t> ids = ids_of(texts);
    folder.write("u2/x.npy", npy("<u2", shape_of(ids), raw<uint16_t>(ids)));
    folder.write("i4/x.npy", npy("<i4", shape_of(ids), raw<int32_t>(ids), 2));
    folder.write("u4/x.npy", npy("<u4", shape_of(ids), raw<uint32_t>(ids), 3));
    folder.write("i8/x.npy", npy("<i8", shape_of(ids), raw<int64_t>(ids)));
    folder.write("unaligned/x.npy", std::string("\x93NUMPY\x01\0\x3b\0", 10) + fmt::format("{{'shape':({},),'descr':'<i8','fortran_order':True}}", ids.size()).append(59, ' ').substr(0, 59) + raw<int64_t>(ids));
    folder.write("raw2/x.bin", raw<uint16_t>(ids));
    folder.write("raw4/x.bin", raw<uint32_t>(ids));
    folder.write("raw4/x.json", "{\"dtype\": \"uint32\"}");
    folder.write("not_ended/x.bin", raw<uint16_t>(ids_of(texts, false)));
    // Two files, the first one ends inside the stream of documents.
    std::vector<std::string> begin(texts.begin(), texts.begin() + 9), rest(texts.begin() + 9, texts.end());
    folder.write("two/1.npy", npy("<u2", shape_of(ids_of(begin, false)), raw<uint16_t>(ids_of(begin, false))));
    folder.write("two/2.bin", raw<uint16_t>(ids_of(rest)));
    auto stream = [&](const std::string& type, const std::string& path) {
        Config config = data_config(folder, type, "", 32);
        DataSource source;
        source.name = "d";
        source.path = folder / path;
        config.data.sources = {source};
        return open_loader(config, false);
    };
    for (bool from_cache : {false, true}) {
        Batch want = stream("text", "text")->next(90, 0, 90);
        for (std::string name : {"u2", "i4", "u4", "i8", "unaligned", "raw2", "raw4", "not_ended", "two", "u2/x.npy"}) {
            INFO(name << from_cache);
            auto loader = stream("tokens", name);
            REQUIRE(loader->tokens_per_epoch() == int64_t(ids.size()));
            REQUIRE(equal(loader->next(90, 0, 90), want));
        }
    }
}

TEST_CASE("tokens: documents end at the end-of-document id, empty ones are left out", "[data][tokens]") {
    Folder folder;
    using Documents = std::vector<std::vector<int64_t>>;
    folder.write("x.bin", raw<uint16_t>({256, 1, 2, 256, 256, 3, 256, 256, 4}));
    REQUIRE((documents_of(folder / "x.bin", options_in(folder)) == Documents{{1, 2, 256}, {3, 256}, {4, 256}}));
    folder.write("x.json", "{\"dtype\": \"uint16\", \"eod\": 2}");    // another tokenizer's
    REQUIRE((documents_of(folder / "x.bin", options_in(folder)) == Documents{{256, 1, 2}, {256, 256, 3, 256, 256, 4, 2}}));
    folder.write("none.npy", npy("<i8", "(3,)", raw<int64_t>({5, 6, 7})));
    REQUIRE((documents_of(folder / "none.npy", options_in(folder)) == Documents{{5, 6, 7, 256}}));
    folder.write("none.json", "{\"eod\": 6}");
    REQUIRE((documents_of(folder / "none.npy", options_in(folder)) == Documents{{5, 6}, {7, 6}}));
    folder.write("long.npy", npy("<i4", "(3,)", raw<int32_t>({5, 99999, 256})));
    REQUIRE((documents_of(folder / "long.npy", options_in(folder, 100000)) == Documents{{5, 99999, 256}}));
}

TEST_CASE("tokens: an id outside of the vocabulary is an error with file and position", "[data][tokens]") {
    Folder folder;
    folder.write("big.bin", raw<uint16_t>({1, 2, 256, 299, 300, 7}));
    folder.write("negative.npy", npy("<i4", "(4,)", raw<int32_t>({1, 400, -5, 256})));
    for (int round = 0; round < 2; ++round) {       // found, then known from the cache
        Error big = error_of([&] { open_token_file(folder / "big.bin", options_in(folder), "data.path"); });
        REQUIRE(big.kind() == ErrorKind::data);
        REQUIRE(big.parts().got == folder / "big.bin" + ": id 300 at position 4");
        REQUIRE(big.parts().want.find("[0, 300)") != std::string::npos);
        REQUIRE(big.parts().hint.find("vocabulary mismatch") != std::string::npos);
        Error negative = error_of([&] { open_token_file(folder / "negative.npy", options_in(folder), "data.path"); });
        REQUIRE(negative.parts().got == folder / "negative.npy" + ": id -5 at position 2");
    }
    REQUIRE(documents_of(folder / "big.bin", options_in(folder, 301)).size() == 2);
    // The vocabulary of the model counts, not the tokenizer's; but documents have to end.
    Config config = data_config(folder, "tokens", folder / "big.bin", 4);
    REQUIRE(error_of([&] { open_loader(config, false); }).kind() == ErrorKind::data);
    config.model.vocab_size = 301;
    REQUIRE(open_loader(config, false)->tokens_per_epoch() == 7);
    folder.write("small.bin", raw<uint16_t>({1, 2, 3}));
    config = data_config(folder, "tokens", folder / "small.bin", 4);
    config.model.vocab_size = 10;
    Error end = error_of([&] { open_loader(config, false); });
    REQUIRE(end.kind() == ErrorKind::data);
    REQUIRE(end.parts().got.find("end-of-document id 256") != std::string::npos);
    folder.write("small.json", "{\"eod\": 0}");
    REQUIRE(open_loader(config, false)->tokens_per_epoch() == 4);
}

TEST_CASE("tokens: a truncated shard is an error with its bytes and the bytes wanted", "[data][tokens]") {
    Folder folder;
    std::vector<int64_t> ids = {1, 2, 3, 256};
    std::string whole = npy("<i4", "(4,)", raw<int32_t>(ids));
    folder.write("cut.npy", whole.substr(0, whole.size() - 3));
    folder.write("header.npy", whole.substr(0, 40));
    folder.write("tail.npy", whole + "x");
    folder.write("odd.bin", raw<uint16_t>(ids) + "x");
    folder.write("odd4.bin", raw<uint32_t>(ids).substr(0, 14));
    folder.write("odd4.json", "{\"dtype\": \"uint32\"}");
    auto parts = [&](const std::string& name) {
        Error e = error_of([&] { open_token_file(folder / name, options_in(folder), "data.path"); });
        REQUIRE(e.kind() == ErrorKind::data);
        REQUIRE(e.parts().op == "data.path");
        REQUIRE(e.parts().got.find(folder / name) == 0);
        return e.parts().got.substr((folder / name).size()) + " | " + e.parts().want;
    };
    REQUIRE(parts("cut.npy") == fmt::format(": {} bytes | {} bytes for 4 ids", whole.size() - 3, whole.size()));
    REQUIRE(parts("tail.npy") == fmt::format(": {} bytes | {} bytes for 4 ids", whole.size() + 1, whole.size()));
    REQUIRE(parts("header.npy") == fmt::format(": 40 bytes | {} bytes for its header alone", whole.size() - 16));
    REQUIRE(parts("odd.bin") == ": 9 bytes | 10 bytes, a multiple of 2");
    REQUIRE(parts("odd4.bin") == ": 14 bytes | 16 bytes, a multiple of 4");
    REQUIRE(error_of([&] { open_token_file(folder / "gone.bin", options_in(folder), "data.path"); }).kind() == ErrorKind::io);
}

TEST_CASE("tokens: other arrays and other files are errors that say what is read", "[data][tokens]") {
    Folder folder;
    std::string eight(8, '\0');
    const std::pair<const char*, const char*> arrays[] = {{"<f8", "(1,)"}, {">u2", "(4,)"}, {"|u1", "(8,)"}, {"<i8", "()"}, {"<u2", "(2, 2)"}, {"<u2", "(-4,)"}, {"<u2", "(99999999999999999999,)"}, {"<i8", "(4611686018427387904,)"}};
    for (const auto& [descr, shape] : arrays) {
        folder.write("x.npy", npy(descr, shape, eight));
        INFO(descr << " " << shape);
        Error e = error_of([&] { open_token_file(folder / "x.npy", options_in(folder), "data.path"); });
        REQUIRE(e.kind() == ErrorKind::data);
        REQUIRE(e.parts().want.find("one dimension") != std::string::npos);
    }
    for (std::string content : {"", "PK\x03\x04 no array at all", "\x93NUMPY"}) {
        folder.write("x.npy", content);
        REQUIRE(error_of([&] { open_token_file(folder / "x.npy", options_in(folder), "data.path"); }).kind() == ErrorKind::data);
    }
    folder.write("x.bin", eight);
    for (std::string sidecar : {"{\"dtype\": \"int8\"}", "{\"eod\": \"x\"}", "{\"eod\": -1}", "{\"dtypes\": \"uint16\"}", "[]", "{"}) {
        folder.write("x.json", sidecar);
        INFO(sidecar);
        REQUIRE(error_of([&] { open_token_file(folder / "x.bin", options_in(folder), "data.path"); }).kind() == ErrorKind::data);
    }
    folder.write("empty/x.bin", "");
    REQUIRE(error_of([&] { open_loader(data_config(folder, "tokens", folder / "empty", 8), false); }).kind() == ErrorKind::data);
    folder.write("none/x.txt", "text");
    REQUIRE(error_of([&] { open_loader(data_config(folder, "tokens", folder / "none", 8), false); }).kind() == ErrorKind::data);
}

TEST_CASE("tokens: a shard that shrinks while it is read is an error", "[data][tokens]") {
    Folder folder;
    folder.write("x.bin", raw<uint16_t>({1, 2, 3, 256}));
    auto shard = open_token_file(folder / "x.bin", options_in(folder), "data.path");
    std::vector<int64_t> ids(4);
    std::filesystem::resize_file(folder / "x.bin", 2);
    REQUIRE(error_of([&] { shard->read(shard->index()[0], 0, ids); }).kind() == ErrorKind::data);
}

TEST_CASE("tokens: a file or a folder is a domain, with a label on every token and its share", "[data][tokens]") {
    Folder folder;
    auto write = [&](const std::string& name, int64_t id, int documents) {
        std::vector<int64_t> ids;
        for (int d = 0; d < documents; ++d) {
            ids.insert(ids.end(), size_t(3 + d % 17), id);
            ids.push_back(256);
        }
        folder.write(name, raw<uint16_t>(ids));
    };
    write("shards/a/1.bin", 10, 40);
    write("shards/a/2.bin", 10, 9);
    write("shards/b/1.bin", 20, 25);
    write("c.bin", 30, 31);
    auto check = [&](const Config& config, const std::vector<double>& shares) {
        auto loader = open_loader(config, false);
        Batch batch = loader->next(200, 0, 200);
        REQUIRE(batch.domain.ge(0).all().item<bool>());
        REQUIRE(at::equal(batch.domain.to(at::kLong).mul(10).add(10), at::where(batch.ids.eq(256), batch.domain.to(at::kLong).mul(10).add(10), batch.ids)));
        for (size_t d = 0; d < shares.size(); ++d) REQUIRE(std::abs(batch.domain.eq(int64_t(d)).sum().item<double>() - shares[d] * 3200) <= 16);
        REQUIRE(at::equal(batch.targets.eq(-100), batch.ids.eq(256)));    // everything else has its successor
    };
    Config config = data_config(folder, "tokens", "", 16);
    for (std::string name : {"shards/a", "shards/b", "c.bin"}) {
        DataSource source;
        source.name = name;
        source.path = folder / name;
        source.weight = name == "c.bin" ? 2 : 1;
        config.data.sources.push_back(source);
    }
    check(config, {0.25, 0.25, 0.5});
    Config by_folder = data_config(folder, "tokens", folder / "shards", 16);
    double a = 0, b = 0;
    for (int d = 0; d < 40; ++d) a += 4 + d % 17;
    for (int d = 0; d < 9; ++d) a += 4 + d % 17;
    for (int d = 0; d < 25; ++d) b += 4 + d % 17;
    check(by_folder, {a / (a + b), b / (a + b)});
}
