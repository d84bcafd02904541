#include "core/base/error.h"
#include "core/config/load.h"
#include "core/config/names.h"
#include "core/config/not_built.h"
#include "tests/catch.h"

#include <nlohmann/json.hpp>

#include <set>

using namespace moe;

namespace {
Config over(const std::vector<std::string>& assignments, const Config& base = {}) { return with_overrides(base, assignments); }

std::vector<std::string> paths(const Config& c) {
    std::vector<std::string> out;
    for (const Problem& p : problems(c)) out.push_back(p.path);
    return out;
}

std::vector<std::string> wrong(const std::vector<std::string>& assignments) { return paths(over(assignments)); }

std::string refusal(const Config& c) {
    try {
        require_built(c);
    } catch (const Error& e) {
        CHECK(e.kind() == ErrorKind::config);
        return e.what();
    }
    return "";
}

using Paths = std::vector<std::string>;
}  // namespace

TEST_CASE("check: the defaults are valid and built", "[config][check]") {
    CHECK(problems(Config()).empty());
    CHECK_NOTHROW(validate(Config()));
    CHECK_NOTHROW(require_built(Config()));
}

TEST_CASE("check: each contradiction is found, and nothing else", "[config][check]") {
    CHECK(wrong({"model.moe.num_experts_per_token=9"}) == Paths{"model.moe.num_experts_per_token"});
    CHECK(wrong({"model.moe.num_experts_per_token=8"}).empty());
    CHECK(wrong({"model.moe.n_group=3"}) == Paths{"model.moe.n_group"});
    CHECK(wrong({"model.moe.topk_group=2"}) == Paths{"model.moe.topk_group"});
    CHECK(wrong({"model.moe.n_group=4", "model.moe.topk_group=1"}).empty());                                           // 2 experts for top-2
    CHECK(wrong({"model.moe.n_group=4", "model.moe.topk_group=1", "model.moe.num_experts_per_token=3"}) == Paths{"model.moe.topk_group"});
    CHECK(wrong({"model.moe.n_group=8", "model.moe.topk_group=2"}) == Paths{"model.moe.n_group"});                      // groups of one
    CHECK(wrong({"model.moe.n_group=8", "model.moe.topk_group=2", "model.moe.use_aux_loss_free=false"}).empty());
    CHECK(wrong({"model.moe.shared_intermediate_size=64"}) == Paths{"model.moe.shared_intermediate_size"});
    CHECK(wrong({"model.moe.balance_loss_weight=0.1"}) == Paths{"model.moe.balance_loss_weight"});
    CHECK(wrong({"model.mla.num_kv_heads=3"}) == Paths{"model.mla.num_kv_heads"});
    CHECK(wrong({"model.mla.num_kv_heads=4"}).empty());
    CHECK(wrong({"model.mla.qk_rope_head_dim=33"}) == Paths{"model.mla.qk_rope_head_dim"});
    CHECK(wrong({"training.seq_length=8192"}) == Paths{"training.seq_length"});
    CHECK(wrong({"training.micro_batch_size=3"}) == Paths{"training.global_batch_size"});
    CHECK(wrong({"distributed.data_parallel_size=3"}) == Paths{"training.global_batch_size"});
    CHECK(wrong({"training.use_bf16=true", "training.use_fp64=true"}) == Paths{"training.use_fp64"});
    CHECK(wrong({"training.min_learning_rate=1"}) == Paths{"training.min_learning_rate"});
    CHECK(wrong({"training.train_steps=5", "training.lr_warmup_steps=6"}) == Paths{"training.lr_warmup_steps"});
    CHECK(wrong({"training.use_mtp=true", "training.num_predict_tokens=1"}) == Paths{"training.num_predict_tokens"});
    CHECK(wrong({"training.recompute=norm"}) == Paths{"training.recompute"});
    CHECK(wrong({"distributed.expert_parallel_size=3"}) == Paths{"distributed.expert_parallel_size"});
    CHECK(wrong({"distributed.expert_parallel_size=4", "distributed.data_parallel_size=2"}) == Paths{"distributed.expert_parallel_size"});
    CHECK(wrong({"distributed.data_parallel_size=0"}) == Paths{"distributed.data_parallel_size"});
    CHECK(wrong({"distributed.tensor_parallel_size=3"}) == Paths{"distributed.tensor_parallel_size"});
    CHECK(wrong({"distributed.pipeline_parallel_size=13"}) == Paths{"distributed.pipeline_parallel_size"});
    CHECK(wrong({"distributed.zero_offload=true"}) == Paths{"distributed.zero_offload"});
    CHECK(wrong({"data.dataset_type=text"}) == Paths{"data.path"});
    CHECK(wrong({"data.dataset_type=text", "data.path=/x"}).empty());
    CHECK(wrong({"data.dataset_type=text", "data.path=/x", "data.text_field=body.text", "data.bad_lines=skip", "validation.enabled=true"}) == Paths{"validation.path"});
    CHECK(wrong({"data.dataset_type=text", R"(data.sources=[{"name": "a"}])"}) == Paths{"data.sources[0].path"});
    CHECK(wrong({R"(data.sources=[{"name": "a"}, {"name": "a"}])"}) == Paths{"data.sources[1].name"});
    CHECK(wrong({R"(data.sources=[{"name": "a", "weight": 0}])"}) == Paths{"data.sources"});
    CHECK(wrong({"training.batch_size_ramp={\"start\": 8, \"tokens\": 9}", "training.dynamic_batch_tokens=100"}) == Paths{"training.dynamic_batch_tokens"});
    CHECK(wrong({"training.batch_size_ramp={\"start\": 65, \"tokens\": 9}"}) == Paths{"training.batch_size_ramp.start"});
    CHECK(wrong({"training.optimizer=muon", "distributed.tensor_parallel_size=2"}).empty());
    CHECK(wrong({"training.optimizer=muon", "distributed.expert_parallel_size=2"}).empty());
    CHECK(wrong({"deepspeed.enabled=true", "deepspeed.zero_optimization.stage=2"}) == Paths{"deepspeed.zero_optimization.stage"});
    CHECK(wrong({"deepspeed.enabled=true", "deepspeed.bf16.enabled=true", "training.use_bf16=true"}).empty());
}

