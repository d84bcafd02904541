// moe.kernels: the ops of core/kernels on plain tensors, with their gradients; optimizer passes in place. Arguments come in the order of C++, what C++ has in option structs is
// a table with the same names and defaults. Checks are the kernels' own.
#include "lua/bind/kernels.h"

#include "core/kernels/adamw/adamw.h"
#include "core/kernels/embed/embed.h"
#include "core/kernels/head/head_loss.h"
#include "core/kernels/linear/linear.h"
#include "core/kernels/muon/muon.h"
#include "core/kernels/norm/layernorm.h"
#include "core/kernels/norm/rmsnorm.h"
#include "core/kernels/permute/permute.h"
#include "core/kernels/quantize/quantize.h"
#include "core/kernels/route/route.h"
#include "core/kernels/swiglu/swiglu.h"
#include "core/tensor/check.h"
#include "lua/bind/bind.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace moe::lua {

/// A plan keeps its tensors to itself (fields give copies), so that permute needs no check of what they hold.
template <>
struct TypeName<kernels::SortPlan> {
    static constexpr const char* value = "sort plan";
};

at::Tensor optional_tensor(lua_State* L, int index, const char* name) { return is_nothing(L, index) ? at::Tensor() : check_tensor(L, index, name); }
at::Tensor optional_tensor(lua_State* L, const Options& options, const char* name) {
    options.push(name);
    at::Tensor t = optional_tensor(L, -1, name);
    lua_pop(L, 1);
    return t;
}
at::ScalarType option_dtype(const Options& options, const char* name, at::ScalarType fallback) { return options.has(name) ? dtype_named(options.string(name, "")) : fallback; }
at::Device option_device(const Options& options) { return options.has("device") ? device_named(options.string("device", "")) : at::Device(at::kCPU); }

