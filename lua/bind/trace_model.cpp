// Tokens through a model, watched: model:trace, and what experts put out.
#include "core/routing/trace.h"
#include "core/tensor/check.h"
#include "core/train/agree.h"
#include "core/train/step_program.h"
#include "lua/bind/control.h"
#include "lua/bind/data.h"
#include "lua/bind/intervene.h"
#include "lua/bind/model.h"
#include "lua/bind/tensor.h"
#include "lua/bind/trace.h"

#include <ATen/ATen.h>

#include <utility>

namespace moe::lua {

routing::TraceOptions trace_options(const Options& o, const dist::Mesh& mesh) {
    routing::TraceOptions out;
    out.weights = o.boolean("weights", true);
    if (std::string file = o.string("file", ""); mesh.world.rank() == 0) out.file = file;
    out.memory_bytes = o.integer("memory", out.memory_bytes);
    MOE_CHECK(out.memory_bytes > 0, usage, "trace: memory", std::to_string(out.memory_bytes), "bytes, 1 or more", "");
    return out;
}

namespace {
/// Micro-batches of argument 2: a data object (or what moe.data takes), or ids [batch, time] as tensor or lists.
struct Source {
    DataValue* data = nullptr;
    at::Tensor ids;
    int64_t left = 0;                 ///< tokens; −1: up to the data's end
    int64_t asked = 0;                ///< tokens that were asked for; 0: those of given ids, or of whole batches

