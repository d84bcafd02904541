#include "core/data/loader.h"
#include "core/data/tokenizer.h"
#include "tests/error_of.h"
#include "tests/folder.h"

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <cmath>
#include <map>

using namespace moe;
using moe::test::error_of;
using namespace moe::data;

namespace {
Config synthetic(int64_t seq_length = 40, int64_t domains = 3) {
    Config config;
    config.model.vocab_size = 97;
    config.training.seq_length = seq_length;
    config.data.synthetic = {domains, 11};
    return config;
}

Config text(const std::string& path, int64_t seq_length) {
    Config config;
    config.model.vocab_size.reset();
    config.training.seq_length = seq_length;
    config.data.dataset_type = "text";
    if (!path.empty()) config.data.path = path;
    return config;
}

DataSource source(const std::string& name, const std::string& path, double weight) {
    DataSource s;
    s.name = name;
    s.path = path;
    s.weight = weight;
    return s;
}

bool same(const Batch& a, const Batch& b) {
    return at::equal(a.ids, b.ids) && at::equal(a.targets, b.targets) && at::equal(a.domain, b.domain) && at::equal(a.doc_start, b.doc_start) && a.first_sequence == b.first_sequence;
}

Batch rows(const Batch& batch, int64_t first, int64_t count) {
    return {batch.ids.narrow(0, first, count), batch.targets.narrow(0, first, count), batch.domain.narrow(0, first, count), batch.doc_start.narrow(0, first, count), batch.first_sequence + first};
}

// A text whose every pair of bytes is unique enough to find a target: byte i of document d.
std::string document_text(int d, int length) {
    std::string text;
    for (int i = 0; i < length; ++i) text.push_back(char((d * 37 + i * 11 + i * i) % 251));
    return text;
}
}  // namespace

TEST_CASE("loader: parts, ranks and call sizes give the same sequences", "[data][loader]") {
    for (bool packing : {true, false}) {
        Config config = synthetic();
        config.data.packing = packing;
        auto whole = open_loader(config, false), parts = open_loader(config, false), single = open_loader(config, false);
        Batch batch = whole->next(12, 0, 12);
        REQUIRE(batch.ids.size(0) == 12);
        REQUIRE(batch.first_sequence == 0);
        REQUIRE(same(parts->next(12, 5, 4), rows(batch, 5, 4)));
        for (int64_t i = 0; i < 12; ++i) REQUIRE(same(single->next(1, 0, 1), rows(batch, i, 1)));
        Batch later = whole->next(3, 0, 3);
        REQUIRE(later.first_sequence == 12);
        REQUIRE(same(parts->next(3, 1, 2), rows(later, 1, 2)));
        REQUIRE(single->next(3, 0, 0).ids.size(0) == 0);
    }
}

TEST_CASE("loader: a restored stream goes on with the next sequence", "[data][loader]") {
    test::Folder folder;
    for (int i = 0; i < 9; ++i) folder.write(fmt::format("{}/{}.txt", i % 2 ? "x" : "y", i), document_text(i, 20 + 13 * i));
    for (Config config : {synthetic(), text(folder.path(), 24)}) {
        auto a = open_loader(config, false);
        for (int i = 0; i < 7; ++i) a->next(5, 0, 1);   // for the text, into its second epoch
        std::string saved = a->state().dump();
        Batch expected = a->next(40, 0, 40);
        auto b = open_loader(config, false);
        b->restore(nlohmann::json::parse(saved));
        REQUIRE(same(b->next(40, 0, 40), expected));
        a->restore(nlohmann::json::parse(saved));
        REQUIRE(same(a->next(40, 0, 40), expected));
        REQUIRE(a->state() == b->state());
    }
}

