#include "core/base/log.h"
#include "core/data/byte_stream.h"
#include "core/data/jsonl_shard.h"
#include "tests/unit/data/streams.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <filesystem>

using namespace moe;
using namespace moe::data;
using namespace moe::test;

namespace {
JsonlOptions options_for(const Folder& folder, const std::string& field = "text", bool skip = false) {
    return {folder / "cache", field, skip, "bytes", std::make_shared<ByteTokenizer>()};
}

/// The texts of a file's documents, whole.
std::vector<std::string> texts_of(const std::string& path, const JsonlOptions& options) {
    std::vector<std::string> texts;
    auto shard = open_jsonl_file(path, options, "data.path");
    for (int64_t i = 0; i < shard->index().facts().num_documents; ++i) {
        std::vector<int64_t> ids(size_t(shard->index()[i].tokens));
        shard->read(shard->index()[i], 0, ids);
        REQUIRE(ids.back() == ByteTokenizer::kEndOfDocument);
        texts.push_back(ByteTokenizer().decode(ids));
    }
    return texts;
}

void set_time(const std::string& path, int64_t secs) {
    timespec times[2] = {{secs, 0}, {secs, 0}};
    REQUIRE(utimensat(AT_FDCWD, path.c_str(), times, 0) == 0);
}

size_t count_of(const std::string& text, const std::string& what) {
    size_t count = 0;
    for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++count;
    return count;
}

std::string content_of(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
}
}  // namespace

TEST_CASE("jsonl: every line with a text is a document", "[data][jsonl]") {
    Folder folder;
    folder.write("a.jsonl", "{\"text\": \"one\"}\r\n\n  \t\n{\"id\": 7, \"text\": \"z\\u00e4h\\n\\\"2\\\"\", \"more\": [1, {}]}\n{\"text\": \"\"}\n{\"text\": \"no newline\"}");
    REQUIRE(texts_of(folder / "a.jsonl", options_for(folder)) == std::vector<std::string>{"one", "z\xc3\xa4h\n\"2\"", "no newline"});
    auto shard = open_jsonl_file(folder / "a.jsonl", options_for(folder), "data.path");
    std::vector<int64_t> part(3);
    shard->read(shard->index()[2], 8, part);
    REQUIRE(part == std::vector<int64_t>{'n', 'e', 256});
    shard->read(shard->index()[0], 1, part);
    REQUIRE(part == std::vector<int64_t>{'n', 'e', 256});
}

TEST_CASE("jsonl: data.text_field leads into objects", "[data][jsonl]") {
    Folder folder;
    folder.write("a.jsonl", "{\"text\": \"no\", \"body\": {\"text\": \"yes\", \"b.c\": \"dot\", \"b\": {\"d\": \"deep\"}}, \"body.raw\": \"flat\"}\n");
    auto text = [&](const std::string& field) { return texts_of(folder / "a.jsonl", options_for(folder, field)); };
    using Texts = std::vector<std::string>;
    REQUIRE(text("body.text") == Texts{"yes"});
    REQUIRE(text("body.b.c") == Texts{"dot"});
    REQUIRE(text("body.b.d") == Texts{"deep"});
    REQUIRE(text("body.raw") == Texts{"flat"});
    for (std::string field : {"body", "body.none", "text.more", "body.b.d.e", ".", "none"}) {
        Error e = error_of([&] { text(field); });
        REQUIRE(e.kind() == ErrorKind::data);
        REQUIRE(e.parts().got.find(fmt::format("\"{}\"", field)) != std::string::npos);
    }
    Config config = data_config(folder, "jsonl", folder / "a.jsonl", 8);
    config.data.text_field = "";
    REQUIRE(error_of([&] { open_loader(config, false); }).parts().op == "data.text_field");
    config.data.text_field = "body.b.d";
    REQUIRE(open_loader(config, false)->tokens_per_epoch() == 5);
}