    Source(lua_State* L, const Options& o) {
        MOE_CHECK(!(o.has("batches") && o.has("tokens")), usage, running(L), "batches and tokens", "one of them", "");
        bool is_list = lua_istable(L, 2) && lua_rawlen(L, 2) > 0;
        if (is_list || test_box<at::Tensor>(L, 2)) {
            ids = is_list ? tensor_from_table(L, 2, at::kLong) : check_tensor(L, 2, "ids");
            if (ids.dim() == 1) ids = ids.unsqueeze(0);
            MOE_CHECK(ids.dim() == 2 && ids.numel() > 0, shape, running(L) + ": ids", shape_text(ids.sizes()), "[batch, time]", "");
            MOE_CHECK(at::isIntegralType(ids.scalar_type(), false), dtype, running(L) + ": ids", dtype_text(ids.scalar_type()), "int64", "");
            MOE_CHECK(!o.has("batches") && !o.has("tokens"), usage, running(L), "tokens or batches of given ids", "ids alone: all of them are taken", "");
            ids = ids.to(at::kCPU, at::kLong).contiguous();
            return;
        }
        data = &check_data(L, 2);
        data->reset();
        int64_t per_batch = data->batch_size * data->config->training.seq_length;
        left = o.has("batches") ? o.integer("batches", 0) * per_batch : o.integer("tokens", data->num_tokens > 0 ? -1 : 1 << 16);
        asked = o.has("batches") ? 0 : left == -1 ? data->num_tokens : left;
        MOE_CHECK(left == -1 || left > 0, usage, running(L) + (o.has("batches") ? ": batches" : ": tokens"), std::to_string(left), "1 or more", "");
    }
    int64_t seq_length() const { return data ? data->config->training.seq_length : ids.size(1); }
    /// This rank's part of the next batch, and how many tokens the whole has.
    struct Part {
        MicroBatch batch;
        int64_t num_tokens = 0;
    };
    std::optional<Part> next(const Model& m) {
        if (!data) {
            if (!ids.defined()) return {};
            return part_of(m, std::exchange(ids, at::Tensor()), {}, {}, {}, true);
        }
        if (left == 0) return {};
        auto b = data->next();
        if (!b) return {};
        if (left > 0) left = std::max<int64_t>(0, left - b->ids.numel());
        return part_of(m, b->ids, b->targets, b->domain, b->doc_start, data->hides_documents());
    }

private:
    /// Sequences are dealt out over the data-parallel ranks, all as many; those that are missing are padding.
    static Part part_of(const Model& m, const at::Tensor& ids, const at::Tensor& targets, const at::Tensor& domain, const at::Tensor& doc_start, bool hides_documents) {
        const dist::Group& dp = m.mesh().dp;
        int64_t B = ids.size(0), ranks = dp.size(), each = (B + ranks - 1) / ranks, missing = each * ranks - B;
        auto rows = [&](const at::Tensor& t, int64_t padding) {
            if (!t.defined() || ranks == 1) return t;
            at::Tensor all = missing > 0 ? at::cat({t, at::full({missing, t.size(1)}, padding, t.options())}) : t;
            return all.narrow(0, dp.rank() * each, each).contiguous();
        };
        at::Tensor label = domain.defined() || missing == 0 ? domain : at::zeros(ids.sizes(), at::kInt);
        return {m.micro_batch(rows(ids, 0), rows(targets, -100), rows(label, -1), rows(doc_start, 0), hides_documents), ids.numel()};
    }
};

LiveModel whole_model(lua_State* L) {
    LiveModel live = live_model(L, self<ModelValue>(L));
    MOE_CHECK(live->mesh().world.size() == 1, state, running(L), fmt::format("{} ranks", live->mesh().world.size()), "one rank", "each rank sees its own tokens and layers only; load the checkpoint in one process");
    return live;
}

std::map<std::string, at::Tensor> first_slots(const Model& m) {
    return {{"anchor", at::zeros({1}, at::TensorOptions().dtype(m.options().precision.compute).device(m.options().device))}};
}

}  // namespace

int model_trace(lua_State* L) {
    lua_settop(L, 3);
    LiveModel live = live_model(L, self<ModelValue>(L));
    Model& m = *live;
    const dist::Group& world = m.mesh().world;
    Options o(L, 3, {"tokens", "batches", "weights", "file", "memory"});
    Source source(L, o);
    routing::TraceFacts facts{m.config().model.moe.num_experts, m.config().model.moe.n_group, source.seq_length(), {"all"}, m.config().data.tokenizer};
    if (source.data) facts.domains = source.data->loader->domains();
    auto trace = std::make_shared<routing::Trace>(facts, trace_options(o, m.mesh()));
    train::HookFailures::Kept kept(failures_of(live.value), world.size() > 1);
    train::Executor executor(m);
    if (world.size() == 1) executor.set_interrupt(&control(L).interrupted);
    train::together(world, [&] {
        while (true) {
            std::optional<Source::Part> part;
            train::agree(world, [&] {
                kept.rethrow();
                throw_if_interrupted(L);
                part = source.next(m);
                if (part) trace->begin(part->batch.ids_T, part->batch.domain_T, part->batch.S);
            });
            if (!part) break;
            part->batch.trace = trace.get();
            executor.run_forward(part->batch, /*with_losses=*/false);
            trace->gather(m.mesh(), part->num_tokens);
        }
        train::agree(world, [&] { trace->finish(); });
    });
    push<TraceValue>(L, {trace, data::open_tokenizer(facts.tokenizer), facts.seq_length, source.asked});
    return 1;
}

/// Sums over the rows of each expert. The rows that experts put out are w · E(x), w the gate weight.
int model_expert_outputs(lua_State* L) {
    lua_settop(L, 3);
    LiveModel live = whole_model(L);
    Model& m = *live;
    Options o(L, 3, {"layer", "tokens", "batches"});
    int64_t layer = o.integer("layer", m.routed_layers().empty() ? 0 : m.routed_layers()[0]), E = m.config().model.moe.num_experts, D = m.config().model.mla.d_model;
    size_t experts = 0, all = m.segments().size();
    while (experts < all && m.segments()[experts].name != fmt::format("layers.{}.experts", layer)) ++experts;
    MOE_CHECK(experts < all, config, "model:expert_outputs: layer", std::to_string(layer), "a layer with experts", "m.routed_layers lists them");
    Source source(L, o);
    at::Tensor sum_ED = at::zeros({E, D}, at::kDouble), weight_E = at::zeros({E}, at::kDouble), norm_E = at::zeros({E}, at::kDouble), output_E = at::zeros({E}, at::kDouble), count_E = at::zeros({E}, at::kLong);
    at::NoGradGuard no_grad;
    while (true) {
        throw_if_interrupted(L);
        auto part = source.next(m);
        if (!part) break;
        MicroBatch* batch = &part->batch;
        auto slots = first_slots(m);
        m.run_segments(*batch, 0, experts + 1, slots);
        const Routed& routed = batch->routed.at(layer);
        at::Tensor token = routed.by_expert.token_R.to(at::kCPU, at::kLong), counted = batch->domain_T.to(at::kCPU).ge(0);
        at::Tensor row = token.ge(0).logical_and(counted.index({token.clamp_min(0)})).nonzero().flatten();
        at::Tensor y = slots.at("expert_rows").to(at::kCPU, at::kDouble).index_select(0, row), w = slots.at("row_weights").to(at::kCPU, at::kDouble).flatten().index_select(0, row);
        at::Tensor expert = at::searchsorted(routed.groups.offsets_E1.to(at::kCPU, at::kLong), row, false, true).sub(1);
        at::Tensor norm = y.square().sum(1).sqrt();
        sum_ED.index_add_(0, expert, y);
        weight_E.index_add_(0, expert, w);
        norm_E.index_add_(0, expert, norm);
        output_E.index_add_(0, expert, norm / w.clamp_min(1e-30));
        count_E.index_add_(0, expert, at::ones_like(expert));
    }
    push_ordered_table(L, {"layer", "mean", "norm", "weighted_norm", "tokens"});
    at::Tensor n = count_E.to(at::kDouble);
    lua_pushinteger(L, layer);
    lua_setfield(L, -2, "layer");
    auto set = [&](const char* name, const at::Tensor& t) { push_tensor(L, t), lua_setfield(L, -2, name); };
    set("mean", sum_ED / weight_E.unsqueeze(1));
    set("norm", output_E / n);
    set("weighted_norm", norm_E / n);
    set("tokens", count_E);
    return 1;
}

}  // namespace moe::lua
