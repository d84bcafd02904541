// Going on from a checkpoint: bit for bit, in new processes, after deaths at any moment, with changed settings.
#include "core/base/error.h"
#include "core/base/json.h"
#include "core/config/load.h"
#include "core/metrics/run_log.h"
#include "core/train/resume.h"
#include "core/train/run.h"
#include "tests/unit/train/saved_runs.h"

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <spawn.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

using namespace moe;
using namespace moe::train;
using test::error_of, test::mentions, test::saved_often, test::silent;
namespace fs = std::filesystem;

extern char** environ;

namespace {
/// The whole state as bytes.
std::string state_bytes(Run& run) {
    std::string bytes;
    for (const auto& p : pieces_of(run.model())) {
        Tensor t = p.tensor().contiguous();
        bytes += p.name;
        bytes.append(static_cast<const char*>(t.const_data_ptr()), t.nbytes());
    }
    for (const auto& name : run.model().store().names()) {
        Tensor t = run.model().store().value(name).contiguous();
        bytes.append(static_cast<const char*>(t.const_data_ptr()), t.nbytes());
    }
    return bytes;
}

/// The same of a checkpoint's tensors.
std::map<std::string, std::string> stored_bytes(const std::string& path) {
    store::Checkpoint saved(path);
    std::map<std::string, std::string> all;
    for (const auto& name : saved.names()) {
        Tensor t = saved.read(name);
        all[name].assign(static_cast<const char*>(t.const_data_ptr()), t.nbytes());
    }
    return all;
}

/// This program again, with the hidden case below: trains the configuration in a file up to `steps`, from the last checkpoint where there
/// is one. Returns its process.
pid_t start_child(const test::Folder& folder, int64_t steps) {
    std::string program = fs::read_symlink("/proc/self/exe"), name = "child: trains to a step", config = "MOELAB_CHILD_CONFIG=" + folder / "child.json", last = "MOELAB_CHILD_STEPS=" + std::to_string(steps);
    std::vector<char*> variables;
    for (char** v = environ; *v; ++v)
        if (!std::string(*v).starts_with("MOELAB_TEST_REPORT=")) variables.push_back(*v);
    for (auto* text : {&config, &last}) variables.push_back(text->data());
    variables.push_back(nullptr);
    std::vector<char*> words = {program.data(), name.data(), nullptr};
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 1, (folder / "child.log").c_str(), O_WRONLY | O_CREAT | O_APPEND, 0666);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    pid_t child = -1;
    int failed = posix_spawn(&child, program.c_str(), &actions, nullptr, words.data(), variables.data());
    posix_spawn_file_actions_destroy(&actions);
    REQUIRE(failed == 0);
    return child;
}

int exit_code(pid_t child) {
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

void save_config(const test::Folder& folder, const Config& config) { folder.write("child.json", to_json(config).dump()); }

/// Kills children at random moments until one has trained to the end; nothing complete is lost, nothing corrupt is loaded, and the
/// end is that of a run that nothing happened to.
void survive(int num_kills, int64_t num_steps) {
    test::Folder folder, calm;
    Config c = saved_often(folder);
    c.training.train_steps = num_steps;
    c.training.save_interval = 1;
    c.checkpointing.keep_last = 2;
    save_config(folder, c);
    Config undisturbed = c;
    undisturbed.output_dir = calm.path();
    undisturbed.checkpointing.enabled = false;
    Run reference(undisturbed, silent());
    reference.train(num_steps);
    std::string want = reference.save();
    std::mt19937 random(5);
    int64_t reached = 0;
    // While a child lives, what is listed may be pruned before it is opened.
    auto newest = [&](bool verify) {
        int64_t step = 0;
        for (const auto& name : fs::exists(folder / "often") ? std::vector<fs::path>(fs::directory_iterator(folder / "often"), {}) : std::vector<fs::path>())
            for (const auto& saved : store::complete_checkpoints((name / "checkpoints").string())) {
                if (verify) store::Checkpoint(saved.path).verify();
                step = std::max(step, saved.step);
            }
        return step;
    };
    for (int kill_number = 0; kill_number < num_kills; ++kill_number) {
        pid_t child = start_child(folder, num_steps);
        // Half of them while it saves step after step, half at any time, while it starts too.
        auto start = std::chrono::steady_clock::now(), until = start + std::chrono::milliseconds(kill_number % 2 ? random() % 1500 : 20000);
        int64_t enough = reached + 1 + int64_t(random() % 4);
        while (std::chrono::steady_clock::now() < until && (kill_number % 2 || newest(false) < std::min(enough, num_steps))) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 20000));
        kill(child, SIGKILL);
        exit_code(child);
        int64_t now = newest(true);
        REQUIRE(now >= reached);
        reached = now;
    }
    REQUIRE(exit_code(start_child(folder, num_steps)) == 0);
    REQUIRE(newest(true) == num_steps);
    REQUIRE((stored_bytes(find_checkpoint("last", folder.path(), "often")) == stored_bytes(want)));
}
}  // namespace