TEST_CASE("jsonl: a malformed line is an error with file and line", "[data][jsonl]") {
    Folder folder;
    std::string good = "{\"text\": \"good\"}\n";
    const std::pair<const char*, const char*> lines[] = {
        {"{\"text\": \"cut", "no JSON"}, {"{\"text\": 3}", "a number"}, {"{\"txt\": \"x\"}", "no field"}, {"[\"text\"]", "no field"},
        {"{\"text\": \"\xff\"}", "no JSON"}, {"{\"text\": \"x\"} {}", "no JSON"}, {"{\"text\": null}", "a null"}, {"\"text\"", "no field"}};
    for (const auto& [line, why] : lines) {
        folder.write("bad.jsonl", good + "\n" + good + line + "\n" + good);
        for (std::string name : {"bad.jsonl", "bad.jsonl.gz"}) {
            if (name.ends_with("gz")) folder.write(name, gzipped(content_of(folder / "bad.jsonl")));
            Error e = error_of([&] { open_jsonl_file(folder / name, options_for(folder), "data.path"); });
            REQUIRE(e.kind() == ErrorKind::data);
            REQUIRE(e.parts().op == "data.path");
            REQUIRE(e.parts().got.find(folder / name + ":4: ") == 0);
            REQUIRE(e.parts().got.find(why) != std::string::npos);
            REQUIRE(e.parts().hint.find("data.bad_lines") != std::string::npos);
        }
        REQUIRE(texts_of(folder / "bad.jsonl", options_for(folder, "text", true)).size() == 3);
    }
    // nothing half-made is left in the cache
    for (const auto& entry : std::filesystem::directory_iterator(folder / "cache/.documents")) {
        std::string name = entry.path().string();
        REQUIRE((name.ends_with(".index") || name.ends_with(".tokens")));
    }
}

TEST_CASE("jsonl: skipped lines are counted and warned of once a file", "[data][jsonl]") {
    Folder folder;
    folder.write("data/a.jsonl", "{\"text\": \"a\"}\nbad\n{\"text\": \"b\"}\n{}\n");
    folder.write("data/b.jsonl.zst", zstandard("{\n{\"text\": \"c\"}\n"));
    folder.write("data/c.jsonl", "{\"text\": \"d\"}\n");
    Config config = data_config(folder, "jsonl", folder / "data", 8);
    REQUIRE(error_of([&] { open_loader(config, false); }).kind() == ErrorKind::data);
    config.data.bad_lines = "skip";
    for (int round = 0; round < 2; ++round) {   // the second time from the cache
        log::set_file(folder / "log.txt");
        auto loader = open_loader(config, false);
        log::close_file(folder / "log.txt");
        REQUIRE(loader->num_bad_lines() == 3);
        REQUIRE(loader->tokens_per_epoch() == 8);
        std::string log = content_of(folder / "log.txt");
        REQUIRE(count_of(log, "are left out") == size_t(2 * (round + 1)));
        REQUIRE(log.find("a.jsonl: 2 of 4 lines are left out, the first is line 2") != std::string::npos);
        REQUIRE(log.find("b.jsonl.zst: 1 of 2 lines are left out, the first is line 1") != std::string::npos);
    }
    config.data.bad_lines = "error";            // what was indexed without them does not hold for this
    REQUIRE(error_of([&] { open_loader(config, false); }).parts().got.find("a.jsonl:2: ") != std::string::npos);
    folder.write("only_bad/a.jsonl", "x\n");
    config = data_config(folder, "jsonl", folder / "only_bad", 8);
    config.data.bad_lines = "skip";
    REQUIRE(error_of([&] { open_loader(config, false); }).kind() == ErrorKind::data);
}

TEST_CASE("jsonl: a line longer than the limit is a bad line, one below it is not", "[data][jsonl][slow]") {
    Folder folder;
    std::string frame = "{\"text\": \"\"}";
    auto line = [&](int64_t bytes) { return frame.substr(0, 10) + std::string(size_t(bytes) - frame.size(), 'x') + "\"}\n"; };
    folder.write("a.jsonl", "{\"text\": \"a\"}\n" + line(kMaxLineBytes + 1) + line(kMaxLineBytes) + "{\"text\": \"b\"}\n");
    REQUIRE(error_of([&] { open_jsonl_file(folder / "a.jsonl", options_for(folder), "data.path"); }).parts().got.find("a.jsonl:2: 32.0 MiB long") != std::string::npos);
    auto shard = open_jsonl_file(folder / "a.jsonl", options_for(folder, "text", true), "data.path");
    REQUIRE(shard->index().facts().num_bad_lines == 1);
    REQUIRE(shard->index().facts().num_documents == 3);
    REQUIRE(shard->index()[1].tokens == kMaxLineBytes - int64_t(frame.size()) + 1);
    std::vector<int64_t> ids(2);
    shard->read(shard->index()[2], 0, ids);
    REQUIRE(ids == std::vector<int64_t>{'b', 256});
}