TEST_CASE("check: ranges and choices are checked, with the nearest word", "[config][check]") {
    CHECK(wrong({"model.num_layers=0"}) == Paths{"model.num_layers", "distributed.pipeline_parallel_size"});
    CHECK(wrong({"model.moe.dropout=1"}) == Paths{"model.moe.dropout"});
    CHECK(wrong({"training.adam_eps=0"}) == Paths{"training.adam_eps"});
    CHECK(wrong({"model.moe.capacity_factor=0"}) == Paths{"model.moe.capacity_factor"});
    CHECK(wrong({"distributed.zero_stage=4"}) == Paths{"distributed.zero_stage"});
    CHECK(wrong({"device=gpu"}) == Paths{"device"});
    auto p = problems(over({"model.moe.scoring_func=sigmid"}));
    REQUIRE(p.size() == 1);
    CHECK(p[0].text() == "model.moe.scoring_func: got \"sigmid\", want sigmoid or softmax (did you mean \"sigmoid\"?)");
}

TEST_CASE("check: zeros, negatives and huge values of every integer make problems, never a crash", "[config][check]") {
    for (const FieldInfo& f : fields()) {
        if (f.type != "integer" || f.path.find("[]") != std::string::npos) continue;
        for (std::string value : {"0", "-1", "-7", "1000000000000"}) {
            INFO(f.path << "=" << value);
            CHECK_NOTHROW(problems(over({f.path + "=" + value})));
        }
    }
}

TEST_CASE("check: validate lists all problems in one error", "[config][check]") {
    try {
        validate(over({"model.moe.num_experts_per_token=9", "model.mla.num_kv_heads=3", "model.num_layers=-1"}));
        FAIL("no error");
    } catch (const Error& e) {
        std::string text = e.what();
        CHECK(text.find("model.num_layers: got -1, want an integer 1 or more") != std::string::npos);
        CHECK(text.find("model.moe.num_experts_per_token: got 9, want at most num_experts = 8") != std::string::npos);
        CHECK(text.find("model.mla.num_kv_heads: got 3, want a divisor of num_heads = 16") != std::string::npos);
    }
}