TEST_CASE("loader: a position of other data is refused", "[data][loader]") {
    auto state = open_loader(synthetic(40), false)->state();
    auto other = open_loader(synthetic(41), false);
    REQUIRE(error_of([&] { other->restore(state); }).kind() == ErrorKind::state);
    auto loader = open_loader(synthetic(40), false);
    state["domains"][0].erase("chunk");
    REQUIRE(error_of([&] { loader->restore(state); }).kind() == ErrorKind::state);
    REQUIRE(error_of([&] { loader->restore(nlohmann::json("x")); }).kind() == ErrorKind::state);
    test::Folder folder;
    folder.write("a.txt", "some text");
    state = open_loader(text(folder.path(), 8), false)->state();
    folder.write("a.txt", "some longer text");
    auto changed = open_loader(text(folder.path(), 8), false);
    REQUIRE(error_of([&] { changed->restore(state); }).kind() == ErrorKind::state);
}

TEST_CASE("loader: shares of the domains follow the weights, by tokens", "[data][loader]") {
    test::Folder folder;
    for (int i = 0; i < 40; ++i) folder.write(fmt::format("a/{}.txt", i), document_text(i, 5 + i));
    folder.write("b.txt", document_text(3, 5000));
    folder.write("c/c.txt", document_text(4, 300));
    folder.write("d.txt", "never");
    Config config = text("", 32);
    config.data.sources = {source("a", folder / "a", 5), source("b", folder / "b.txt", 3), source("c", folder / "c", 2), source("d", folder / "d.txt", 0)};
    auto loader = open_loader(config, false);
    REQUIRE(loader->domains() == std::vector<std::string>{"a", "b", "c", "d"});
    Batch batch = loader->next(200, 0, 200);
    double total = 200 * 32, want[] = {0.5, 0.3, 0.2, 0};
    for (int d = 0; d < 4; ++d) REQUIRE(std::abs(batch.domain.eq(d).sum().item<double>() - want[d] * total) <= 32);
    // and at any time before the end as well
    REQUIRE(std::abs(batch.domain.narrow(0, 0, 10).eq(0).sum().item<double>() - 0.5 * 320) <= 32);
}

TEST_CASE("loader: every token of every document comes once an epoch, with its successor as target", "[data][loader]") {
    test::Folder folder;
    std::vector<std::string> texts;
    for (int i = 0; i < 11; ++i) texts.push_back(document_text(i, 3 + 17 * i));
    int64_t tokens = 0;
    for (size_t i = 0; i < texts.size(); ++i) folder.write(fmt::format("{:02}.txt", i), texts[i]), tokens += int64_t(texts[i].size()) + 1;
    for (bool shuffle : {true, false}) {
        Config config = text(folder.path(), 16);
        config.data.preprocessing.shuffle = shuffle;
        auto loader = open_loader(config, false);
        REQUIRE(loader->tokens_per_epoch() == tokens);
        Batch batch = loader->next(tokens, 0, tokens);   // 16 epochs exactly
        std::map<std::pair<int64_t, int64_t>, int64_t> want, got;
        for (const auto& t : texts) {
            for (size_t i = 0; i + 1 < t.size(); ++i) want[{uint8_t(t[i]), uint8_t(t[i + 1])}] += 16;
            want[{uint8_t(t.back()), 256}] += 16;
            want[{256, -100}] += 16;
        }
        const int64_t *ids = batch.ids.data_ptr<int64_t>(), *targets = batch.targets.data_ptr<int64_t>();
        for (int64_t i = 0; i < batch.ids.numel(); ++i) got[{ids[i], targets[i]}] += 1;
        REQUIRE(got == want);
        REQUIRE(batch.num_valid() == 16 * (tokens - int64_t(texts.size())));
        if (!shuffle) {
            std::vector<int64_t> first(ids, ids + 16);
            REQUIRE(ByteTokenizer().decode(first) == (texts[0] + texts[1]).substr(0, 15));
        }
    }
}

