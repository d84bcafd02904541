#include "core/base/json.h"
#include "core/store/checkpoint.h"
#include "core/store/folder_lock.h"
#include "core/store/safetensors.h"
#include "tests/error_of.h"
#include "tests/folder.h"

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <cstring>
#include <filesystem>
#include <sys/wait.h>
#include <unistd.h>

using namespace moe;
using moe::test::error_of;
using namespace moe::store;
namespace fs = std::filesystem;
using Sizes = std::vector<int64_t>;

namespace {
bool says(const Error& e, const std::string& text) { return std::string(e.what()).find(text) != std::string::npos; }

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
    at::Tensor x = a.contiguous(), y = b.contiguous();
    return x.scalar_type() == y.scalar_type() && x.sizes() == y.sizes() && (x.numel() == 0 || std::memcmp(x.data_ptr(), y.data_ptr(), x.nbytes()) == 0);
}

at::Tensor slice(at::Tensor t, const Sizes& offset, const Sizes& shape) {
    for (size_t d = 0; d < offset.size(); ++d) t = t.slice(int64_t(d), offset[d], offset[d] + shape[d]);
    return t;
}

Piece piece(const std::string& name, const at::Tensor& whole, const Sizes& offset, const Sizes& shape) { return {name, whole.sizes().vec(), offset, slice(whole, offset, shape)}; }
Piece piece(const std::string& name, const at::Tensor& whole) { return {name, whole.sizes().vec(), Sizes(size_t(whole.dim()), 0), whole}; }

CheckpointWriterOptions alone(const std::string& folder) {
    CheckpointWriterOptions o;
    o.folder = folder;
    return o;
}

/// Saves with one writer a rank, as the ranks of a job would.
void save(const std::string& folder, int64_t step, const std::vector<std::vector<Piece>>& ranks, const nlohmann::json& meta = {}, const std::string& path = "") {
    std::vector<std::unique_ptr<CheckpointWriter>> writers;
    for (int r = 0; r < int(ranks.size()); ++r) {
        auto o = alone(folder);
        o.rank = r;
        o.world_size = int(ranks.size());
        o.timeout_secs = 30;
        writers.push_back(std::make_unique<CheckpointWriter>(o));
    }
    for (size_t r = 0; r < ranks.size(); ++r) writers[r]->begin(step, ranks[r], meta, path);
    for (auto& w : writers) w->wait();
}

std::vector<std::string> names_in(const std::string& folder) {
    std::vector<std::string> names;
    for (const auto& saved : complete_checkpoints(folder)) names.push_back(saved.name);
    return names;
}

/// Everything in a folder, hidden names too, sorted.
std::vector<std::string> files_in(const std::string& folder) {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
}
using Names = std::vector<std::string>;