namespace {
using at::Tensor;
using namespace kernels;

// --- rows ---

constexpr double kNormEps = 1e-6;           // model.norm_eps of a new configuration

using Tensors = std::vector<Tensor>;
using Weights = std::vector<WeightPtr>;

int call_rmsnorm(lua_State* L) {
    Options o(L, 3, {"eps"});
    double eps = o.number("eps", kNormEps);
    return push_tensor(L, call_kernel({check_tensor(L, 1, "x")}, {weight_argument(L, 2, "gamma")}, [=](const Tensors& x, const Weights& w) { return Tensors{rmsnorm(x[0], w[0], eps)}; })[0]);
}
int call_layernorm(lua_State* L) {
    Options o(L, 4, {"eps"});
    double eps = o.number("eps", kNormEps);
    return push_tensor(L, call_kernel({check_tensor(L, 1, "x")}, {weight_argument(L, 2, "gamma"), weight_argument(L, 3, "beta")},
                                      [=](const Tensors& x, const Weights& w) { return Tensors{layernorm(x[0], w[0], w[1], eps)}; })[0]);
}
int call_swiglu(lua_State* L) { return push_tensor(L, swiglu(check_tensor(L, 1, "gate_up"), optional_tensor(L, 2, "row_weight"))); }

// --- products ---

/// The weight at index 2 or 3 for a product with x, in E4M3 where the options say so.
CallWeight product_weight(lua_State* L, int index, const Tensor& x, const Options& o) {
    bool fp8 = o.boolean("fp8", false);
    if (fp8) check_dtype(running(L), {"x of a product in fp8", x}, {at::kBFloat16});
    return weight_argument(L, index, "w", fp8);
}
int call_linear(lua_State* L) {
    Options o(L, 3, {"fp8"});
    Tensor& x = check_tensor(L, 1, "x");
    return push_tensor(L, call_kernel({x}, {product_weight(L, 2, x, o)}, [](const Tensors& x, const Weights& w) { return Tensors{linear(x[0], w[0])}; })[0]);
}
template <Tensor (*F)(const Tensor&, const WeightPtr&)>
int call_wide(lua_State* L) {
    return push_tensor(L, call_kernel({check_tensor(L, 1, "x")}, {weight_argument(L, 2, "w")}, [](const Tensors& x, const Weights& w) { return Tensors{F(x[0], w[0])}; })[0]);
}
int call_grouped_linear(lua_State* L) {
    Options o(L, 4, {"align", "fp8"});
    Tensor& x = check_tensor(L, 1, "x");
    auto* plan = test_box<SortPlan>(L, 2);
    MOE_CHECK(!plan || !o.has("align"), usage, "moe.kernels.grouped_linear: align", "align beside a plan", "a plan, which has its own, or offsets", "");
    RowGroups groups = plan ? check<SortPlan>(L, 2, "plan").groups : RowGroups(check_tensor(L, 2, "offsets"), o.integer("align", 1));
    return push_tensor(L, call_kernel({x}, {product_weight(L, 3, x, o)}, [=](const Tensors& x, const Weights& w) { return Tensors{grouped_linear(x[0], groups, w[0])}; })[0]);
}
int call_grouped_alignment(lua_State* L) {
    Tensor& x = check_tensor(L, 1, "x");
    return lua_pushinteger(L, grouped_alignment(x.device(), x.scalar_type())), 1;
}
int call_embed(lua_State* L) {
    Tensor ids = check_tensor(L, 1, "ids");
    CallWeight weight = weight_argument(L, 2, "w");
    bool graph = weight.value.requires_grad() && at::GradMode::is_enabled();
    // Ids carry no gradient: the graph goes through an anchor.
    Tensors anchor;
    if (graph) anchor.push_back(at::zeros({1}, weight.value.options().requires_grad(false)));
    return push_tensor(L, call_kernel(anchor, {weight}, [=](const Tensors& x, const Weights& w) { return Tensors{embed(x.empty() ? Tensor() : x[0], ids, w[0])}; })[0]);
}

int call_head_loss(lua_State* L) {
    Options o(L, 4, {"scale", "chunk"});
    HeadLossOptions options;
    options.scale = o.number("scale", 1);
    options.chunk = o.integer("chunk", options.chunk);
    Tensor targets = check_tensor(L, 3, "targets");
    Tensors out = call_kernel({check_tensor(L, 1, "x")}, {weight_argument(L, 2, "w")}, [=](const Tensors& x, const Weights& w) {
        Tensor token_loss, loss = head_loss(x[0], w[0], targets, options, &token_loss);
        return Tensors{loss, token_loss};
    });
    push_tensor(L, out[0]);
    push_tensor(L, out[1].detach());
    return 2;
}

// --- routing and permutation ---

int call_route(lua_State* L) {
    Options o(L, 3, {"top_k", "n_group", "topk_group", "softmax", "norm_topk", "best_two", "scale", "temperature", "ids"});
    RouteOptions r;
    r.top_k = o.integer("top_k", r.top_k), r.n_group = o.integer("n_group", r.n_group), r.topk_group = o.integer("topk_group", r.topk_group);
    r.softmax = o.boolean("softmax", r.softmax), r.norm_topk = o.boolean("norm_topk", r.norm_topk), r.best_two = o.boolean("best_two", r.best_two);
    r.scale = o.number("scale", r.scale), r.temperature = o.number("temperature", r.temperature);
    Tensor given = optional_tensor(L, o, "ids");
    Route out = route(check_tensor(L, 1, "logits"), optional_tensor(L, 2, "bias"), r, given);
    push_tensor(L, out.scores_TE);
    push_tensor(L, out.weights_TK);
    push_tensor(L, given.defined() ? given : out.ids_TK);
    return 3;
}
int call_count_pairs(lua_State* L) {
    Options o(L, 4, {"kept", "dropped"});
    count_pairs(check_tensor(L, 1, "ids"), check_tensor(L, 2, "domain"), optional_tensor(L, o, "kept"), check_tensor(L, 3, "counts"), optional_tensor(L, o, "dropped"));
    lua_settop(L, 3);
    return 1;
}
int call_sort_by_expert(lua_State* L) {
    Options o(L, 3, {"align"});
    push(L, sort_by_expert(check_tensor(L, 1, "ids"), check_integer(L, 2, "num_experts"), o.integer("align", 1)));
    return 1;
}
int call_permute(lua_State* L) {
    auto [x, weights] = permute(check_tensor(L, 1, "x"), check_tensor(L, 2, "weights"), check<SortPlan>(L, 3, "plan"));
    push_tensor(L, x);
    push_tensor(L, weights);
    return 2;
}
int call_unpermute(lua_State* L) { return push_tensor(L, unpermute(optional_tensor(L, 1, "base"), check_tensor(L, 2, "y"), check<SortPlan>(L, 3, "plan"))); }

template <Tensor SortPlan::*F>
int plan_tensor(lua_State* L) {
    return push_tensor(L, (self<SortPlan>(L).*F).clone());
}
int plan_offsets(lua_State* L) { return push_tensor(L, self<SortPlan>(L).groups.offsets_E1.clone()); }
int plan_rows(lua_State* L) { return lua_pushinteger(L, self<SortPlan>(L).R), 1; }
int plan_align(lua_State* L) { return lua_pushinteger(L, self<SortPlan>(L).groups.align), 1; }
int plan_text(lua_State* L) {
    auto* box = test_box<SortPlan>(L, 1);
    push_string(L, box && *box ? fmt::format("sort plan: {} tokens x {} choices in {} rows of {} experts", (*box)->T, (*box)->K, (*box)->R, (*box)->groups.size()) : "sort plan (freed)");
    return 1;
}
const Binding kPlanFields[] = {
    {"position", plan_tensor<&SortPlan::position_TK>, "plan.position: int32 [T, K], the row of a pair, -1 for a dropped one. A copy, as all of its tensors."},
    {"token", plan_tensor<&SortPlan::token_R>, "plan.token: int32 [R], the token of a row, -1 for padding."},
    {"choice", plan_tensor<&SortPlan::choice_R>, "plan.choice: int32 [R], which of its token's choices a row is; anything for padding."},
    {"offsets", plan_offsets, "plan.offsets: [E + 1], rows offsets[e] … offsets[e + 1] are expert e's; int64 on the CPU, int32 on a GPU."},
    {"align", plan_align, "plan.align: what every offset is a multiple of."},
    {"rows", plan_rows, "plan.rows: R; on a GPU the most that there may be, padding after the last expert's."},
};
const Binding kPlanOperators[] = {{"__tostring", plan_text, "tostring(plan): tokens, choices, rows and experts."}};

// --- optimizers: in place, the first argument is returned ---

Master master_argument(lua_State* L, const Options& o) {
    Master master{check_tensor(L, 1, "master"), optional_tensor(L, o, "value")};
    check_dtype(running(L), {"master", master.data}, {at::kFloat, at::kDouble, at::kShort});
    MOE_CHECK(!master.is_split() || master.value.defined(), usage, running(L) + ": value", "int16 rests without the weights that they belong to", "value = the bfloat16 weights", "");
    return master;
}
int call_adamw(lua_State* L) {
    Options o(L, 5, {"lr", "beta1", "beta2", "eps", "weight_decay", "grad_scale", "step", "decoupled", "value"});
    AdamWOptions a;
    a.lr = o.number("lr", a.lr), a.beta1 = o.number("beta1", a.beta1), a.beta2 = o.number("beta2", a.beta2), a.eps = o.number("eps", a.eps);
    a.weight_decay = o.number("weight_decay", a.weight_decay), a.grad_scale = o.number("grad_scale", a.grad_scale);
    a.step = o.integer("step", a.step), a.decoupled = o.boolean("decoupled", a.decoupled);
    adamw(master_argument(L, o), check_tensor(L, 2, "grad"), check_tensor(L, 3, "m"), check_tensor(L, 4, "v"), a);
    return lua_settop(L, 1), 1;
}
int call_sgd(lua_State* L) {
    Options o(L, 4, {"lr", "momentum", "weight_decay", "grad_scale", "value"});
    SgdOptions s;
    s.lr = o.number("lr", s.lr), s.momentum = o.number("momentum", s.momentum), s.weight_decay = o.number("weight_decay", s.weight_decay), s.grad_scale = o.number("grad_scale", s.grad_scale);
    sgd(master_argument(L, o), check_tensor(L, 2, "grad"), optional_tensor(L, 3, "buffer"), s);
    return lua_settop(L, 1), 1;
}
int call_muon(lua_State* L) {
    Options o(L, 4, {"lr", "momentum", "weight_decay", "grad_scale", "products", "value"});
    MuonOptions m;
    m.lr = o.number("lr", m.lr), m.momentum = o.number("momentum", m.momentum), m.weight_decay = o.number("weight_decay", m.weight_decay), m.grad_scale = o.number("grad_scale", m.grad_scale);
    m.products = option_dtype(o, "products", m.products);
    muon(master_argument(L, o), check_tensor(L, 2, "grad"), check_tensor(L, 3, "buffer"), m);
    return lua_settop(L, 1), 1;
}
int call_newton_schulz(lua_State* L) {
    Options o(L, 2, {"products"});
    return push_tensor(L, newton_schulz(check_tensor(L, 1, "g"), option_dtype(o, "products", MuonOptions().products)));
}
int call_sum_of_squares(lua_State* L) { return push_tensor(L, sum_of_squares(check_tensor(L, 1, "x"))); }

// --- E4M3 ---

int call_quantize_rows(lua_State* L) {
    Tensor x = check_tensor(L, 1, "x").contiguous();
    check_dims("quantize_rows", {"x", x}, 2);
    auto out = empty_quantized_rows(x.size(0), x.size(1), x);
    out.scale_KR.zero_();                   // the last few, which no row has
    quantize_rows(x, out);
    push_tensor(L, out.q_RK);
    push_tensor(L, out.scale_KR);
    return 2;
}
int call_quantize_weight(lua_State* L) {
    Tensor w = check_tensor(L, 1, "w").contiguous();
    MOE_CHECK(w.dim() == 2 || w.dim() == 3, shape, "quantize_weight: w", shape_text(w.sizes()), "[E, O, I] or [O, I]", "");
    auto out = empty_quantized_weight(w.dim() == 3 ? w.size(0) : 1, w.size(-2), w.size(-1), w);
    quantize_weight(w, out);
    push_tensor(L, out.q_EOI);
    push_tensor(L, out.q_EIO);
    push_tensor(L, out.scale_EOI);
    return 3;
}
int64_t scale_blocks(int64_t n) { return (n + kScaleBlock - 1) / kScaleBlock; }
void check_quantized(lua_State* L, const Tensor& q, const Tensor& scale, int64_t dims) {
    check_dims(running(L), {"q", q}, dims);
    check_dtype(running(L), {"q", q}, {at::kFloat8_e4m3fn});
    check_dtype(running(L), {"scale", scale}, {at::kFloat});
    check_same_device(running(L), {"q", q}, {"scale", scale});
}
int call_dequantize_rows(lua_State* L) {
    Tensor &q = check_tensor(L, 1, "q"), &scale = check_tensor(L, 2, "scale");
    check_quantized(L, q, scale, 2);
    check_shape(running(L), {"scale", scale}, {scale_blocks(q.size(1)), (q.size(0) + 3) / 4 * 4});
    return push_tensor(L, dequantize_rows({q, scale}));
}
int call_dequantize_weight(lua_State* L) {
    Tensor &q = check_tensor(L, 1, "q"), &scale = check_tensor(L, 2, "scale");
    check_quantized(L, q, scale, 3);
    check_shape(running(L), {"scale", scale}, {q.size(0), scale_blocks(q.size(1)), scale_blocks(q.size(2))});
    return push_tensor(L, dequantize_weight({q, {}, scale}));
}

const Binding kFunctions[] = {
    {"rmsnorm", call_rmsnorm,
     "moe.kernels.rmsnorm(x, gamma, {eps = 1e-6}): x / sqrt(mean(x²) + eps) · gamma over rows; x [T, D] of any float dtype, gamma [D] of the same.\n"
     "y = moe.kernels.rmsnorm(moe.randn {4, 8}, moe.ones {8})"},
    {"layernorm", call_layernorm,
     "moe.kernels.layernorm(x, gamma, beta, {eps = 1e-6}): (x − mean) / sqrt(var + eps) · gamma + beta over rows; x [T, D], gamma and beta [D] of its dtype.\n"
     "y = moe.kernels.layernorm(moe.randn {4, 8}, moe.ones {8}, moe.zeros {8})"},
    {"swiglu", call_swiglu,
     "moe.kernels.swiglu(gate_up, row_weight): silu(gate) · up, times row_weight of the row where given; gate_up [R, 2F] → [R, F], row_weight [R] fp32 or fp64.\n"
     "y = moe.kernels.swiglu(moe.randn {4, 16})"},
    {"linear", call_linear,
     "moe.kernels.linear(x, w, {fp8 = false}): x wᵀ; x [T, I] and w [O, I] of one float dtype → [T, O]. fp8: bf16 tensors multiplied as E4M3 with scales.\n"
     "y = moe.kernels.linear(moe.randn {4, 8}, moe.randn {3, 8})"},
    {"linear_wide", call_wide<linear_wide>,
     "moe.kernels.linear_wide(x, w): x wᵀ with w [O, I] in fp32 or fp64, whose dtype the result has; x [T, I] of any float dtype.\n"
     "logits = moe.kernels.linear_wide(moe.randn({4, 8}, {dtype = \"bf16\"}), moe.randn {6, 8})"},
    {"linear_fp64", call_wide<linear_fp64>,
     "moe.kernels.linear_fp64(x, w): x wᵀ computed in fp64 whatever the dtypes; x [T, I], w [O, I] → fp64 [T, O].\n"
     "y = moe.kernels.linear_fp64(moe.randn {4, 8}, moe.randn {3, 8})"},
    {"grouped_linear", call_grouped_linear,
     "moe.kernels.grouped_linear(x, plan or offsets, w, {align = 1, fp8 = false}): rows of expert e of x [R, I] through w[e]; w [E, O, I] → [R, O]. offsets [E + 1]: int64 on the\n"
     "CPU, checked; int32 on a GPU, not checked: rows after the last are left unset there. A plan comes from sort_by_expert.\n"
     "y = moe.kernels.grouped_linear(moe.randn {5, 8}, moe.tensor {0, 2, 5}, moe.randn {2, 3, 8})"},
    {"grouped_alignment", call_grouped_alignment,
     "moe.kernels.grouped_alignment(x): the align for sort_by_expert that grouped_linear is quickest with on x's device in its dtype.\n"
     "plan = moe.kernels.sort_by_expert(ids, 8, {align = moe.kernels.grouped_alignment(x)})"},
    {"embed", call_embed, "moe.kernels.embed(ids, w): rows of w [V, D] by ids, int64 [T] → [T, D]. On a GPU an id outside gives NaN.\ny = moe.kernels.embed(moe.tensor {2, 0}, moe.randn {5, 8})"},
    {"head_loss", call_head_loss,
     "moe.kernels.head_loss(x, w, targets, {scale = 1, chunk = 0}): cross entropy of logits x wᵀ summed over tokens, times scale (0-d fp64), and by token, unscaled (fp32 [T]).\n"
     "x [T, D], w [V, D], targets int64 [T], -100 for none; chunk: tokens whose logits exist at a time, 0: chosen. On a GPU a target outside gives NaN.\n"
     "loss, by_token = moe.kernels.head_loss(moe.randn {3, 8}, moe.randn {5, 8}, moe.tensor {1, -100, 4}, {scale = 1 / 2})"},
    {"route", call_route,
     "moe.kernels.route(logits, bias, {top_k = 1, n_group = 1, topk_group = 1, softmax = false, norm_topk = true, best_two = true, scale = 1, temperature = 1, ids =}): scores [T, E],\n"
     "weights [T, K] and ids int64 [T, K] of the chosen experts; logits fp32 or fp64 [T, E], bias [E] or nil, which moves the choice only. ids: a choice to be weighed.\n"
     "scores, weights, ids = moe.kernels.route(moe.randn {4, 8}, nil, {top_k = 2, n_group = 4, topk_group = 2})"},
    {"count_pairs", call_count_pairs,
     "moe.kernels.count_pairs(ids, domain, counts, {kept =, dropped =}): counts int64 [D + 1, E] += pairs of ids [T, K] by (domain + 1, id), in place; domain int32 [T], -1: padding.\n"
     "dropped [E] += the pairs that kept [T, K] has as -1. Returns counts.\n"
     "counts = moe.kernels.count_pairs(ids, moe.zeros({4}, {dtype = \"int32\"}), moe.zeros({2, 8}, {dtype = \"int64\"}))"},
    {"sort_by_expert", call_sort_by_expert,
     "moe.kernels.sort_by_expert(ids, num_experts, {align = 1}): a plan of rows sorted by expert, stable; ids int64 [T, K], -1: dropped. Fields: position, token, choice, offsets, align, rows.\n"
     "plan = moe.kernels.sort_by_expert(moe.tensor {{1, 0}, {1, 2}}, 3)"},
    {"permute", call_permute,
     "moe.kernels.permute(x, weights, plan): rows of x [T, D] and of weights [T, K] (fp32 or fp64) in the plan's order → [R, D] and [R], zeros for padding.\n"
     "rows, row_weight = moe.kernels.permute(moe.randn {2, 8}, moe.ones {2, 2}, plan)"},
    {"unpermute", call_unpermute,
     "moe.kernels.unpermute(base, y, plan): base [T, D] (or nil) + the sum of each token's rows of y [R, D] → [T, D].\n"
     "out = moe.kernels.unpermute(nil, rows, plan)"},
    {"adamw", call_adamw,
     "moe.kernels.adamw(master, grad, m, v, {lr = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0, grad_scale = 1, step = 1, decoupled = true, value =}): one step in place,\n"
     "of tensors of one size; master fp32 or fp64 (or the int16 rests of `value`), grad, m and v fp64, fp32 or bf16; value: bf16 or fp16 weights that follow. Returns master.\n"
     "moe.kernels.adamw(w, g, moe.zeros_like(w), moe.zeros_like(w), {lr = 1e-3})"},
    {"sgd", call_sgd,
     "moe.kernels.sgd(master, grad, buffer, {lr = 0, momentum = 0, weight_decay = 0, grad_scale = 1, value =}): one step in place; buffer nil without momentum. Tensors as for adamw.\n"
     "moe.kernels.sgd(w, g, nil, {lr = 0.1})"},
    {"muon", call_muon,
     "moe.kernels.muon(master, grad, buffer, {lr = 0, momentum = 0.95, weight_decay = 0, grad_scale = 1, products = \"fp32\", value =}): one step in place of matrices [N, R, C]; products:\n"
     "dtype of newton_schulz. Tensors as for adamw. Returns master.\n"
     "moe.kernels.muon(w, g, moe.zeros_like(w), {lr = 1e-3})"},
    {"newton_schulz", call_newton_schulz,
     "moe.kernels.newton_schulz(g, {products = \"fp32\"}): matrices g [N, R, C], fp32 or fp64, with singular values near 1, in the products' dtype (fp64, fp32, bf16).\n"
     "u = moe.kernels.newton_schulz(moe.randn {1, 4, 6})"},
    {"sum_of_squares", call_sum_of_squares, "moe.kernels.sum_of_squares(x): Σ x² of a tensor of any float dtype, 0-d fp64, the same every time.\ns = moe.kernels.sum_of_squares(moe.randn {100}):item()"},
    {"quantize_rows", call_quantize_rows,
     "moe.kernels.quantize_rows(x): x [R, K], bf16 or fp32, as E4M3 [R, K] and scales by 1 x 128, fp32 [ceil(K / 128), R rounded up to 4]. On a GPU K is a multiple of 8.\n"
     "q, scale = moe.kernels.quantize_rows(moe.randn {4, 256})"},
    {"quantize_weight", call_quantize_weight,
     "moe.kernels.quantize_weight(w): w [E, O, I] or [O, I], bf16 or fp32, as E4M3 [E, O, I], transposed [E, I, O], and scales by 128 x 128. On a GPU O and I are multiples of 16.\n"
     "q, transposed, scale = moe.kernels.quantize_weight(moe.randn {128, 256})"},
    {"dequantize_rows", call_dequantize_rows, "moe.kernels.dequantize_rows(q, scale): the fp32 numbers that quantize_rows gave.\nx = moe.kernels.dequantize_rows(moe.kernels.quantize_rows(moe.randn {4, 256}))"},
    {"dequantize_weight", call_dequantize_weight, "moe.kernels.dequantize_weight(q, scale): the fp32 numbers of quantize_weight's first and third result.\nw = moe.kernels.dequantize_weight(q, scale)"},
};
}  // namespace