TEST_CASE("jsonl: gzip and zstd give what the plain file gives", "[data][jsonl]") {
    Folder folder;
    std::vector<std::string> texts = some_texts(57, 3);
    std::string lines = as_jsonl(texts), half = lines.substr(0, lines.size() / 2), rest = lines.substr(lines.size() / 2);
    folder.write("a/x.jsonl", lines);
    folder.write("b/x.jsonl.gz", gzipped(lines));
    folder.write("c/x.jsonl.zst", zstandard(lines));
    folder.write("d/x.json.gz", gzipped(half) + gzipped(rest));          // members and frames in a row
    folder.write("e/x.json.zst", zstandard(half) + zstandard(rest));
    std::vector<std::string> want = texts_of(folder / "a/x.jsonl", options_for(folder));
    REQUIRE(want == texts);
    for (std::string name : {"b/x.jsonl.gz", "c/x.jsonl.zst", "d/x.json.gz", "e/x.json.zst"}) REQUIRE(texts_of(folder / name, options_for(folder)) == want);
    auto stream = [&](const std::string& path) {
        Config config = data_config(folder, "jsonl", "", 32);
        DataSource source;
        source.name = "d";
        source.path = folder / path;
        config.data.sources = {source};
        return open_loader(config, false);
    };
    auto plain = stream("a"), gzip = stream("b"), zst = stream("c");
    Batch batch = plain->next(150, 0, 150);
    REQUIRE(equal(gzip->next(150, 0, 150), batch));
    REQUIRE(equal(zst->next(150, 0, 150), batch));
    REQUIRE(plain->state() == gzip->state());       // a position holds for the documents, however they are stored
}

TEST_CASE("jsonl: more than a buffer of compressed lines comes out whole", "[data][jsonl]") {
    Folder folder;
    std::vector<std::string> texts;
    for (int i = 0; i < 40; ++i) texts.push_back(std::string(size_t(50000 + 7001 * i), char('a' + i % 26)) + std::to_string(i));
    folder.write("x.jsonl.gz", gzipped(as_jsonl(texts)));
    folder.write("x.jsonl.zst", zstandard(as_jsonl(texts)));
    REQUIRE((texts_of(folder / "x.jsonl.gz", options_for(folder)) == texts));
    REQUIRE((texts_of(folder / "x.jsonl.zst", options_for(folder)) == texts));
}

TEST_CASE("jsonl: damaged and truncated files are errors that name the file", "[data][jsonl]") {
    Folder folder;
    std::string lines = as_jsonl(some_texts(200, 5)), gz = gzipped(lines), zst = zstandard(lines), flipped = gz;
    flipped[gz.size() - 6] = char(flipped[gz.size() - 6] ^ 1);            // the checksum
    folder.write("cut.jsonl.gz", gz.substr(0, gz.size() / 2));
    folder.write("cut_end.jsonl.gz", gz.substr(0, gz.size() - 3));
    folder.write("flipped.jsonl.gz", flipped);
    folder.write("plain.jsonl.gz", lines);
    folder.write("cut.jsonl.zst", zst.substr(0, zst.size() / 2));
    folder.write("cut_end.jsonl.zst", zst.substr(0, zst.size() - 1));
    folder.write("plain.jsonl.zst", lines);
    for (std::string name : {"cut.jsonl.gz", "cut_end.jsonl.gz", "flipped.jsonl.gz", "plain.jsonl.gz", "cut.jsonl.zst", "cut_end.jsonl.zst", "plain.jsonl.zst"}) {
        INFO(name);
        JsonlOptions options = options_for(folder, "text", true);          // no bad line, but no data either
        Error e = error_of([&] { open_jsonl_file(folder / name, options, "data.path"); });
        REQUIRE(e.kind() == ErrorKind::data);
        REQUIRE(e.parts().got.find(folder / name) == 0);
        REQUIRE(!e.parts().hint.empty());
    }
    REQUIRE(error_of([&] { open_jsonl_file(folder / "none.jsonl", options_for(folder), "data.path"); }).kind() == ErrorKind::io);
}