TEST_CASE("not built: the table names keys that exist and values that the keys may have", "[config][not_built]") {
    for (const NotBuilt& n : not_built()) {
        INFO(n.path);
        FieldHelp h = help(n.path);
        CHECK(h.field.path == n.path);
        CHECK(h.field.row.size() >= 2);
        for (const std::string& value : n.values) {
            INFO(value);
            CHECK_FALSE(value == h.field.default_value);
            CHECK(problems(over({n.path + "=" + value})).size() <= 1);
            CHECK(refusal(over({n.path + "=" + value})).find(n.path + ": got " + value) != std::string::npos);
        }
    }
}

TEST_CASE("not built: refusals name the key and the default", "[config][not_built]") {
    CHECK(refusal(over({"model.mla.sparse_top_k=9"})) == "model.mla.sparse_top_k: got 9, want 2048 (not built yet)");
    std::string text = refusal(over({"slurm.nodes=2", "training.lora.rank=8", "model.mla.flash_mla_backend=sparse"}));
    CHECK(text.find("not built yet") != std::string::npos);
    CHECK(text.find("slurm.nodes: got 2, want 1") != std::string::npos);
    CHECK(text.find("training.lora.rank: got 8") != std::string::npos);
    CHECK(text.find("model.mla.flash_mla_backend: got \"sparse\"") != std::string::npos);
}

TEST_CASE("not built: what is built passes", "[config][not_built]") {
    CHECK(refusal(over({"training.optimizer=sgd", "training.momentum=0", "training.lr_decay_style=linear", "training.use_fp64=true", "distributed.zero_stage=1", "distributed.expert_parallel_size=2",
                        "model.moe.bias_update_rule=centred", "model.moe.bias_freeze_step=10", "model.moe.scoring_func=softmax", "model.mla.q_lora_rank=64", "model.dense_layer_interval=3",
                        "data.dataset_type=text", "data.path=/x", "data.text_field=body.text", "data.bad_lines=skip", "validation.enabled=true", "checkpointing.enabled=false", "logging.tensorboard.enabled=false", "distributed.backend=mpi",
                        "distributed.launcher=mpirun", "training.total_training_tokens=1000"})).empty());
    CHECK(refusal(over({"training.optimizer=muon", "training.moments_dtype=bf16", "training.grads_dtype=bf16", "training.use_fp16=true", "training.lr_decay_style=wsd", "training.lr_decay_ratio=0.2",
                        "training.batch_size_ramp={\"start\": 8, \"tokens\": 1000}"})).empty());
    CHECK(refusal(over({"training.optimizer=sgd", "training.lr_decay_style=deepseek_v3", "training.dynamic_batch_tokens=1000"})).empty());
    for (std::string name : {"cpu_quick", "cpu_tiny", "deepseek_v3_debug", "deepseek_v3_16b", "deepseek_v2_lite", "moonlight_16b_a3b", "kimi_k2"}) CHECK(refusal(named_config(name)).empty());
}

TEST_CASE("fields: every key has help, a row, and can be looked up by its path and aliases", "[config][fields]") {
    std::set<std::string> seen;
    for (const FieldInfo& f : fields()) {
        INFO(f.path);
        CHECK(seen.insert(f.path).second);
        CHECK(f.help.size() >= 5);
        CHECK(f.help.back() == '.');
        CHECK(f.row.size() >= 2);
        if (!f.section) CHECK_FALSE(f.default_value.empty());
        CHECK(help(f.path).field.path == f.path);
        for (const std::string& a : f.aliases) {
            std::string whole = a.find('.') != std::string::npos ? a : f.path.substr(0, f.path.rfind('.') + 1) + a;
            CHECK(help(whole).field.path == f.path);
        }
    }
    CHECK(seen.size() > 200);
}

