#include "core/base/json.h"
#include "core/config/load.h"
#include "core/config/names.h"
#include "tests/catch.h"

#include <nlohmann/json.hpp>
#include <unistd.h>

#include <filesystem>

using namespace moe;
using nlohmann::json;
namespace fs = std::filesystem;

namespace {
struct Folder {
    fs::path path = fs::temp_directory_path() / ("moe_config_" + std::to_string(::getpid()));
    Folder() { fs::create_directories(path / "sub"); }
    ~Folder() { fs::remove_all(path); }
    std::string put(const std::string& name, const std::string& text) {
        write_text((path / name).string(), text);
        return (path / name).string();
    }
};

/// The error of a call, as text; "" when there is none.
template <class F>
std::string message(F&& f, ErrorKind kind = ErrorKind::config) {
    try {
        f();
    } catch (const Error& e) {
        CHECK(std::string(to_string(e.kind())) == to_string(kind));
        return e.what();
    }
    return "";
}

bool has(const std::string& text, const std::string& part) {
    INFO(text << "\nlacks " << part);
    bool found = text.find(part) != std::string::npos;
    CHECK(found);
    return found;
}

Config over(const std::vector<std::string>& assignments) { return with_overrides(Config(), assignments); }
}  // namespace

TEST_CASE("config: to_json and back is the same, for the defaults and every ready configuration", "[config][load]") {
    CHECK(config_from_json(to_json(Config())) == Config());
    for (const std::string& name : config_names()) {
        Config c = named_config(name);
        INFO(name);
        CHECK(config_from_json(to_json(c)) == c);
        CHECK_FALSE(c == Config());
    }
}

TEST_CASE("config: an empty file is the defaults, comments are allowed", "[config][load]") {
    Folder folder;
    CHECK(load_config(folder.put("a.json", "{}")) == Config());
    CHECK(load_config(folder.put("b.json", "// note\n{ \"seed\": 7 /* here */ }")).seed == 7);
}

TEST_CASE("config: the guide's spellings and Hugging Face's are read", "[config][load]") {
    json value = {{"model", {{"intermediate_size", 640}, {"mla", {{"hidden_size", 128}, {"kv_lora_rank", 64}, {"num_attention_heads", 2}, {"max_position_embeddings", 8192}}},
                             {"moe", {{"expert_dim", 96}, {"n_routed_experts", 6}, {"num_experts_per_tok", 3}, {"n_shared_experts", 1}}}}},
                  {"training", {{"mtp_tokens", 3}, {"gradient_checkpointing", true}, {"total_training_tokens", 5e8}}},
                  {"logging", {{"log_interval", 5}}},
                  {"profiling", {{"enable_profiling", true}, {"save_traces_folder", "t"}}},
                  {"distributed", {{"init_timeout_seconds", 60}}}};
    Config c = config_from_json(value);
    CHECK(c.model.dense_width() == 640);
    CHECK(c.model.mla.d_model == 128);
    CHECK(c.model.mla.d_latent == 64);
    CHECK(c.model.mla.num_heads == 2);
    CHECK(c.model.mla.max_context_length == 8192);
    CHECK(c.model.moe.expert_intermediate_size == 96);
    CHECK(c.model.moe.num_experts == 6);
    CHECK(c.model.moe.num_experts_per_token == 3);
    CHECK(c.model.moe.num_shared_experts == 1);
    CHECK(c.training.num_predict_tokens == 3);
    CHECK(c.training.gradient_checkpointing == "full");
    CHECK(c.training.total_training_tokens == 500000000);
    CHECK(c.training.log_interval == 5);
    CHECK(c.profiling.enabled);
    CHECK(c.profiling.folder == "t");
    CHECK(c.distributed.timeout_secs == 60);
}

TEST_CASE("config: two spellings of a key must agree", "[config][load]") {
    CHECK(config_from_json({{"model", {{"moe", {{"expert_dim", 96}, {"expert_intermediate_size", 96}}}}}}).model.moe.expert_intermediate_size == 96);
    has(message([] { config_from_json({{"model", {{"moe", {{"expert_dim", 96}, {"expert_intermediate_size", 97}}}}}}); }), "model.moe.expert_intermediate_size: got ");
    has(message([] { config_from_json({{"logging", {{"log_interval", 5}}}, {"training", {{"log_interval", 6}}}}); }), "training.log_interval: got 6, and logging.log_interval = 5");
}