TEST_CASE("loader: shuffling depends on the seed and on the epoch", "[data][loader]") {
    test::Folder folder;
    for (int i = 0; i < 64; ++i) folder.write(fmt::format("{:02}.txt", i), std::string(7, char('0' + i)));
    Config config = text(folder.path(), 8);
    auto a = open_loader(config, false);
    Batch epoch_0 = a->next(64, 0, 64), epoch_1 = a->next(64, 0, 64);
    REQUIRE(!at::equal(epoch_0.ids, epoch_1.ids));
    REQUIRE(at::equal(std::get<0>(epoch_0.ids.select(1, 0).sort()), std::get<0>(epoch_1.ids.select(1, 0).sort())));
    config.data.preprocessing.shuffle_seed = 43;
    REQUIRE(!at::equal(open_loader(config, false)->next(64, 0, 64).ids, epoch_0.ids));
    config.data.preprocessing.shuffle = false;
    Batch plain = open_loader(config, false)->next(64, 0, 64);
    for (int64_t i = 0; i < 64; ++i) REQUIRE(plain.ids[i][0].item<int64_t>() == '0' + i);
}

TEST_CASE("loader: doc_start is where the token's document begins in the sequence", "[data][loader]") {
    test::Folder folder;
    folder.write("a.txt", "aaaa");             // 5 tokens
    folder.write("b.txt", "bb");               // 3 tokens
    folder.write("c.txt", "cccccccccccccccc"); // 17 tokens: goes on in the next sequence
    Config config = text(folder.path(), 12);
    config.data.preprocessing.shuffle = false;
    auto row = [](const at::Tensor& t, int64_t r) { return std::vector<int32_t>(t.data_ptr<int32_t>() + r * 12, t.data_ptr<int32_t>() + (r + 1) * 12); };
    Batch batch = open_loader(config, false)->next(2, 0, 2);
    REQUIRE(row(batch.doc_start, 0) == std::vector<int32_t>{0, 0, 0, 0, 0, 5, 5, 5, 8, 8, 8, 8});
    // The rest of c's first chunk of 12, its second chunk of 5 (one document, two pieces), then nothing of a fits.
    REQUIRE(batch.ids[1][0].item<int64_t>() == 'c');
    REQUIRE(batch.doc_start[1][0].item<int32_t>() == 0);
    REQUIRE(batch.targets[0][11].item<int64_t>() == 'c');
    config.data.document_mask = false;
    REQUIRE(at::equal(open_loader(config, false)->next(2, 0, 2).doc_start, batch.doc_start));      // where pieces begin is told either way
}

TEST_CASE("loader: without packing one document a sequence, padded", "[data][loader]") {
    test::Folder folder;
    folder.write("a.txt", "abc");
    folder.write("b.txt", "0123456789");
    Config config = text(folder.path(), 8);
    config.data.packing = false;
    config.data.preprocessing.shuffle = false;
    Batch batch = open_loader(config, false)->next(4, 0, 4);
    auto row = [](const at::Tensor& t, int64_t r) { auto x = t[r].to(at::kLong); return std::vector<int64_t>(x.data_ptr<int64_t>(), x.data_ptr<int64_t>() + 8); };
    REQUIRE(row(batch.ids, 0) == std::vector<int64_t>{'a', 'b', 'c', 256, 0, 0, 0, 0});
    REQUIRE(row(batch.targets, 0) == std::vector<int64_t>{'b', 'c', 256, -100, -100, -100, -100, -100});
    REQUIRE(row(batch.domain, 0) == std::vector<int64_t>{0, 0, 0, 0, -1, -1, -1, -1});
    REQUIRE(row(batch.doc_start, 0) == std::vector<int64_t>{0, 0, 0, 0, 4, 4, 4, 4});
    REQUIRE(row(batch.targets, 1) == std::vector<int64_t>{'1', '2', '3', '4', '5', '6', '7', '8'});
    REQUIRE(row(batch.ids, 2) == std::vector<int64_t>{'8', '9', 256, 0, 0, 0, 0, 0});
    REQUIRE(row(batch.ids, 3) == row(batch.ids, 0));
    REQUIRE(batch.num_valid() == 3 + 8 + 2 + 3);
}