TEST_CASE("help: a key's text has its unit, default and range; a section's its keys", "[config][fields]") {
    FieldHelp h = help("model.moe.expert_dim");
    CHECK(h.field.path == "model.moe.expert_intermediate_size");
    for (auto part : {"features", "2048", "1 or more", "moe_intermediate_size"}) CHECK(h.text.find(part) != std::string::npos);
    CHECK(help("model.mla.indexer_heads").text.find("other values than the default") != std::string::npos);
    CHECK(help("model.mla.flash_mla_backend").field.not_built.find("sparse") != std::string::npos);
    CHECK(help("model").keys.back() == "moe");
    CHECK(help("").keys.front() == "experiment_name");
    CHECK(help("data.sources").keys.front() == "name");
    try {
        help("model.moe.num_expert");
        FAIL("no error");
    } catch (const Error& e) {
        CHECK(e.parts().hint == "did you mean \"model.moe.num_experts\"?");
    }
    try {
        help("num_experts");
        FAIL("no error");
    } catch (const Error& e) {
        CHECK(e.parts().hint == "its whole path is model.moe.num_experts");
    }
}

TEST_CASE("describe: differing fields are marked and show what they were", "[config][fields]") {
    Config base = named_config("cpu_quick"), c = over({"model.moe.num_experts=32", "model.mla.rope_scaling={\"factor\": 4}"}, base);
    std::string text = describe(c, &base);
    CHECK(text.find("*     num_experts                32   (was 16)") != std::string::npos);
    CHECK(text.find("rope_scaling\n*") != std::string::npos);
    CHECK(std::count(text.begin(), text.end(), '*') == 1 + 7);
    std::string same = describe(base, &base);
    CHECK(same.find('*') == std::string::npos);
    CHECK(describe(Config()).find('*') == std::string::npos);
}

TEST_CASE("fields: the README's table has a line for each key", "[config][fields]") {
    std::string table = fields_markdown();
    CHECK(size_t(std::count(table.begin(), table.end(), '\n')) == fields().size() + 2);
    CHECK(table.find("| model.moe.num_experts [n_routed_experts] | `8` |") != std::string::npos);
}

TEST_CASE("config: derived values", "[config][derived]") {
    Config c;
    CHECK(c.model.dense_width() == 4096);
    c.model.mla.d_model = 100;
    CHECK(c.model.dense_width() == 512);
    c.model.dense_intermediate_size = 70;
    CHECK(c.model.dense_width() == 70);
    CHECK(c.model.shared_width() == 0);
    c.model.moe.num_shared_experts = 2;
    CHECK(c.model.shared_width() == 4096);
    c.model.moe.shared_intermediate_size = 300;
    CHECK(c.model.shared_width() == 300);
    CHECK(c.model.num_kv_heads() == 16);
    CHECK(c.training.precision() == "fp32");
    CHECK(over({"training.use_bf16=true"}).training.precision() == "bf16");
    CHECK(c.training.micro_batches(4) == 16);
    CHECK_THROWS_AS(c.training.micro_batches(3), Error);
    CHECK_THROWS_AS(c.training.micro_batches(0), Error);
    CHECK_FALSE(c.training.total_steps(100));
    c.training.tokens_per_parameter_ratio = 20;
    CHECK(c.training.total_steps(1000000) == (20000000 + 131071) / 131072);
    c.training.total_training_tokens = 131073;
    CHECK(c.training.total_steps(1) == 2);
    c.training.train_steps = 7;
    CHECK(c.training.total_steps(1) == 7);
    CHECK(c.training.mtp_depth() == 0);
    c.training.use_mtp = true;
    CHECK(c.training.mtp_depth() == 1);
}

TEST_CASE("config: which layers have experts", "[config][derived]") {
    ModelConfig m;
    auto moe_layers = [&] {
        std::string s;
        for (int l = 0; l < m.num_layers; ++l) s += m.is_moe_layer(l) ? 'E' : '.';
        return s;
    };
    m.num_layers = 7;
    CHECK(moe_layers() == "EEEEEEE");
    m.dense_layer_interval = 3;
    CHECK(moe_layers() == ".EE.EE.");
    m.first_k_dense_replace = 2;
    CHECK(moe_layers() == "..E.EE.");
    m.dense_layer_interval.reset();
    m.moe_layer_freq = 2;
    CHECK(moe_layers() == "..E.E.E");
    CHECK(m.num_moe_layers() == 3);
    m.dense_layer_interval = 7;
    CHECK(m.is_moe_layer(7));                // an MTP module
}