/// Runs f in a process of its own that may die; gives its wait status.
template <class F>
int in_child(F&& f) {
    pid_t child = fork();
    if (child == 0) {
        try {
            f();
        } catch (...) {
            _exit(99);
        }
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

void edit_index(const std::string& folder, const std::function<void(nlohmann::json&)>& change) {
    auto index = read_json(folder + "/index.json");
    change(index);
    write_text(folder + "/index.json", index.dump());
}
}  // namespace

TEST_CASE("checkpoint: rectangles of any cut come back under any other", "[store]") {
    test::Folder folder;
    at::Tensor a = at::rand({5, 7, 6}, at::kDouble), b = at::arange(44).view({11, 4}), c = at::rand({13}).to(at::kBFloat16), scalar = at::scalar_tensor(2.5, at::kDouble), none = at::empty({0, 3});
    std::vector<std::vector<Piece>> two = {
        {piece("a", a, {0, 0, 0}, {5, 3, 6}), piece("a", a, {2, 3, 0}, {3, 4, 6}), piece("b", b, {0, 0}, {11, 1}), piece("scalar", scalar), piece("none", none)},
        {piece("c", c), piece("a", a, {0, 3, 1}, {2, 4, 5}), piece("a", a, {0, 3, 0}, {2, 4, 1}), piece("b", b, {0, 1}, {11, 3})},
    };
    save(folder.path(), 3, two, {{"data", {1, 2}}});
    std::vector<std::vector<Piece>> one = {{piece("a", a), piece("b", b), piece("c", c), piece("scalar", scalar), piece("none", none)}};
    save(folder.path(), 4, one);
    for (const char* name : {"step_3", "step_4"}) {
        Checkpoint saved(folder / name);
        REQUIRE(saved.names() == Names{"a", "b", "c", "none", "scalar"});
        saved.verify();
        REQUIRE(same_bits(saved.read("a"), a));
        REQUIRE(same_bits(saved.read("b"), b));
        REQUIRE(same_bits(saved.read("c"), c));
        REQUIRE(same_bits(saved.read("scalar"), scalar));
        REQUIRE(same_bits(saved.read("none"), none));
        for (auto [begin, size] : {std::pair<int64_t, int64_t>{0, 4}, {4, 4}, {8, 3}}) REQUIRE(same_bits(saved.read("b", {begin, 0}, {size, 4}), b.slice(0, begin, begin + size)));   // three ranks
        for (int64_t i = 0; i < 5; ++i)
            for (int64_t j = 0; j <= 7; ++j) REQUIRE(same_bits(saved.read("a", {i, 0, 2}, {5 - i, j, 3}), slice(a, {i, 0, 2}, {5 - i, j, 3})));
    }
    Checkpoint saved(folder / "step_3");
    REQUIRE(saved.step() == 3);
    REQUIRE(saved.meta().at("data")[1] == 2);
    REQUIRE((saved.shape("a") == Sizes{5, 7, 6}));
    REQUIRE(saved.dtype("c") == at::kBFloat16);
    REQUIRE(error_of([&] { saved.read("aa"); }).kind() == ErrorKind::data);
    REQUIRE(error_of([&] { saved.read("a", {0, 0, 0}, {5, 8, 6}); }).kind() == ErrorKind::shape);
    REQUIRE(error_of([&] { saved.read("a", {0, 0}, {5, 7}); }).kind() == ErrorKind::shape);
    REQUIRE(files_in(folder / "step_3") == Names{"index.json", "rank_0.safetensors", "rank_1.safetensors"});
    REQUIRE(files_in(folder.path()) == Names{"step_3", "step_4"});
}

TEST_CASE("checkpoint: what is saved is what the tensors were at begin, in the background or not", "[store]") {
    test::Folder folder;
    at::Tensor x = at::rand({300, 40}), y = at::rand({7, 9}, at::kDouble).t(), before = x.clone();
    CheckpointWriter writer(alone(folder.path()));
    writer.begin(1, {piece("x", x), piece("y", y)}, {});
    x.zero_();                                                  // training goes on
    writer.wait();
    REQUIRE(!writer.is_writing());
    x.copy_(before);
    writer.begin(2, {piece("x", x), piece("y", y)}, {});
    writer.wait();
    REQUIRE(same_bits(Checkpoint(folder / "step_1").read("x"), before));
    REQUIRE(read_text(folder / "step_1/rank_0.safetensors") == read_text(folder / "step_2/rank_0.safetensors"));
    writer.begin(3, {piece("x", x)}, {});
    writer.begin(4, {piece("x", x)}, {});                       // waits for 3
    writer.wait();
    writer.wait();
    REQUIRE(names_in(folder.path()) == Names{"step_2", "step_3", "step_4"});
}

TEST_CASE("checkpoint: a process that dies at any stage leaves every complete one whole and nothing that looks complete", "[store]") {
    at::Tensor old_x = at::rand({9, 5}), new_x = at::rand({9, 5});
    for (int64_t step : {2, 1}) {                                // a new one, and one that replaces
        for (std::string stage : {"folder", "tensors", "part", "index", "rename", "prune", "end"}) {
            INFO(stage << " of step " << step);
            test::Folder folder;
            save(folder.path(), 1, {{piece("x", old_x)}});
            auto o = alone(folder.path());
            o.keep_last = 1;
            o.on_stage = [&](const std::string& now) {
                if (now == stage) _exit(7);
            };
            int status = in_child([&] {
                CheckpointWriter writer(o);
                writer.begin(step, {piece("x", new_x)}, {});
                writer.wait();
            });
            REQUIRE(status == (stage == "end" ? 0 : 7));
            bool is_new = stage == "prune" || stage == "end";
            auto saved = complete_checkpoints(folder.path());
            REQUIRE(saved.size() == (step == 2 && stage == "prune" ? 2 : 1));
            Checkpoint last(saved.back().path);
            REQUIRE(last.step() == (is_new ? step : 1));
            REQUIRE(same_bits(last.read("x"), is_new ? new_x : old_x));
            for (const auto& entry : fs::directory_iterator(folder.path()))
                if (entry.path().extension() == ".partial") REQUIRE(error_of([&] { Checkpoint(entry.path().string()); }).kind() == ErrorKind::data);
            CheckpointWriter next(alone(folder.path()));
            for (const auto& file : files_in(folder.path())) REQUIRE(file.starts_with("step_"));
            REQUIRE(complete_checkpoints(folder.path()).size() == saved.size());
            next.begin(3, {piece("x", old_x)}, {});
            next.wait();
            REQUIRE(last_checkpoint(folder.path())->name == "step_3");
        }
    }
}

TEST_CASE("checkpoint: one that stepped aside for another is found, and comes back", "[store]") {
    test::Folder folder;
    at::Tensor x = at::rand({3});
    save(folder.path(), 5, {{piece("x", x)}});
    fs::rename(folder / "step_5", folder / ".step_5.old");
    REQUIRE(names_in(folder.path()) == Names{"step_5"});
    REQUIRE(same_bits(Checkpoint(last_checkpoint(folder.path())->path).read("x"), x));
    { CheckpointWriter writer(alone(folder.path())); }
    REQUIRE(files_in(folder.path()) == Names{"step_5"});
    fs::copy(folder / "step_5", folder / ".step_5.old");         // the new one was in place already
    fs::create_directories(folder / ".step_4.removed");
    { CheckpointWriter writer(alone(folder.path())); }
    REQUIRE(files_in(folder.path()) == Names{"step_5"});
    REQUIRE(same_bits(Checkpoint(folder / "step_5").read("x"), x));
}

TEST_CASE("checkpoint: a full disk is one error with what is needed and free, and leaves nothing behind", "[store]") {
    test::Folder folder;
    at::Tensor x = at::rand({64, 64});
    save(folder.path(), 1, {{piece("x", x)}});
    bool is_full = true;
    for (int failing : {0, 1}) {
        std::vector<std::unique_ptr<CheckpointWriter>> writers;
        for (int r = 0; r < 2; ++r) {
            auto o = alone(folder.path());
            o.rank = r;
            o.world_size = 2;
            o.timeout_secs = 30;
            o.on_stage = [&, r](const std::string& stage) {
                if (is_full && r == failing && stage == "tensors") fs::create_symlink("/dev/full", folder / fmt::format(".step_2.partial/rank_{}.safetensors", r));
            };
            writers.push_back(std::make_unique<CheckpointWriter>(o));
        }
        is_full = true;
        for (int r = 0; r < 2; ++r) writers[size_t(r)]->begin(2, {piece("x", x, {32 * r, 0}, {32, 64})}, {});
        Error e = error_of([&] { writers[size_t(failing)]->wait(); });
        REQUIRE(e.kind() == ErrorKind::io);
        REQUIRE((says(e, "8.0 KiB are needed") && says(e, "are free there") && says(e, "No space left")));
        if (failing == 1) REQUIRE(says(error_of([&] { writers[0]->wait(); }), "rank 1: "));
        else writers[1]->wait();                                 // its own part was written
        writers[0]->wait();                                      // an error is thrown once
        REQUIRE(files_in(folder.path()) == Names{"step_1"});
        REQUIRE(same_bits(Checkpoint(folder / "step_1").read("x"), x));
        is_full = false;
        for (int r = 0; r < 2; ++r) writers[size_t(r)]->begin(2, {piece("x", x, {32 * r, 0}, {32, 64})}, {});
        for (auto& w : writers) w->wait();
        REQUIRE(same_bits(Checkpoint(folder / "step_2").read("x"), x));
        fs::remove_all(folder / "step_2");
    }
}

TEST_CASE("checkpoint: rank 0 waits for all parts of this save, and not for ever", "[store]") {
    test::Folder folder;
    at::Tensor x = at::rand({4});
    auto o = alone(folder.path());
    o.world_size = 2;
    o.timeout_secs = 0.05;
    o.id = "second attempt";
    CheckpointWriter writer(o);
    // What rank 1 of a dead attempt left; rank 0 has cleared away before, so it is put there now.
    folder.write(".step_1.partial/rank_1.json", R"({"token": "first attempt 1", "file": "rank_1.safetensors", "bytes": 1, "tensors": {}})");
    folder.write(".step_1.partial/rank_7.safetensors", "old");
    writer.begin(1, {piece("x", x)}, {});
    Error e = error_of([&] { writer.wait(); });
    REQUIRE((e.kind() == ErrorKind::io && says(e, "nothing from rank 1")));
    REQUIRE(files_in(folder.path()).empty());
    o.world_size = 1;
    CheckpointWriter single(o);
    folder.write(".step_1.partial/rank_7.safetensors", "old");
    single.begin(1, {piece("x", x)}, {});
    single.wait();
    REQUIRE(files_in(folder / "step_1") == Names{"index.json", "rank_0.safetensors"});
}

TEST_CASE("checkpoint: parts that are missing, overlap or contradict each other make no checkpoint", "[store]") {
    test::Folder folder;
    at::Tensor x = at::rand({4, 2});
    CheckpointWriter writer(alone(folder.path()));
    auto fails = [&](const std::vector<Piece>& pieces) {
        return error_of([&] {
            writer.begin(1, pieces, {});
            writer.wait();
        });
    };
    Error e = fails({piece("x", x, {0, 0}, {3, 2})});
    REQUIRE((e.kind() == ErrorKind::state && says(e, "6 of x's 8 elements")));
    REQUIRE(fails({piece("x", x), piece("x", x, {3, 1}, {1, 1})}).kind() == ErrorKind::usage);
    REQUIRE(fails({{"x", {4, 2}, {1, 0}, x}}).kind() == ErrorKind::usage);                 // sticks out
    REQUIRE(fails({{"x", {4, 2}, {0}, x}}).kind() == ErrorKind::usage);                    // dims
    REQUIRE(fails({piece("x", x, {0, 0}, {2, 2}), piece("x", x.to(at::kDouble), {2, 0}, {2, 2})}).kind() == ErrorKind::usage);
    REQUIRE(fails({{"x", {4, 2}, {0, 0}, at::Tensor()}}).kind() == ErrorKind::usage);
    REQUIRE(fails({piece("x", x.to(at::kComplexFloat))}).kind() == ErrorKind::dtype);
    REQUIRE(error_of([&] { save(folder.path(), 1, {{piece("x", x, {0, 0}, {2, 2})}, {piece("x", x.to(at::kDouble), {2, 0}, {2, 2})}}); }).kind() == ErrorKind::data);
    REQUIRE(error_of([&] { save(folder.path(), 1, {{piece("x", x)}, {piece("x", x)}}); }).kind() == ErrorKind::state);
    REQUIRE(files_in(folder.path()).empty());
    CheckpointWriter without({});
    REQUIRE(error_of([&] { without.begin(1, {}, {}); }).kind() == ErrorKind::usage);
    auto none_kept = alone(folder.path());
    none_kept.keep_last = 0;
    REQUIRE(error_of([&] { CheckpointWriter bad(none_kept); }).kind() == ErrorKind::usage);
}

TEST_CASE("checkpoint: missing, partial and foreign folders are errors that say which", "[store]") {
    test::Folder folder;
    save(folder / "run/checkpoints", 7, {{piece("x", at::rand({3}))}});
    auto opened = [&](const std::string& name) { return error_of([&] { Checkpoint c(folder / name); }); };
    REQUIRE((opened("none").kind() == ErrorKind::io && says(opened("none"), "No such file")));
    REQUIRE(opened("run/checkpoints/step_7/index.json").kind() == ErrorKind::io);
    REQUIRE((opened("run").kind() == ErrorKind::data && says(opened("run"), "its checkpoints are in")));
    REQUIRE(says(opened("run/checkpoints"), "step_7"));
    fs::create_directories(folder / "run/checkpoints/step_8");
    REQUIRE((opened("run/checkpoints/step_8").kind() == ErrorKind::data && says(opened("run/checkpoints/step_8"), "not complete") && says(opened("run/checkpoints/step_8"), "step_7")));
    folder.write("a/index.json", R"({"weight_map": {}})");
    REQUIRE((opened("a").kind() == ErrorKind::data && says(opened("a"), "another program")));
    folder.write("a/index.json", R"({"format": "moelab checkpoint", "version": 99})");
    REQUIRE((opened("a").kind() == ErrorKind::data && says(opened("a"), "version 99")));
    folder.write("a/index.json", "[1]");
    REQUIRE(opened("a").kind() == ErrorKind::data);
    std::string text = read_text(folder / "run/checkpoints/step_7/index.json");
    for (size_t size = 0; size + 1 < text.size(); size += 7) {
        folder.write("a/index.json", text.substr(0, size));
        REQUIRE(opened("a").kind() == ErrorKind::data);
    }
    REQUIRE(complete_checkpoints(folder / "nowhere").empty());
    REQUIRE(!last_checkpoint(folder / "nowhere"));
    REQUIRE(names_in(folder / "run/checkpoints") == Names{"step_7"});
    REQUIRE_NOTHROW(Checkpoint(folder / "run/checkpoints/step_7/"));
}

TEST_CASE("checkpoint: corrupt, truncated and incomplete files are found and named", "[store]") {
    test::Folder folder;
    at::Tensor x = at::rand({16}), y = at::rand({16});
    save(folder.path(), 1, {{piece("x", x)}, {piece("y", y)}});
    std::string path = folder / "step_1/rank_1.safetensors", bytes = read_text(path);
    bytes[bytes.size() - 10] ^= 1;
    folder.write("step_1/rank_1.safetensors", bytes);
    Checkpoint saved(folder / "step_1");
    REQUIRE(same_bits(saved.read("x"), x));
    for (auto read : {+[](const Checkpoint& c) { c.read("y", {0}, {1}); }, +[](const Checkpoint& c) { c.verify(); }}) {
        Error e = error_of([&] { read(Checkpoint(folder / "step_1")); });
        REQUIRE((e.kind() == ErrorKind::data && says(e, "rank_1.safetensors: y: corrupt")));
    }
    fs::resize_file(path, bytes.size() - 1);
    Error e = error_of([&] { Checkpoint(folder / "step_1"); });
    REQUIRE((e.kind() == ErrorKind::data && says(e, "truncated") && says(e, "rank_1.safetensors")));
    fs::remove(path);
    e = error_of([&] { Checkpoint(folder / "step_1"); });
    REQUIRE((e.kind() == ErrorKind::data && says(e, "rank_1.safetensors")));
    // A file of the right size with another tensor in it.
    save_safetensors(path, {{"z", y}});
    REQUIRE(fs::file_size(path) == bytes.size());
    REQUIRE(error_of([&] { Checkpoint(folder / "step_1").verify(); }).kind() == ErrorKind::data);
    save(folder.path(), 1, {{piece("x", x, {0}, {8}), piece("x", x, {8}, {8})}});
    std::vector<std::function<void(nlohmann::json&)>> changes = {
        [](auto& j) { j["tensors"]["x"]["pieces"].erase(1); },
        [](auto& j) { j["tensors"]["x"]["pieces"][1]["offset"][0] = 7; },
        [](auto& j) { j["tensors"]["x"]["pieces"][1]["offset"][0] = 9; },
        [](auto& j) { j["tensors"]["x"]["pieces"][1]["offset"][0] = -1; },
        [](auto& j) { j["tensors"]["x"]["pieces"][1]["offset"] = 8; },
        [](auto& j) { j["tensors"]["x"]["shape"] = {int64_t(1) << 62, 8}; },
        [](auto& j) { j["tensors"]["x"]["dtype"] = "F31"; },
        [](auto& j) { j["tensors"]["x"]["pieces"][1]["file"] = "../step_1/rank_0.safetensors"; },
        [](auto& j) { j["files"]["../x"] = 3; },
        [](auto& j) { j["tensors"]["x"]["pieces"][1].erase("crc32c"); },
        [](auto& j) { j.erase("tensors"); },
        [](auto& j) { j.erase("step"); },
    };
    for (size_t i = 0; i < changes.size(); ++i) {
        INFO("change " << i);
        save(folder.path(), 1, {{piece("x", x, {0}, {8}), piece("x", x, {8}, {8})}});
        edit_index(folder / "step_1", changes[i]);
        Error e = error_of([&] { Checkpoint(folder / "step_1"); });
        REQUIRE((e.kind() == ErrorKind::data && says(e, "index.json")));
    }
    save(folder.path(), 1, {{piece("x", x)}});
    edit_index(folder / "step_1", [](auto& j) { j["note"] = "sorted keys on one line, as another program would write it"; });
    REQUIRE(names_in(folder.path()) == Names{"step_1"});
    REQUIRE(same_bits(Checkpoint(folder / "step_1").read("x"), x));
}

TEST_CASE("checkpoint: one saved again replaces the old one, and nothing else is ever replaced", "[store]") {
    test::Folder folder;
    at::Tensor x = at::rand({3}), y = at::rand({5});
    for (std::string path : {"", "mid", "other/place"}) {
        std::string full = path.empty() ? "" : folder / path, at = path.empty() ? folder / "step_2" : full;
        save(folder.path(), 2, {{piece("x", x)}, {piece("z", y)}}, {}, full);
        save(folder.path(), 2, {{piece("y", y)}}, {}, full);
        REQUIRE(Checkpoint(at).names() == Names{"y"});
        REQUIRE(files_in(at) == Names{"index.json", "rank_0.safetensors"});
    }
    REQUIRE(files_in(folder.path()) == Names{"mid", "other", "step_2"});
    folder.write("home/letter.txt", "dear");
    folder.write("web/index.json", "{}");
    folder.write("file", "");
    for (const char* taken : {"home", "web", "file", ".hidden"}) REQUIRE(error_of([&] { save(folder.path(), 2, {{piece("x", x)}}, {}, folder / taken); }).kind() == ErrorKind::usage);
    REQUIRE(read_text(folder / "home/letter.txt") == "dear");
    fs::create_directories(folder / "empty");
    save(folder.path(), 2, {{piece("x", x)}}, {}, folder / "empty/");
    REQUIRE(Checkpoint(folder / "empty").names() == Names{"x"});
}

TEST_CASE("checkpoint: the newest stay, by attempt and step; named ones always do", "[store]") {
    test::Folder folder;
    at::Tensor x = at::rand({3});
    auto o = alone(folder.path());
    o.keep_last = 2;
    {
        CheckpointWriter writer(o);
        for (int64_t step : {9, 10, 11}) {
            writer.begin(step, {piece("x", x)}, {});
            if (step == 9) writer.begin(step, {piece("x", x)}, {}, folder / "named");
        }
    }
    REQUIRE(names_in(folder.path()) == Names{"named", "step_10", "step_11"});
    // A run that resumed from step 10 and has not reached 11 yet: what it saves is newer.
    o.attempt = 1;
    o.keep_last = 1;
    CheckpointWriter writer(o);
    REQUIRE(names_in(folder.path()).size() == 3);                // nothing goes before there is something newer
    writer.begin(10, {piece("x", x)}, {});
    writer.wait();
    REQUIRE(names_in(folder.path()) == Names{"named", "step_10"});
    REQUIRE(last_checkpoint(folder.path())->attempt == 1);
    REQUIRE(is_periodic_name("step_0"));
    for (const char* name : {"step_", "step_1a", "step", "last", "step_-1"}) REQUIRE(!is_periodic_name(name));
}

TEST_CASE("folder lock: one holder, and the death of a process ends it", "[store]") {
    test::Folder folder;
    {
        FolderLock lock(folder.path());
        Error e = error_of([&] { FolderLock second(folder.path()); });
        REQUIRE((e.kind() == ErrorKind::state && says(e, "another run of this process")));
        REQUIRE(in_child([&] { FolderLock second(folder.path()); }) == 99);
    }
    int ready[2];
    REQUIRE(pipe(ready) == 0);
    pid_t child = fork();
    if (child == 0) {
        FolderLock lock(folder.path());
        (void)!write(ready[1], "x", 1);
        pause();
    }
    char byte;
    REQUIRE(read(ready[0], &byte, 1) == 1);
    Error e = error_of([&] { FolderLock second(folder.path()); });
    REQUIRE((e.kind() == ErrorKind::state && says(e, fmt::format("process {}", child))));
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    FolderLock again(folder.path());
    close(ready[0]);
    close(ready[1]);
    REQUIRE(error_of([&] { FolderLock none(folder / "none"); }).kind() == ErrorKind::io);
}