TEST_CASE("child: trains to a step", "[.child]") {
    const char* path = std::getenv("MOELAB_CHILD_CONFIG");
    if (!path) return;
    Config c = load_config(path);
    RunOptions o = silent();
    try {
        o.resume = find_checkpoint("last", c.output_dir, c.experiment_name);
    } catch (const Error&) {
        o.resume = "";
    }
    Run run(c, o);
    int64_t steps = std::stoll(std::getenv("MOELAB_CHILD_STEPS"));
    if (run.current_step() < steps) run.train(steps - run.current_step());
    run.close();
}

TEST_CASE("resume: 20 steps are 10, a save, a new process and 10 more, bit for bit", "[train]") {
    for (std::string precision : {"fp64", "bf16", "fp16"}) {
        INFO(precision);
        test::Folder folder, other;
        Config c = saved_often(folder);
        c.training.use_fp64 = precision == "fp64";
        c.training.use_bf16 = precision == "bf16";
        c.training.use_fp16 = precision == "fp16";                // with a loss scale
        if (precision == "bf16") {
            c.training.optimizer = "muon";
            c.training.moments_dtype = "bf16";
        }
        if (precision == "fp16") c.training.batch_size_ramp = BatchSizeRamp{2, 5 * 4 * c.training.seq_length};
        c.training.train_steps = 20;
        save_config(folder, c);
        REQUIRE(exit_code(start_child(folder, 10)) == 0);
        std::string half = find_checkpoint("last", folder.path(), "often");
        REQUIRE(store::Checkpoint(half).step() == 10);
        Config straight = c;
        straight.output_dir = other.path();
        Run whole(straight, silent());
        whole.train(10);
        whole.wait_here();
        REQUIRE((stored_bytes(whole.folder() + "/checkpoints/step_10") == stored_bytes(half)));
        // Here: a fresh object in this process, and another process for the same steps.
        Run again(c, silent("last"));
        REQUIRE(again.current_step() == 10);
        REQUIRE(again.attempt() == 1);
        REQUIRE(state_bytes(again) == state_bytes(whole));
        for (int i = 0; i < 10; ++i) {
            StepMetrics a = whole.step(), b = again.step();
            REQUIRE(a.loss == b.loss);
            REQUIRE(a.grad_norm == b.grad_norm);
            REQUIRE(a.tokens == b.tokens);
            REQUIRE(whole.loss_scale().state() == again.loss_scale().state());
            REQUIRE(at::equal(whole.last_counts(), again.last_counts()));
        }
        REQUIRE(state_bytes(again) == state_bytes(whole));
        for (int64_t layer : whole.model().routed_layers()) {
            REQUIRE(at::equal(whole.model().bias(layer), again.model().bias(layer)));
            REQUIRE(whole.model().bias(layer).abs().max().item<double>() > 0);
        }
        again.close();
        fs::remove_all(again.folder() + "/checkpoints/step_20");
        REQUIRE(exit_code(start_child(folder, 20)) == 0);
        REQUIRE((stored_bytes(find_checkpoint("last", folder.path(), "often")) == stored_bytes(whole.folder() + "/checkpoints/step_20")));
    }
}

