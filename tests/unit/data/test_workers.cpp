#include "core/data/prefetch.h"
#include "tests/unit/data/streams.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <thread>

using namespace moe;
using namespace moe::data;
using namespace moe::test;

namespace {
/// A mixture of two domains of each kind of data.
std::vector<Config> every_kind(const Folder& folder, int64_t seq_length) {
    for (int d = 0; d < 2; ++d) {
        std::vector<std::string> texts = some_texts(19 + 8 * d, 2 + d);
        for (size_t i = 0; i < texts.size(); ++i) folder.write(fmt::format("text/{}/{:02}.txt", d, i), texts[i]);
        folder.write(fmt::format("jsonl/{}/x.jsonl", d), as_jsonl(texts));
        folder.write(fmt::format("gz/{}/x.jsonl.gz", d), gzipped(as_jsonl(texts)));
        folder.write(fmt::format("tokens/{}/x.bin", d), raw<uint16_t>(ids_of(texts)));
    }
    std::vector<Config> configs = {data_config(folder, "text", folder / "text", seq_length), data_config(folder, "jsonl", folder / "jsonl", seq_length),
                                   data_config(folder, "jsonl", folder / "gz", seq_length), data_config(folder, "tokens", folder / "tokens", seq_length),
                                   data_config(folder, "synthetic", "", seq_length)};
    configs.back().data.synthetic.domains = 2;
    return configs;
}

Config with_workers(Config config, int64_t num_workers) {
    config.data.preprocessing.num_workers = num_workers;
    return config;
}

/// Every format holds the same documents, so all but the synthetic one give the same batches.
const int64_t kCalls[] = {3, 1, 8, 8, 2, 13, 1, 5};
}  // namespace

TEST_CASE("workers: their number and the size of a call change nothing", "[data][workers]") {
    Folder folder;
    for (bool packing : {true, false}) {
        Batch of_text;
        for (Config config : every_kind(folder, 32)) {
            config.data.packing = packing;
            auto alone = open_loader(with_workers(config, 0), false);
            Batch all = open_loader(with_workers(config, 0), false)->next(41, 0, 41);
            if (config.data.dataset_type == "text") of_text = all;
            if (config.data.dataset_type != "synthetic") REQUIRE(equal(all, of_text));
            std::vector<std::unique_ptr<Loader>> loaders;
            for (int64_t workers : {1, 2, 5}) loaders.push_back(open_loader(with_workers(config, workers), false));
            for (int64_t n : kCalls) {
                Batch want = alone->next(n, n / 3, n - n / 3);
                for (auto& loader : loaders) {
                    REQUIRE(equal(loader->next(n, n / 3, n - n / 3), want));
                    REQUIRE(loader->state() == alone->state());
                }
                REQUIRE(at::equal(all.ids.narrow(0, want.first_sequence, n - n / 3), want.ids));
            }
        }
    }
}

TEST_CASE("workers: a stream goes on from any position with any number of workers", "[data][workers]") {
    Folder folder;
    for (Config config : every_kind(folder, 7)) {          // odd: documents are cut everywhere
        auto first = open_loader(with_workers(config, 2), false);
        int64_t workers = 0;
        for (int64_t n : kCalls) {
            first->next(n, 0, n);
            std::string saved = first->state().dump();
            auto other = open_loader(with_workers(config, workers++ % 4), false);
            if (n % 2) other->next(4, 0, 4);                // what it has prepared is of no use
            other->restore(nlohmann::json::parse(saved));
            REQUIRE(other->state().dump() == saved);
            Batch want = first->next(9, 0, 9);
            REQUIRE(equal(other->next(9, 0, 9), want));
            first->restore(nlohmann::json::parse(saved));
            Batch again = first->next(4, 0, 4);             // what it had prepared was thrown away
            REQUIRE(at::equal(again.ids, want.ids.narrow(0, 0, 4)));
            REQUIRE(at::equal(again.targets, want.targets.narrow(0, 0, 4)));
        }
    }
}

TEST_CASE("workers: epochs come one after the other, each in an order of its own", "[data][workers]") {
    Folder folder;
    std::vector<std::string> texts;
    for (int i = 0; i < 50; ++i) texts.push_back(std::string(7, char('0' + i)));       // 8 tokens each
    folder.write("x.jsonl", as_jsonl(texts));
    folder.write("x.bin", raw<uint16_t>(ids_of(texts)));
    for (Config config : {data_config(folder, "jsonl", folder / "x.jsonl", 8), data_config(folder, "tokens", folder / "x.bin", 8)}) {
        auto loader = open_loader(with_workers(config, 2), false);
        std::vector<std::vector<int64_t>> epochs;
        for (int epoch = 0; epoch < 3; ++epoch) {
            at::Tensor ids = at::cat({loader->next(20, 0, 20).ids, loader->next(30, 0, 30).ids}).select(1, 0).contiguous();
            epochs.emplace_back(ids.data_ptr<int64_t>(), ids.data_ptr<int64_t>() + 50);
        }
        REQUIRE(epochs[0] != epochs[1]);
        REQUIRE(epochs[1] != epochs[2]);
        for (auto& epoch : epochs) {
            std::sort(epoch.begin(), epoch.end());
            for (int i = 0; i < 50; ++i) REQUIRE(epoch[size_t(i)] == '0' + i);
        }
    }
}