TEST_CASE("jsonl: the cache holds for path, size and time, and is made anew when it is torn", "[data][jsonl]") {
    Folder folder;
    using Texts = std::vector<std::string>;
    auto first = gzipped("{\"text\": \"first\"}\n"), other = gzipped("{\"text\": \"other\"}\n");
    folder.write("x.jsonl.gz", first);
    set_time(folder / "x.jsonl.gz", 1000);
    REQUIRE(texts_of(folder / "x.jsonl.gz", options_for(folder)) == Texts{"first"});
    // The same size and time: the cache answers, so the file is not decompressed a second time.
    REQUIRE(first.size() == other.size());
    folder.write("x.jsonl.gz", other);
    set_time(folder / "x.jsonl.gz", 1000);
    REQUIRE(texts_of(folder / "x.jsonl.gz", options_for(folder)) == Texts{"first"});
    set_time(folder / "x.jsonl.gz", 1001);
    REQUIRE(texts_of(folder / "x.jsonl.gz", options_for(folder)) == Texts{"other"});
    for (const auto& entry : std::filesystem::directory_iterator(folder / "cache/.documents")) {
        std::ofstream(entry.path(), std::ios::binary | (entry.path().extension() == ".index" ? std::ios::in : std::ios::trunc)).write("torn", 4);
    }
    REQUIRE(texts_of(folder / "x.jsonl.gz", options_for(folder)) == Texts{"other"});
    for (const auto& entry : std::filesystem::directory_iterator(folder / "cache/.documents")) {
        if (entry.path().extension() == ".tokens") std::filesystem::resize_file(entry.path(), 2);
    }
    REQUIRE(texts_of(folder / "x.jsonl.gz", options_for(folder)) == Texts{"other"});
    folder.write("file", "");
    JsonlOptions nowhere = options_for(folder);
    nowhere.cache_dir = folder / "file/cache";
    Error e = error_of([&] { open_jsonl_file(folder / "x.jsonl.gz", nowhere, "data.path"); });
    REQUIRE(e.kind() == ErrorKind::io);
    REQUIRE(e.parts().op == "data.cache_dir");
}

TEST_CASE("jsonl: a file that changes while it is read is an error", "[data][jsonl]") {
    Folder folder;
    folder.write("x.jsonl", "{\"text\": \"first\"}\n");
    for (std::string later : {"{\"text\": \"fi\"}    \n", "not any longer JSON\n", "short"}) {
        auto shard = open_jsonl_file(folder / "x.jsonl", options_for(folder), "data.path");
        std::vector<int64_t> ids(6);
        folder.write("x.jsonl", later);
        REQUIRE(error_of([&] { shard->read(shard->index()[0], 0, ids); }).kind() == ErrorKind::data);
        folder.write("x.jsonl", "{\"text\": \"first\"}\n");
        shard->read(shard->index()[0], 0, ids);
        REQUIRE(ids.back() == 256);
    }
}

TEST_CASE("jsonl: a folder's other files are not read, and a folder without any is an error", "[data][jsonl]") {
    Folder folder;
    folder.write("data/x.jsonl", "{\"text\": \"yes\"}\n");
    folder.write("data/README.md", "not JSON");
    folder.write("data/about.json", "{\n\"name\": 1\n}\n");
    folder.write("data/.x.jsonl", "not JSON");
    REQUIRE(open_loader(data_config(folder, "jsonl", folder / "data", 8), false)->tokens_per_epoch() == 4);
    folder.write("none/x.txt", "text");
    Error e = error_of([&] { open_loader(data_config(folder, "jsonl", folder / "none", 8), false); });
    REQUIRE(e.kind() == ErrorKind::data);
    REQUIRE(e.parts().got.find("1 files, none of them .jsonl") != std::string::npos);
    REQUIRE(error_of([&] { open_loader(data_config(folder, "jsonl", folder / "nowhere", 8), false); }).kind() == ErrorKind::io);
    folder.write("blank/x.jsonl", "\n\n");
    REQUIRE(error_of([&] { open_loader(data_config(folder, "jsonl", folder / "blank", 8), false); }).kind() == ErrorKind::data);
}

TEST_CASE("jsonl: a source without a path lies below data.path, else below the cache, by subset or name", "[data][jsonl]") {
    Folder folder;
    folder.write("shards/v1_c4/x.jsonl", "{\"text\": \"12\"}\n");
    folder.write("shards/code/x.jsonl", "{\"text\": \"1234\"}\n");
    Config config = data_config(folder, "jsonl", folder / "shards", 4);
    config.data.sources.resize(2);
    config.data.sources[0].name = "c4";
    config.data.sources[0].subset = "v1_c4";
    config.data.sources[1].name = "code";
    auto loader = open_loader(config, false);
    REQUIRE(loader->domains() == std::vector<std::string>{"c4", "code"});
    REQUIRE(loader->tokens_per_epoch() == 8);
    config.data.path.reset();
    REQUIRE(error_of([&] { open_loader(config, false); }).parts().op == "data.sources[0].path");
    config.data.cache_dir = folder / "shards";
    REQUIRE(open_loader(config, false)->state() == loader->state());
}