TEST_CASE("resume: the same folder goes on, with the next attempt and an event", "[train]") {
    test::Folder folder;
    Config c = saved_often(folder);
    c.training.save_interval = 3;
    std::string run_folder;
    {
        Run run(c, silent());
        run.train(4);
        run_folder = run.folder();
        REQUIRE(run.attempt() == 0);
        run.wait_here();
        Error e = error_of([&] { Run second(c, silent(run_folder)); });
        REQUIRE((e.kind() == ErrorKind::state && mentions(e, run_folder)));
    }
    c.training.learning_rate = 5e-3;
    Run run(c, silent("last"));
    REQUIRE(fs::equivalent(run.folder(), run_folder));
    REQUIRE(run.current_step() == 3);
    run.train(2);
    metrics::Reader reader(run.folder() + "/metrics");
    reader.poll();
    auto loss = reader.column("loss");
    REQUIRE((loss.steps == std::vector<int64_t>{1, 2, 3, 4, 5}));
    REQUIRE((loss.attempts == std::vector<int64_t>{0, 0, 0, 1, 1}));
    std::ifstream events(run.folder() + "/events.jsonl");
    std::string line;
    REQUIRE(std::getline(events, line));
    auto event = nlohmann::json::parse(line);
    REQUIRE(event["event"] == "resume");
    REQUIRE(event["step"] == 3);
    REQUIRE(event["attempt"] == 1);
    REQUIRE(event["changes"][0]["key"] == "training.learning_rate");
    REQUIRE(event["changes"][0]["new"] == 5e-3);
    REQUIRE(read_json(run.folder() + "/config.json")["training"]["learning_rate"] == 5e-3);
    REQUIRE(read_json(run.folder() + "/config.before_attempt_1.json")["training"]["learning_rate"] == 1e-2);
    REQUIRE(fs::exists(run.folder() + "/env.attempt_1.json"));
    run.save("mid");
    REQUIRE(store::Checkpoint(run.folder() + "/checkpoints/mid").meta()["events"][0]["event"] == "resume");
    run.close();
    REQUIRE(error_of([&] { run.step(); }).kind() == ErrorKind::state);
    REQUIRE(error_of([&] { run.save(); }).kind() == ErrorKind::state);
    // Elsewhere: another experiment gets a folder of its own, and leaves the old one alone.
    c.experiment_name = "branch";
    Run branch(c, silent(run.folder() + "/checkpoints/mid"));
    REQUIRE(fs::path(branch.folder()).parent_path().filename() == "branch");
    REQUIRE(branch.current_step() == 5);
    REQUIRE(branch.attempt() == 2);
    branch.train(1);
}

TEST_CASE("resume: what may not change is one error with every key and both values", "[train]") {
    test::Folder folder;
    Config c = saved_often(folder);
    {
        Run run(c, silent());
        run.train(1);
        run.save();
    }
    Config other = c;
    other.seed = 12;
    other.model.moe.num_experts_per_token = 3;
    other.training.optimizer = "sgd";
    other.training.learning_rate = 1e-3;
    Error e = error_of([&] { Run run(other, silent("last")); });
    REQUIRE(e.kind() == ErrorKind::config);
    for (const char* part : {"seed", "12", "11", "model.moe.num_experts_per_token", "training.optimizer", "sgd", "adamw"}) REQUIRE(mentions(e, part));
    REQUIRE(!mentions(e, "learning_rate"));
    Config free = c;
    free.training.learning_rate = 1e-3;
    free.training.lr_decay_style = "constant";
    free.training.train_steps = 99;
    free.training.micro_batch_size = 4;
    free.training.save_interval = 7;
    free.data.preprocessing.num_workers = 0;
    free.logging.console = false;
    free.checkpointing.keep_last = 1;
    Run run(free, silent("last"));
    REQUIRE(run.num_steps() == 99);
    // Every entry of the table is a key or a section.
    for (const auto& key : changeable_keys()) REQUIRE_NOTHROW(help(key));
}

TEST_CASE("resume: a run goes on with its products in another precision, from the same master weights and moments", "[train]") {
    for (std::string precision : {"fp32", "bf16"}) {
        INFO("saved in " << precision);
        test::Folder folder;
        Config c = saved_often(folder);
        c.training.use_fp64 = false;
        c.training.use_bf16 = precision == "bf16";
        Run first(c, silent());
        first.train(3);
        std::string saved = first.save("here");
        StepMetrics a = first.step();
        first.close();
        c.training.use_bf16 = !c.training.use_bf16;
        Run second(c, silent(saved));
        CHECK(second.model().options().precision.compute == (c.training.use_bf16 ? at::kBFloat16 : at::kFloat));
        std::string again = second.save("again");
        second.wait_here();
        CHECK((stored_bytes(again) == stored_bytes(saved)));
        StepMetrics b = second.step();
        CHECK(a.tokens == b.tokens);
        CHECK(a.loss != b.loss);
        CHECK(b.loss == Approx(a.loss).epsilon(5e-3));
    }
}