TEST_CASE("workers: an error in a worker is next()'s error, and loses no sequence", "[data][workers]") {
    Folder folder;
    std::string content(400, 'x');
    folder.write("a.txt", content);
    Config config = data_config(folder, "text", folder / "a.txt", 8);
    auto alone = open_loader(with_workers(config, 0), false), loader = open_loader(with_workers(config, 3), false);
    auto before = loader->state();
    folder.write("a.txt", "short");
    Error want = error_of([&] { alone->next(8, 0, 8); }), got = error_of([&] { loader->next(8, 0, 8); });
    REQUIRE(want.kind() == ErrorKind::data);
    REQUIRE(got.kind() == want.kind());
    REQUIRE(std::string(got.what()) == want.what());
    REQUIRE(got.parts().where == want.parts().where);
    REQUIRE(loader->state() == before);
    folder.write("a.txt", content);
    REQUIRE(equal(loader->next(8, 0, 8), alone->next(8, 0, 8)));
    // An error in what was only prepared comes when it is asked for, and is tried again after that.
    folder.write("a.txt", "short");
    auto state = loader->state();
    bool failed = false;
    for (int i = 0; i < 10 && !failed; ++i) {
        try {
            loader->next(5, 0, 5);
            state = loader->state();
        } catch (const Error& e) {
            REQUIRE(e.kind() == ErrorKind::data);
            failed = true;
        }
    }
    REQUIRE(failed);
    REQUIRE(loader->state() == state);
    folder.write("a.txt", content);
    alone->restore(state);
    REQUIRE(equal(loader->next(11, 0, 11), alone->next(11, 0, 11)));
}

TEST_CASE("workers: a loader may end at any time", "[data][workers]") {
    Folder folder;
    std::vector<Config> configs = every_kind(folder, 32);
    for (int round = 0; round < 12; ++round) {
        for (const Config& config : configs) {
            auto loader = open_loader(with_workers(config, 1 + round % 4), false);
            for (int call = 0; call < round % 3; ++call) loader->next(1 + round, 0, 1 + round);
        }
    }
    Config negative = with_workers(configs[0], -1);
    REQUIRE(error_of([&] { open_loader(negative, false); }).parts().op == "data.preprocessing.num_workers");
}

TEST_CASE("workers: sequences in preparation are taken in any order, dropped, and waited for at the end", "[data][workers]") {
    std::atomic<int> made = 0;
    auto make = [&](const std::vector<Piece>& pieces, Row& row) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        MOE_CHECK(pieces[0].length != 13, data, "test", "13", "another number", "");
        row.ids = {pieces[0].length};
        ++made;
    };
    auto pieces = [](int64_t i) { return std::vector<Piece>{Piece{0, 0, 0, i, 0}}; };
    for (int64_t workers : {1, 3}) {
        made = 0;
        Prefetcher prefetcher(workers, make);
        for (int64_t i : {5, 3, 9, 3, 12}) prefetcher.request(i, pieces(i));
        REQUIRE(prefetcher.take(9).ids == std::vector<int64_t>{9});
        REQUIRE(prefetcher.take(3).ids == std::vector<int64_t>{3});
        prefetcher.request(13, pieces(13));
        REQUIRE(error_of([&] { prefetcher.take(13); }).parts().op == "test");
        prefetcher.drop_below(12);
        REQUIRE(error_of([&] { prefetcher.take(5); }).kind() == ErrorKind::internal);
        REQUIRE(prefetcher.take(12).ids == std::vector<int64_t>{12});
        REQUIRE(made == 4);                       // a request that is there already makes nothing twice
        for (int64_t i = 20; i < 200; ++i) prefetcher.request(i, pieces(i));
        prefetcher.clear();
        prefetcher.request(20, pieces(21));
        REQUIRE(prefetcher.take(20).ids == std::vector<int64_t>{21});
        for (int64_t i = 30; i < 200; ++i) prefetcher.request(i, pieces(i));
        prefetcher.take(30);
    }
    REQUIRE(made < 60);                           // the rest was dropped
}