TEST_CASE("loader: subfolders of data.path are the domains, weighted by their size", "[data][loader]") {
    test::Folder folder;
    folder.write("code/x/a.py", document_text(1, 99));
    folder.write("books/b.txt", document_text(2, 299));
    folder.write("README.md", "not read");
    auto loader = open_loader(text(folder.path(), 10), false);
    REQUIRE(loader->domains() == std::vector<std::string>{"books", "code"});
    REQUIRE(loader->tokens_per_epoch() == 400);
    REQUIRE(loader->next(40, 0, 40).domain.eq(0).sum().item<int64_t>() == 300);
    REQUIRE(open_loader(text(folder / "code/x", 10), false)->domains() == std::vector<std::string>{"x"});
    REQUIRE(open_loader(text(folder / "code/x/", 10), false)->next(1, 0, 1).ids.size(1) == 10);
}

TEST_CASE("loader: validation has data of its own and is the same every time", "[data][loader]") {
    Config config = synthetic();
    Batch training = open_loader(config, false)->next(8, 0, 8), validation = open_loader(config, true)->next(8, 0, 8);
    REQUIRE(!at::equal(training.ids, validation.ids));
    REQUIRE(same(open_loader(config, true)->next(8, 0, 8), validation));
    test::Folder folder;
    folder.write("train/a.txt", document_text(1, 99));
    folder.write("held_out/b.txt", "in order");
    config = text(folder / "train", 9);
    REQUIRE(error_of([&] { open_loader(config, true); }).parts().op == "validation.path");
    config.validation.sources = {source("v", folder / "held_out", 1)};
    Batch batch = open_loader(config, true)->next(2, 0, 2);
    REQUIRE(ByteTokenizer().decode({batch.ids.data_ptr<int64_t>(), 18}) == "in orderin order");
}

TEST_CASE("loader: what cannot be read is an error that says so", "[data][loader]") {
    test::Folder folder;
    folder.write("a.txt", "text");
    auto kind = [](const Config& config) { return error_of([&] { open_loader(config, false); }).kind(); };
    REQUIRE(kind(text(folder / "none", 8)) == ErrorKind::io);
    REQUIRE(kind(text("", 8)) == ErrorKind::config);
    Config config = text(folder.path(), 8);
    config.model.vocab_size = 256;
    Error vocab = error_of([&] { open_loader(config, false); });
    REQUIRE(vocab.kind() == ErrorKind::config);
    REQUIRE(vocab.parts().op == "model.vocab_size");
    config.model.vocab_size = 264;
    REQUIRE(open_loader(config, false)->domains().size() == 1);
    config.data.sources = {source("a", folder / "a.txt", 1)};
    REQUIRE(kind(config) == ErrorKind::config);   // a path and sources
    config.data.path.reset();
    config.data.sources.push_back(source("a", folder / "a.txt", 1));
    REQUIRE(kind(config) == ErrorKind::config);   // one name twice
    config.data.sources[1].name = "b";
    REQUIRE(open_loader(config, false)->domains().size() == 2);
    for (double bad : {-1.0, double(NAN), double(INFINITY)}) {
        config.data.sources[1].weight = bad;
        REQUIRE(kind(config) == ErrorKind::config);
    }
    config.data.sources[0].weight = config.data.sources[1].weight = 0;
    REQUIRE(kind(config) == ErrorKind::config);
    config.data.dataset_type = "parquet";
    REQUIRE(kind(config) == ErrorKind::config);
    config.data.dataset_type = "synthetic";
    REQUIRE(kind(config) == ErrorKind::config);   // a path that would not be read
    auto loader = open_loader(synthetic(), false);
    REQUIRE(error_of([&] { loader->next(4, 2, 3); }).kind() == ErrorKind::shape);
}

TEST_CASE("loader: a failed read loses no sequence", "[data][loader]") {
    test::Folder folder;
    std::string content = document_text(1, 64);
    folder.write("a.txt", content);
    auto loader = open_loader(text(folder / "a.txt", 8), false);
    auto before = loader->state();
    folder.write("a.txt", "short");
    REQUIRE(error_of([&] { loader->next(8, 0, 8); }).kind() == ErrorKind::data);
    REQUIRE(loader->state() == before);
    folder.write("a.txt", content);
    REQUIRE(loader->next(8, 0, 8).first_sequence == 0);
}