TEST_CASE("config: unknown keys name the whole path, the nearest key, the file and the line", "[config][load]") {
    Folder folder;
    std::string path = folder.put("a.json", "{\n \"model\": {\n  \"moe\": {\n   \"num_exprets\": 4 } } }");
    std::string text = message([&] { load_config(path); });
    has(text, "model.moe.num_exprets: got an unknown key");
    has(text, "did you mean model.moe.num_experts?");
    has(text, path + ":4");
    has(message([] { config_from_json({{"num_experts", 4}}); }), "it belongs to model.moe.num_experts");
}

TEST_CASE("config: all faults of a file are told at once", "[config][load]") {
    std::string text = message([] { config_from_json({{"seed", "x"}, {"modle", 1}, {"training", {{"use_bf16", 1}, {"recompute", "norm"}}}}); });
    has(text, "4 problems");
    has(text, "seed: got \"x\" (text), want an integer 0 or more");
    has(text, "modle: got an unknown key");
    has(text, "training.use_bf16: got 1 (number), want true or false");
    has(text, "training.recompute: got \"norm\" (text), want a list of texts");
}

TEST_CASE("config: malformed JSON names file and line, a missing file is an io error", "[config][load]") {
    Folder folder;
    std::string path = folder.put("bad.json", "{\n \"seed\": 1,,\n}");
    has(message([&] { load_config(path); }), path + ":2:");
    has(message([&] { load_config((folder.path / "none.json").string()); }, ErrorKind::io), "none.json");
}

TEST_CASE("config: inherits merges deep, relative to the file that says it", "[config][inherits]") {
    Folder folder;
    folder.put("sub/base.json", R"({"seed": 1, "model": {"num_layers": 3, "mla": {"kv_lora_rank": 32, "num_heads": 4, "rope_scaling": {"factor": 4, "beta_fast": 16}}},
                                    "data": {"sources": [{"name": "a"}, {"name": "b"}]}})");
    folder.put("sub/middle.json", R"({"inherits": "base.json", "seed": 2, "model": {"mla": {"d_latent": 48, "rope_scaling": {"factor": 8}}}})");
    Config c = load_config(folder.put("top.json", R"({"inherits": "sub/middle.json", "model": {"num_layers": 5}, "data": {"sources": [{"name": "c"}]}})"));
    CHECK(c.seed == 2);
    CHECK(c.model.num_layers == 5);
    CHECK(c.model.mla.d_latent == 48);               // an alias in the base, the name in the child
    CHECK(c.model.mla.num_heads == 4);
    REQUIRE(c.model.mla.rope_scaling);
    CHECK(c.model.mla.rope_scaling->factor == 8);
    CHECK(c.model.mla.rope_scaling->beta_fast == 16);
    REQUIRE(c.data.sources.size() == 1);             // lists are replaced
    CHECK(c.data.sources[0].name == "c");
    CHECK_FALSE(c.inherits);
}

TEST_CASE("config: inherits takes ready names; a missing base names the nearest", "[config][inherits]") {
    Folder folder;
    Config c = load_config(folder.put("a.json", R"({"inherits": "cpu_quick", "model": {"moe": {"num_experts": 8}}})"));
    Config want = named_config("cpu_quick");
    want.model.moe.num_experts = 8;
    CHECK(c == want);
    has(message([&] { load_config(folder.put("b.json", R"({"inherits": "cpu_quik"})")); }), "did you mean \"cpu_quick\"?");
}

TEST_CASE("config: a cycle of files is an error that shows it", "[config][inherits]") {
    Folder folder;
    folder.put("a.json", R"({"inherits": "b.json"})");
    folder.put("b.json", R"({"inherits": "a.json"})");
    std::string text = message([&] { load_config((folder.path / "a.json").string()); });
    has(text, "a.json → ");
    has(text, "inherits");
}