/// kernel.reference: of the module moe.kernels_reference, kept once looked up. Upvalue 1: the kernel's full name.
static int index_kernel(lua_State* L) {
    check_table(L, 1, "kernel");
    std::string name = lua_tostring(L, upvalue(1)), key = to_string(L, 2);
    MOE_CHECK(key == "reference", usage, name + "." + key, "no such field", "reference", "");
    lua_getglobal(L, "require");
    push_string(L, "moe.kernels_reference");
    lua_call(L, 1, 1);
    push_string(L, name.substr(name.rfind('.') + 1));
    if (lua_rawget(L, -2) == LUA_TNIL) return 1;
    lua_pushvalue(L, 2);
    lua_pushvalue(L, -2);
    lua_rawset(L, 1);
    return 1;
}
void set_kernels(lua_State* L, std::span<const Binding> bindings) {
    constexpr Binding kIndex = {"__index", index_kernel, "kernel.reference: the same by a plain formula in float64, nil where it has none."};
    for (auto& b : bindings) {
        push_callable(L, b, std::string("moe.kernels.") + b.name, kIndex);
        lua_setfield(L, -2, b.name);
    }
}

void open_kernels(lua_State* L) {
    register_type<SortPlan>(L, {.name = nullptr,
                                .help = "sort plan: rows sorted by expert, from moe.kernels.sort_by_expert; permute, unpermute and grouped_linear take it.",
                                .methods = {},
                                .fields = kPlanFields,
                                .meta = kPlanOperators});
    lua_newtable(L);
    set_kernels(L, kFunctions);
    add_attention_kernels(L);
    set_help(L, -1, "moe.kernels",
             "moe.kernels: the ops that models are made of, on plain tensors of any device, with gradients by their inputs and weights; optimizer steps in place.\n"
             "moe.kernels.x.reference is the same by a plain formula in float64. Letters: T tokens, D width, E experts, K chosen a token,\n"
             "R rows sorted by expert, I in, O out, V vocabulary.");
    lua_setfield(L, -2, "kernels");
}
}  // namespace moe::lua