TEST_CASE("resume: a checkpoint is found by path, by name and as the last", "[train]") {
    test::Folder folder;
    Config c = saved_often(folder);
    c.training.save_interval = 2;
    std::string first, second;
    {
        Run run(c, silent());
        run.train(3);
        REQUIRE(run.save("mid") == fs::absolute(run.folder() + "/checkpoints/mid"));
        REQUIRE(run.save("./" + (fs::relative(folder / "elsewhere")).string()) == folder / "elsewhere");
        first = run.folder();
        for (const char* bad : {"last", "step_9", ".x"}) REQUIRE(error_of([&] { run.save(bad); }).kind() == ErrorKind::usage);
        Run later(c, silent());
        later.train(2);
        second = later.folder();
    }
    auto found = [&](const std::string& what) { return fs::weakly_canonical(find_checkpoint(what, folder.path(), "often")).string(); };
    auto at = [](const std::string& path) { return fs::weakly_canonical(path).string(); };
    REQUIRE(found("last") == at(second + "/checkpoints/step_2"));
    REQUIRE(found("mid") == at(first + "/checkpoints/mid"));
    REQUIRE(found("step_2") == at(second + "/checkpoints/step_2"));
    REQUIRE(found(first) == at(first + "/checkpoints/mid"));              // step 3
    REQUIRE(found(first + "/checkpoints/") == at(first + "/checkpoints/mid"));
    REQUIRE(found(first + "/checkpoints/step_2") == at(first + "/checkpoints/step_2"));
    REQUIRE(fs::weakly_canonical(find_checkpoint("last", folder.path(), "")).string() == at(second + "/checkpoints/step_2"));
    Error e = error_of([&] { found("mit"); });
    REQUIRE((e.kind() == ErrorKind::io && mentions(e, "did you mean \"mid\"?")));
    REQUIRE(error_of([&] { find_checkpoint("last", folder.path(), "nobody"); }).kind() == ErrorKind::io);
    REQUIRE(error_of([&] { find_checkpoint("", folder.path(), "often"); }).kind() == ErrorKind::usage);
    REQUIRE(error_of([&] { Run run(c, silent(folder / "none")); }).kind() == ErrorKind::io);
    fs::remove_all(second + "/checkpoints");
    REQUIRE(found("last") == at(first + "/checkpoints/mid"));
    REQUIRE(error_of([&] { found(second); }).kind() == ErrorKind::io);
    Run elsewhere(c, silent(folder / "elsewhere"));                       // belongs to the run that saved it
    REQUIRE(fs::equivalent(elsewhere.folder(), first));
    REQUIRE(elsewhere.current_step() == 3);
}

TEST_CASE("resume: corrupt, partial and foreign checkpoints are refused with their file", "[train]") {
    test::Folder folder;
    Config c = saved_often(folder);
    std::string path;
    {
        Run run(c, silent());
        run.train(1);
        path = run.save("x");
    }
    auto refused = [&] { return error_of([&] { Run run(c, silent(path)); }); };
    std::string file = path + "/rank_0.safetensors", bytes = read_text(file), index = read_text(path + "/index.json");
    std::string damaged = bytes;
    damaged[damaged.size() / 2] ^= 4;
    std::ofstream(file, std::ios::binary) << damaged;
    REQUIRE((refused().kind() == ErrorKind::data && mentions(refused(), "rank_0.safetensors")));
    std::ofstream(file, std::ios::binary) << bytes.substr(0, bytes.size() - 5);
    REQUIRE((refused().kind() == ErrorKind::data && mentions(refused(), "truncated")));
    std::ofstream(file, std::ios::binary) << bytes;
    auto changed = nlohmann::json::parse(index);
    changed["meta"].erase("updates");
    std::ofstream(path + "/index.json") << changed;
    REQUIRE((refused().kind() == ErrorKind::data && mentions(refused(), "updates")));
    changed = nlohmann::json::parse(index);
    changed["tensors"].erase("lm_head.weight");
    changed["tensors"]["surplus"] = changed["tensors"]["model.norm.weight"];
    std::ofstream(path + "/index.json") << changed;
    REQUIRE((refused().kind() == ErrorKind::data && mentions(refused(), "lm_head.weight") && mentions(refused(), "surplus")));
    fs::remove(path + "/index.json");
    REQUIRE((refused().kind() == ErrorKind::data && mentions(refused(), "not complete")));
    std::ofstream(path + "/index.json") << index;
    REQUIRE_NOTHROW(Run(c, silent(path)));
}

TEST_CASE("resume: killed ten times at random moments, a run loses nothing and ends the same", "[train]") { survive(10, 200); }
TEST_CASE("resume: killed a hundred times at random moments, a run loses nothing and ends the same", "[train][slow]") { survive(100, 2000); }