TEST_CASE("config: overrides as key=value take the type of their key", "[config][override]") {
    CHECK(over({"model.moe.num_experts=16"}).model.moe.num_experts == 16);
    CHECK(over({"model.moe.expert_dim=16"}).model.moe.expert_intermediate_size == 16);
    CHECK(over({"training.learning_rate=2e-3"}).training.learning_rate == 2e-3);
    CHECK(over({"training.total_training_tokens=1e9"}).training.total_training_tokens == 1000000000);
    CHECK(over({"training.use_bf16=true"}).training.use_bf16);
    CHECK(over({"experiment_name=123"}).experiment_name == "123");          // a text stays a text
    CHECK(over({"experiment_name=a=b"}).experiment_name == "a=b");
    CHECK(over({"experiment_name=\"quoted\""}).experiment_name == "quoted");
    CHECK(over({"data.path=/x/y z"}).data.path == "/x/y z");
    CHECK(over({"data.path=/x", "data.path=null"}).data.path == std::nullopt);
    CHECK(over({"training.gradient_checkpointing=true"}).training.gradient_checkpointing == "full");
    CHECK(over({"training.recompute=norm,attention"}).training.recompute == std::vector<std::string>{"norm", "attention"});
    CHECK(over({"training.recompute=[\"norm\"]"}).training.recompute == std::vector<std::string>{"norm"});
    CHECK(over({"training.recompute="}).training.recompute.empty());
    CHECK(over({"logging.log_interval=3"}).training.log_interval == 3);
    CHECK(over({"data.sources=[{\"name\": \"a\", \"weight\": 2}]"}).data.sources.at(0).weight == 2);
    CHECK(over({"model.mla.rope_scaling={\"factor\": 4}"}).model.mla.rope_scaling->factor == 4);
    CHECK(over({"model.mla.rope_scaling.factor=4"}).model.mla.rope_scaling->factor == 4);
    CHECK(over({"seed=1", "seed=2"}).seed == 2);
}

TEST_CASE("config: overrides that are wrong say what is wanted", "[config][override]") {
    has(message([] { over({"model.num_layers=abc"}); }), "model.num_layers: got \"abc\", want an integer 1 or more");
    has(message([] { over({"model.num_layer=3"}); }), "did you mean model.num_layers?");
    has(message([] { over({"num_experts=3"}); }), "it belongs to model.moe.num_experts");
    has(message([] { over({"training.use_bf16=yes"}); }), "want true or false");
    has(message([] { over({"model=3"}); }), "want a section");
    has(message([] { over({"seed.x=3"}); }), "seed: got ");
    has(message([] { over({"data.sources[0].weight=3"}); }), "data.sources[0]");
    has(message([] { over({"seed"}); }, ErrorKind::usage), "want key=value");
    has(message([] { over({"=3"}); }, ErrorKind::usage), "want key=value");
}

TEST_CASE("config: nested overrides keep what they do not name", "[config][override]") {
    Config quick = named_config("cpu_quick");
    Config c = with_overrides(quick, json{{"model", {{"moe", {{"num_experts", 32}}}}}, {"training", {{"learning_rate", 1}}}});
    Config want = quick;
    want.model.moe.num_experts = 32;
    want.training.learning_rate = 1.0;
    CHECK(c == want);
    CHECK(with_overrides(quick, json::object()) == quick);
    CHECK(with_overrides(Config(), to_json(quick)) == quick);
    has(message([&] { with_overrides(quick, json{{"inherits", "tiny"}}); }), "inherits");
}

TEST_CASE("names: every ready configuration is valid, an unknown one names the nearest", "[config][names]") {
    for (std::string name : {"tiny", "small", "large", "deepseek_v3_debug", "deepseek_v3_16b", "deepseek_v3_671b", "deepseek_v2_lite", "moonlight_16b_a3b", "kimi_k2", "cpu_quick", "cpu_tiny"}) {
        INFO(name);
        CHECK(embedded_config(name));
        CHECK_NOTHROW(validate(named_config(name)));
    }
    has(message([] { named_config("deepseek_v3_671"); }), "did you mean \"deepseek_v3_671b\"?");
}

TEST_CASE("names: resolve_config takes a name or a path", "[config][names]") {
    Folder folder;
    CHECK(resolve_config("tiny") == named_config("tiny"));
    CHECK(resolve_config(folder.put("x.json", "{\"seed\": 9}")).seed == 9);
    has(message([] { resolve_config("tinny"); }), "did you mean \"tiny\"?");
    has(message([] { resolve_config("none/tiny.json"); }, ErrorKind::io), "none/tiny.json");
}