TEST_CASE("workers: sequences_for_tokens counts what next() then gives", "[data][workers]") {
    Folder folder;
    for (Config config : every_kind(folder, 32)) {
        config.data.packing = false;              // rows hold 2 to 32 tokens
        auto loader = open_loader(with_workers(config, 2), false), other = open_loader(with_workers(config, 0), false);
        for (auto [tokens, multiple] : {std::pair<int64_t, int64_t>{100, 1}, {100, 4}, {1, 3}, {0, 2}, {777, 5}, {32, 1}}) {
            auto before = loader->state();
            int64_t count = loader->sequences_for_tokens(tokens, multiple);
            REQUIRE(loader->sequences_for_tokens(tokens, multiple) == count);
            REQUIRE(loader->state() == before);
            REQUIRE(count % multiple == 0);
            REQUIRE(count >= multiple);
            Batch batch = loader->next(count, 0, count);
            at::Tensor tokens_B = batch.domain.ge(0).sum(1);
            REQUIRE(tokens_B.sum().item<int64_t>() >= tokens);
            if (count > multiple) REQUIRE(tokens_B.narrow(0, 0, count - multiple).sum().item<int64_t>() < tokens);
            REQUIRE(equal(other->next(count, 0, count), batch));
        }
        REQUIRE(error_of([&] { loader->sequences_for_tokens(-1, 1); }).kind() == ErrorKind::usage);
        REQUIRE(error_of([&] { loader->sequences_for_tokens(1, 0); }).kind() == ErrorKind::usage);
    }
    Config packed = data_config(folder, "text", folder / "text", 32);
    REQUIRE(open_loader(packed, false)->sequences_for_tokens(1000, 8) == 32);
}

TEST_CASE("loader: a position is of one data set and version", "[data][loader]") {
    Folder folder;
    Config config = every_kind(folder, 32)[1];
    config.data.dataset_name = "allenai/dolma";
    config.data.dataset_version = "v1_6";
    auto state = open_loader(config, false)->state();
    open_loader(config, false)->restore(state);
    config.data.dataset_version = "v1_7";
    REQUIRE(error_of([&] { open_loader(config, false)->restore(state); }).kind() == ErrorKind::state);
    config.data.dataset_version = "v1_6";
    std::vector<std::string> texts = some_texts(19, 2);
    texts[3][0] = char(texts[3][0] ^ 1);                                 // as many texts and as long, one letter is another
    folder.write("jsonl/0/x.jsonl", as_jsonl(texts));
    std::filesystem::last_write_time(folder / "jsonl/0/x.jsonl", std::filesystem::file_time_type::clock::now() + std::chrono::seconds(10));
    REQUIRE(error_of([&] { open_loader(config, false)->restore(state); }).kind() == ErrorKind::state);
}

TEST_CASE("bench: tokens a second of the loader", "[.bench][data]") {
    Folder folder;
    std::vector<std::string> texts;
    int64_t bytes = 0;
    for (int i = 0; bytes < (int64_t(16) << 20); ++i) {
        std::string text;
        int64_t length = int64_t(200 * std::exp(3.5 * double(i * 7919 % 1000) / 1000));     // 200 bytes to 6.6 KB
        for (int64_t j = 0; j < length; ++j) text.push_back(char("etaoin shrdlu\n"[(i * 31 + j * j + j / 7) % 14]));
        bytes += length;
        texts.push_back(std::move(text));
    }
    std::string joined;
    for (const auto& t : texts) joined += t;
    folder.write("text/x.txt", joined);
    folder.write("jsonl/x.jsonl", as_jsonl(texts));
    folder.write("zst/x.jsonl.zst", zstandard(as_jsonl(texts)));
    folder.write("tokens/x.bin", raw<uint16_t>(ids_of(texts)));
    constexpr int64_t kBatch = 16, kLength = 2048;
    for (std::string kind : {"text", "jsonl", "zst", "tokens"}) {
        for (int64_t workers : {0, 2}) {
            Config config = with_workers(data_config(folder, kind == "zst" ? "jsonl" : kind, folder / kind, kLength), workers);
            auto opened = std::chrono::steady_clock::now();
            auto loader = open_loader(config, false);
            double open_secs = std::chrono::duration<double>(std::chrono::steady_clock::now() - opened).count();
            loader->next(kBatch, 0, kBatch);
            int64_t tokens = 0;
            auto start = std::chrono::steady_clock::now();
            double secs = 0;
            while (secs < 1) {
                tokens += loader->next(kBatch, 0, kBatch).ids.numel();
                secs = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
            }
            std::printf("%s\n", nlohmann::ordered_json{{"bench", "loader"}, {"data", kind}, {"workers", workers}, {"open_secs", open_secs}, {"tokens_per_sec", std::round(double(tokens) / secs)}}.dump().c_str());
        }
    }
}
