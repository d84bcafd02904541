// When a run saves and where, and runs that begin with stored weights.
#include "core/base/error.h"
#include "core/base/stop.h"
#include "core/store/safetensors.h"
#include "core/train/resume.h"
#include "core/train/run.h"
#include "tests/unit/train/saved_runs.h"

#include <ATen/ATen.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

using namespace moe;
using namespace moe::train;
using test::error_of, test::mentions, test::saved_often, test::silent;
namespace fs = std::filesystem;

namespace {
using Names = std::vector<std::string>;
}  // namespace

TEST_CASE("checkpointing: by interval, at the end, with the newest kept, in the folder that was asked for", "[train]") {
    test::Folder folder;
    Config c = saved_often(folder);
    c.training.train_steps = 7;
    c.training.save_interval = 2;
    c.checkpointing.keep_last = 2;
    auto saved = [&](const Config& config) {
        Run run(config, silent());
        run.train(7);
        run.close();
        Names names;
        for (const auto& s : store::complete_checkpoints(checkpoint_folder(config, run.folder()))) names.push_back(s.name);
        return names;
    };
    REQUIRE((saved(c) == Names{"step_6", "step_7"}));
    c.checkpointing.async = false;
    c.checkpointing.dir = folder / "far";
    REQUIRE((saved(c) == Names{"step_6", "step_7"}));
    REQUIRE(fs::exists(folder / "far/often"));
    REQUIRE(store::Checkpoint(find_checkpoint("last", c.output_dir, "often")).step() == 7);
    c.checkpointing.save_on_exit = false;
    REQUIRE((saved(c) == Names{"step_4", "step_6"}));
    c.checkpointing.enabled = false;
    REQUIRE(saved(c).empty());
}

TEST_CASE("checkpointing: a file called stop, or a signal's wish, ends training after a save", "[train]") {
    test::Folder folder;
    Config c = saved_often(folder);
    Run run(c, silent());
    REQUIRE(StopListener::any());
    run.train(2, [&](const StepMetrics& m) { return true; });
    folder.write("ignored", "");
    std::ofstream(run.folder() + "/stop") << "";
    run.train(10);
    REQUIRE(run.current_step() == 3);
    REQUIRE(run.is_stopping());
    REQUIRE(!fs::exists(run.folder() + "/stop"));
    REQUIRE(store::last_checkpoint(run.folder() + "/checkpoints")->step == 3);
    run.train(10);
    REQUIRE(run.current_step() == 3);
    run.close();
    Run again(c, silent("last"));
    request_stop();
    again.train(10);
    clear_stop();
    REQUIRE(again.current_step() == 4);
    REQUIRE(store::last_checkpoint(run.folder() + "/checkpoints")->step == 4);
}

TEST_CASE("checkpointing: a disk that is full ends the run with its error, earlier checkpoints stay", "[train]") {
    test::Folder folder;
    Config c = saved_often(folder);
    c.training.save_interval = 2;
    Run run(c, silent());
    run.train(2);
    REQUIRE_NOTHROW(run.save());
    fs::remove_all(run.folder() + "/checkpoints/step_4");
    std::ofstream(run.folder() + "/checkpoints/.step_4.partial") << "a file where the folder should be";
    Error e = error_of([&] { run.train(4); });
    REQUIRE((e.kind() == ErrorKind::io && mentions(e, "step_4")));
    REQUIRE(run.current_step() <= 6);
    REQUIRE(store::last_checkpoint(run.folder() + "/checkpoints")->step == 2);
}

TEST_CASE("init_from: weights and biases of a checkpoint or of safetensors, step 0, a fresh optimizer; names and shapes must fit", "[train]") {
    test::Folder folder;
    Config c = saved_often(folder);
    Run trained(c, silent());
    trained.train(3);
    std::string path = trained.save("base");
    store::NamedTensors plain;
    for (const auto& name : trained.model().store().names()) plain.emplace_back(name, trained.model().store().value(name).clone());
    for (int64_t layer : trained.model().routed_layers()) plain.emplace_back(Model::bias_name(layer), trained.model().bias(layer).clone());
    fs::create_directories(folder / "plain");
    store::save_safetensors(folder / "plain/model.safetensors", plain);
    Config from = c;
    from.training.learning_rate = 1e-4;
    from.training.min_learning_rate = 0;
    RunOptions no_folder = silent();
    no_folder.log_folder = false;
    for (const std::string& source : {path, trained.folder(), folder / "plain"}) {
        INFO(source);
        from.training.init_from = source;
        Run run(from, no_folder);
        REQUIRE(run.current_step() == 0);
        for (const auto& [name, tensor] : plain)
            if (run.model().store().has(name)) REQUIRE(at::equal(run.model().store().value(name), tensor));
        for (int64_t layer : run.model().routed_layers()) REQUIRE(at::equal(run.model().bias(layer), trained.model().bias(layer)));
        for (const auto& p : pieces_of(run.model()))
            if (p.name.starts_with("optimizer/")) REQUIRE(p.data.abs().max().item<double>() == 0);
        run.train(1);
    }
    from.training.init_from = path;
    Config wider = from, fewer = from, more = from;
    wider.model.moe.expert_intermediate_size = 16;
    fewer.model.moe.num_experts = 4;
    more.model.num_layers = 4;
    Error e = error_of([&] { Run run(wider, no_folder); });
    REQUIRE((e.kind() == ErrorKind::data && mentions(e, "[16, 48]") && mentions(e, "[12, 48]")));
    e = error_of([&] { Run run(fewer, no_folder); });
    REQUIRE((e.kind() == ErrorKind::data && mentions(e, "experts.4")));
    e = error_of([&] { Run run(more, no_folder); });
    REQUIRE((e.kind() == ErrorKind::data && (mentions(e, "model.layers.4.") || mentions(e, "model.layers.3."))));     // its MTP module is layer 4, the checkpoint's is 3
    from.training.init_from = folder / "none";
    REQUIRE(error_of([&] { Run run(from, no_folder); }).kind() == ErrorKind::io);
}
