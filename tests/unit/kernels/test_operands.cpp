// Every op with each of its operands changed in turn: strides, an odd address, another dtype, other shapes, another device. What works gives the numbers of the plain
// operands; what does not is one moe::Error. One line an operand says what it may be.
#include "core/kernels/adamw/adamw.h"
#include "core/kernels/dropout/dropout.h"
#include "core/kernels/embed/embed.h"
#include "core/kernels/head/head_loss.h"
#include "core/kernels/linear/linear.h"
#include "core/kernels/mla/attention.h"
#include "core/kernels/mla_decode/mla_decode.h"
#include "core/kernels/muon/muon.h"
#include "core/kernels/norm/layernorm.h"
#include "core/kernels/norm/rmsnorm.h"
#include "core/kernels/permute/permute.h"
#include "core/kernels/quantize/quantize.h"
#include "core/kernels/route/route.h"
#include "core/kernels/swiglu/swiglu.h"
#include "tests/gpu.h"

#include <ATen/ATen.h>

#include "tests/unit/kernels/reference.h"

using namespace moe;
using namespace moe::kernels;
using namespace moe::kernels::test;

namespace {
/// `may`: s strided, a an odd address on CUDA too, t another dtype, d another device, u one more dim, r one more row, c one more column; no dims changed for a 1-d operand but r.
struct Operand {
    const char* name;
    Tensor value;
    std::string may;
    bool allows(char what) const { return may.find(what) != std::string::npos; }
};
using Tensors = std::vector<Tensor>;
struct OperandOp {
    const char* name;
    std::vector<Operand> operands;
    std::function<Tensors(const Tensors&)> call;           ///< gets copies, as they were changed
    Tensors values() const {
        Tensors out;
        for (auto& o : operands) out.push_back(o.value);
        return out;
    }
};

WeightPtr frozen(const Tensor& value) {
    auto w = c10::make_intrusive<Weight>();
    w->value = value;
    w->name = "w";
    return w;
}

/// All ops on a device; floats are fp32 or bf16, T 6 rows, width 16.
std::vector<OperandOp> all_ops(at::Device device, at::ScalarType dtype) {
    auto floats = [&](std::string_view name, at::IntArrayRef sizes) { return randn(name, sizes).to(device, dtype); };
    auto wide = [&](std::string_view name, at::IntArrayRef sizes) { return randn(name, sizes).to(device, at::kFloat); };
    auto longs = [&](std::vector<int64_t> v, at::IntArrayRef sizes) { return at::tensor(v, at::kLong).reshape(sizes).to(device); };
    auto ints = [&](std::vector<int64_t> v, at::IntArrayRef sizes) { return at::tensor(v, at::kLong).to(at::kInt).reshape(sizes).to(device); };
    Tensor x = floats("x", {6, 16}), w = floats("w", {5, 16}), experts = floats("e", {3, 8, 16}), ids = longs({0, 2, 1, 0, 2, 1, 0, 1, 2, 0, 1, 2}, {6, 2});
    SortPlan plan = sort_by_expert(ids, 3);
    Tensor master = wide("p", {2, 3, 16}), q = floats("q", {6, 2 * 16}), kv = floats("kv", {6, 2 * 16}), k_rope = floats("kr", {6, 8});
    RopeTable table = rope_table(6, 8, 10000, true, {}, at::kFloat, device);
    MlaShape shape{.B = 1, .S = 6, .H = 2, .G = 2, .nope = 8, .rope = 8, .v = 8};
    Tensor docs = ints({0, 0, 2, 2, 2, 5}, {1, 6}), rows = floats("rows", {2, 64, 24}), blocks = ints({1, 0, 0, 1}, {2, 2}), lengths = ints({70, 3}, {2});
    auto cache_of = [](const Tensor& r, const Tensor& b) { return LatentCache{.latent = 16, .rope = 8, .rows = r, .block_table = b}; };
    std::vector<Operand> attention = {{"q", q, "sa"}, {"kv", kv, "sa"}, {"k_rope", k_rope, "sa"}, {"cos", table.cos, "satdr"}, {"sin", table.sin, "satdr"}, {"doc_start", docs, "sa"}};
    return {
        {"rmsnorm", {{"x", x, "sar"}, {"gamma", floats("g", {16}), "a"}}, [](const Tensors& t) { return Tensors{rmsnorm(t[0], frozen(t[1]), 1e-6)}; }},
        {"layernorm", {{"x", x, "sar"}, {"gamma", floats("g", {16}), "sa"}, {"beta", floats("b", {16}), "sa"}}, [](const Tensors& t) { return Tensors{layernorm(t[0], frozen(t[1]), frozen(t[2]), 1e-6)}; }},
        {"swiglu", {{"gate_up", x, "sa"}, {"row_weight", wide("rw", {6}), "sa"}}, [](const Tensors& t) { return Tensors{swiglu(t[0], t[1])}; }},
        {"linear", {{"x", x, "sar"}, {"w", w, "ar"}}, [](const Tensors& t) { return Tensors{linear(t[0], frozen(t[1]))}; }},
        {"linear_wide", {{"x", x, "sar"}, {"w", w.to(at::kFloat), "ar"}}, [](const Tensors& t) { return Tensors{linear_wide(t[0], frozen(t[1]))}; }},
        {"linear_fp64", {{"x", x, "sar"}, {"w", w, "ar"}}, [](const Tensors& t) { return Tensors{linear_fp64(t[0], frozen(t[1]))}; }},
        {"grouped_linear", {{"x", x, "sa"}, {"offsets", at::tensor({0, 2, 2, 6}, at::kLong), "ad"}, {"w", experts, "a"}}, [](const Tensors& t) { return Tensors{grouped_linear(t[0], t[1], frozen(t[2]))}; }},
        {"embed", {{"ids", longs({3, 0, 4, 3}, {4}), "sar"}, {"w", w, "arc"}}, [](const Tensors& t) { return Tensors{embed({}, t[0], frozen(t[1]))}; }},
        {"head_loss", {{"x", x, "sa"}, {"w", w, "ar"}, {"targets", longs({0, 4, -100, 2, 1, 3}, {6}), "sa"}}, [](const Tensors& t) { return Tensors{head_loss(t[0], frozen(t[1]), t[2], {})}; }},
        {"route", {{"logits", wide("l", {6, 8}), "sar"}, {"bias", wide("rb", {8}), "sa"}}, [](const Tensors& t) { auto r = route(t[0], t[1], {.top_k = 2, .n_group = 4, .topk_group = 2}); return Tensors{r.scores_TE, r.weights_TK, r.ids_TK}; }},
        {"route of ids", {{"logits", wide("l", {6, 8}), "sac"}, {"ids", ids, "sa"}}, [](const Tensors& t) { return Tensors{route(t[0], {}, {.top_k = 2}, t[1]).weights_TK}; }},
        {"count_pairs", {{"ids", ids, "sa"}, {"domain", ints({0, 1, -1, 0, 1, 0}, {6}), "sa"}, {"kept", ids.sub(1), "a"}, {"counts", at::zeros({3, 3}, ids.options()), "ar"}, {"dropped", at::zeros({3}, ids.options()), "a"}},
         [](const Tensors& t) { count_pairs(t[0], t[1], t[2], t[3], t[4]); return Tensors{t[3], t[4]}; }},
        {"sort_by_expert", {{"ids", ids, "sarc"}}, [](const Tensors& t) { auto p = sort_by_expert(t[0], 3); return Tensors{p.position_TK, p.groups.offsets_E1}; }},
        {"permute", {{"x", x, "sac"}, {"weights", wide("pw", {6, 2}), "sa"}}, [plan](const Tensors& t) { auto [y, r] = permute(t[0], t[1], plan); return Tensors{y, r}; }},
        {"unpermute", {{"base", x, "sa"}, {"y", floats("y", {plan.R, 16}), "sa"}}, [plan](const Tensors& t) { return Tensors{unpermute(t[0], t[1], plan)}; }},
        {"mla_attention", attention, [shape](const Tensors& t) { return Tensors{mla_attention(t[0], t[1], t[2], {t[3], t[4]}, shape, t[5])}; }},
        {"mla_attention_dropout", attention, [shape](const Tensors& t) { return Tensors{mla_attention_dropout(t[0], t[1], t[2], {t[3], t[4]}, shape, t[5], 0.25, {{1}, 0, 2, 2})}; }},
        {"dropout", {{"x", x, "sarc"}}, [](const Tensors& t) { return Tensors{dropout(t[0], 0.25, {{1}})}; }},
        {"adamw", {{"master", master, "au"}, {"grad", wide("g", {2, 3, 16}), "au"}, {"m", wide("m", {2, 3, 16}), "au"}, {"v", wide("v", {2, 3, 16}).abs(), "au"}, {"value", at::zeros({2, 3, 16}, x.options().dtype(at::kBFloat16)), "au"}},
         [](const Tensors& t) { adamw({t[0], t[4]}, t[1], t[2], t[3], {.lr = 0.1}); return Tensors{t[0], t[2], t[3], t[4]}; }},
        {"sgd", {{"master", master, "au"}, {"grad", wide("g", {2, 3, 16}), "au"}, {"buffer", wide("m", {2, 3, 16}), "au"}}, [](const Tensors& t) { sgd({t[0], {}}, t[1], t[2], {.lr = 0.1, .momentum = 0.5}); return Tensors{t[0], t[2]}; }},
        {"muon", {{"master", master, "a"}, {"grad", wide("g", {2, 3, 16}), "a"}, {"buffer", wide("m", {2, 3, 16}), "a"}}, [](const Tensors& t) { muon({t[0], {}}, t[1], t[2], {.lr = 0.1}); return Tensors{t[0], t[2]}; }},
        {"newton_schulz", {{"g", master, "sarc"}}, [](const Tensors& t) { return Tensors{newton_schulz(t[0], at::kFloat)}; }},
        {"sum_of_squares", {{"x", x, "saurc"}}, [](const Tensors& t) { return Tensors{sum_of_squares(t[0])}; }},
        {"quantize_rows", {{"x", x, "r"}}, [](const Tensors& t) { auto q = empty_quantized_rows(t[0].size(0), 16, t[0]); quantize_rows(t[0], q); return Tensors{dequantize_rows(q)}; }},
        {"quantize_weight", {{"w", floats("qw", {16, 16}), "u"}}, [](const Tensors& t) { auto q = empty_quantized_weight(1, 16, 16, t[0]); quantize_weight(t[0], q); return Tensors{dequantize_weight(q)}; }},
        {"append_latent", {{"latent", x, "sa"}, {"rope", k_rope, "sa"}, {"sequence", ints({0, 1, 0, 1, 0, -1}, {6}), "a"}, {"position", ints({0, 1, 64, 127, 5, 9}, {6}), "a"}, {"rows", rows, "ar"}, {"block_table", blocks, "arc"}},
         [cache_of](const Tensors& t) { append_latent(cache_of(t[4], t[5]), t[0], t[1], t[2], t[3]); return Tensors{t[4]}; }},
        {"mla_decode", {{"q_latent", floats("ql", {2, 1, 3, 16}), "sa"}, {"q_rope", floats("qr", {2, 1, 3, 8}), "sa"}, {"rows", rows, "ar"}, {"block_table", blocks, "ac"}, {"lengths", lengths, "a"}},
         [cache_of](const Tensors& t) { auto d = mla_decode(t[0], t[1], cache_of(t[2], t[3]), t[4], 0.3); return Tensors{d.out, d.lse}; }},
    };
}

/// The same numbers, each element followed by one that is not read.
Tensor strided(const Tensor& t) { return at::stack({t, t.neg()}, -1).select(-1, 0); }
/// The same numbers, one element into their memory.
Tensor shifted(const Tensor& t) { return at::cat({t.flatten().narrow(0, 0, 1), t.flatten()}).narrow(0, 1, t.numel()).view(t.sizes()); }
Tensor one_more(const Tensor& t, int64_t dim) { return at::cat({t, t.narrow(dim, 0, 1)}, dim); }

/// The op with operand i changed, the others as copies.
Tensors call_changed(const OperandOp& op, size_t i, const Tensor& changed) {
    Tensors t;
    for (size_t k = 0; k < op.operands.size(); ++k) t.push_back(k == i ? changed : op.operands[k].value.clone());
    return op.call(t);
}
/// Allowed: no error. Not allowed: moe::Error and nothing else, of one of these kinds.
void check_allowed(const OperandOp& op, size_t i, const char* what, const Tensor& changed, bool allowed, std::initializer_list<ErrorKind> kinds) {
    CAPTURE(op.name, op.operands[i].name, what);
    try {
        call_changed(op, i, changed);
        CHECK(allowed);
    } catch (const Error& e) {
        CAPTURE(e.what());
        CHECK(!allowed);
        CHECK(std::find(kinds.begin(), kinds.end(), e.kind()) != kinds.end());
        CHECK(!e.parts().got.empty());
    } catch (const std::exception& e) {
        CAPTURE(e.what());
        CHECK(false);
    }
}
/// The plain operands' numbers, or a refusal that says so.
void check_same(const OperandOp& op, size_t i, const char* what, Tensor (*change)(const Tensor&), bool allowed, const Tensors& want, double tolerance) {
    check_allowed(op, i, what, change(op.operands[i].value), allowed, {ErrorKind::shape});
    if (!allowed) return;
    CAPTURE(op.name, op.operands[i].name, what);
    Tensors got = call_changed(op, i, change(op.operands[i].value));
    for (size_t k = 0; k < want.size(); ++k) {
        CHECK(got[k].scalar_type() == want[k].scalar_type());
        require_close(got[k].cpu(), want[k].cpu(), tolerance);
    }
}
/// `tolerance` 0: the same bits.
void check_layouts(at::Device device, at::ScalarType dtype, double tolerance) {
    for (const OperandOp& op : all_ops(device, dtype)) {
        Tensors want = call_changed(op, op.operands.size(), {});
        const double limit = std::max(tolerance, op.name == std::string_view("newton_schulz") ? 1e-5 : 0);      // LibTorch's norm of strided rows adds up in another order
        for (size_t i = 0; i < op.operands.size(); ++i) {
            const Operand& o = op.operands[i];
            check_same(op, i, "strided", strided, o.allows('s'), want, limit);
            check_same(op, i, "one element into its memory", shifted, o.allows('a') || device.is_cpu(), want, limit);
        }
    }
}
}  // namespace

TEST_CASE("kernels: operands with strides or from an odd address give the same bits, or are refused", "[kernels]") {
    check_layouts(at::kCPU, at::kFloat, 0);
    check_layouts(at::kCPU, at::kBFloat16, 0);
}

TEST_CASE("kernels: an operand of another dtype or shape is one moe::Error", "[kernels]") {
    for (const OperandOp& op : all_ops(at::kCPU, at::kFloat))
        for (size_t i = 0; i < op.operands.size(); ++i) {
            const Operand& o = op.operands[i];
            check_allowed(op, i, "bytes", o.value.abs().to(at::kByte), o.allows('t'), {ErrorKind::dtype});
            check_allowed(op, i, "one more dim", o.value.unsqueeze(0), o.allows('u'), {ErrorKind::shape});
            check_allowed(op, i, "one more row", one_more(o.value, 0), o.allows('r'), {ErrorKind::shape});
            if (o.value.dim() > 1) check_allowed(op, i, "one more column", one_more(o.value, -1), o.allows('c'), {ErrorKind::shape, ErrorKind::usage});
        }
}

TEST_CASE("kernels: NaN and infinity in a row reach that row and no other", "[kernels]") {
    auto ops = all_ops(at::kCPU, at::kFloat);
    for (const char* name : {"rmsnorm", "layernorm", "swiglu", "linear", "linear_wide", "linear_fp64", "route", "dropout", "mla_decode"}) {
        const OperandOp& op = *std::find_if(ops.begin(), ops.end(), [&](auto& o) { return std::string_view(o.name) == name; });
        for (double bad : {double(NAN), double(INFINITY)}) {
            if (op.name == std::string_view("route") && !std::isnan(bad)) continue;      // a score of an infinite logit is 1
            CAPTURE(name, bad);
            Tensor x = op.operands[0].value.clone();
            x.select(0, 1).view(-1)[3].fill_(bad);
            Tensor out = call_changed(op, 0, x)[0].flatten(1);
            CHECK(!out.select(0, 1).isfinite().all().item<bool>());
            CHECK(at::cat({out.narrow(0, 0, 1), out.narrow(0, 2, out.size(0) - 2)}).isfinite().all().item<bool>());
        }
    }
}

TEST_CASE("kernels: a NaN stays one where sums, steps and losses are made", "[kernels]") {
    const Tensor bad = at::full({4}, NAN);
    CHECK(std::isnan(sum_of_squares(bad).item<double>()));
    Tensor w = at::ones({4}), m = at::zeros({4}), v = at::zeros({4});
    adamw({w, {}}, bad, m, v, {.lr = 0.1});
    CHECK(w.isnan().all().item<bool>());
    CHECK((m.isnan().all().item<bool>() && v.isnan().all().item<bool>()));
    Tensor matrix = at::ones({1, 2, 2});
    muon({matrix, {}}, bad.view({1, 2, 2}), at::zeros({1, 2, 2}), {.lr = 0.1});
    CHECK(matrix.isnan().all().item<bool>());
    CHECK(std::isnan(head_loss(bad.view({1, 4}), frozen(at::ones({3, 4})), at::zeros({1}, at::kLong), {}).item<double>()));
    for (bool fp8 : {false, true}) {
        auto format = fp8 ? LatentCache::Format::fp8 : LatentCache::Format::plain;
        LatentCache cache{format, 128, 2, make_cache_rows(format, 1, 128, 2, at::kFloat, at::kCPU), at::zeros({1, 1}, at::kInt)};
        Tensor latent = at::ones({1, 128});
        latent[0][5] = NAN;
        append_latent(cache, latent, at::ones({1, 2}), at::zeros({1}, at::kInt), at::zeros({1}, at::kInt));
        MlaDecoded d = mla_decode(at::ones({1, 1, 2, 128}), at::ones({1, 1, 2, 2}), cache, at::ones({1}, at::kInt), 1);
        CAPTURE(fp8);
        CHECK(d.out.isnan().all().item<bool>());
        CHECK(d.lse.isnan().all().item<bool>());
    }
}

TEST_CASE("kernels: numbers that no kernel may meet are refused before it runs", "[kernels]") {
    require_error(ErrorKind::shape, "route: ids[1][0]: got 8", [] { route(at::zeros({2, 8}), {}, {}, at::tensor({0, 8}, at::kLong).view({2, 1})); });
    require_error(ErrorKind::shape, "route: ids[0][0]: got -1", [] { route(at::zeros({1, 8}), {}, {}, at::full({1, 1}, -1, at::kLong)); });
    require_error(ErrorKind::usage, "rows.group: got 0", [] { dropout(at::zeros({2, 2}), 0.5, {{}, 0, 0, 1}); });
    require_error(ErrorKind::usage, "rows.group: got -1", [] { normal_rows(2, 2, {{}, 0, -1, 1}, at::kFloat, at::kCPU); });
    require_error(ErrorKind::usage, "sort_by_expert: align", [] { sort_by_expert(at::zeros({2, 2}, at::kLong), 4, int64_t(1) << 62); });
    require_error(ErrorKind::usage, "sort_by_expert: num_experts", [] { sort_by_expert(at::zeros({2, 2}, at::kLong), int64_t(1) << 40); });
    const Tensor rest = at::zeros({1, 2, 2}, at::kShort), grad = at::zeros({1, 2, 2});
    require_error(ErrorKind::shape, "value of a split master", [&] { muon({rest, {}}, grad, grad.clone(), {}); });
    require_error(ErrorKind::shape, "muon: value", [&] { muon({rest, at::zeros({2}, at::kBFloat16)}, grad, grad.clone(), {}); });
    require_error(ErrorKind::shape, "", [&] { adamw({rest, {}}, grad, grad.clone(), grad.clone(), {}); });
}

TEST_CASE("cuda kernels: operands with strides or from an odd address give the same numbers, or are refused", "[gpu][kernels]") {
    if (!moe::test::has_gpu()) return;
    check_layouts(at::Device(at::kCUDA, 0), at::kFloat, 1e-5);
    check_layouts(at::Device(at::kCUDA, 0), at::kBFloat16, 1e-2);
}

TEST_CASE("cuda kernels: an operand on another device is one moe::Error", "[gpu][kernels]") {
    if (!moe::test::has_gpu()) return;
    for (const OperandOp& op : all_ops(at::Device(at::kCUDA, 0), at::kFloat))
        for (size_t i = 0; op.operands.size() > 1 && i < op.operands.size(); ++i) {
            const Operand& o = op.operands[i];
            check_allowed(op, i, "the CPU's", o.value.cpu(), o.allows('d') , {ErrorKind::device});
        }
}

TEST_CASE("cuda kernels: a given choice outside the experts and a NaN in a cache give NaN", "[gpu][kernels]") {
    if (!moe::test::has_gpu()) return;
    const auto cuda = at::TensorOptions().device(at::kCUDA).dtype(at::kBFloat16);
    Tensor logits = at::zeros({3, 8}, cuda.dtype(at::kFloat)), ids = at::tensor({1, 8, -1}, at::kLong).view({3, 1}).to(at::kCUDA);
    Route r = route(logits.set_requires_grad(true), {}, {}, ids);
    CHECK(r.weights_TK.isfinite().flatten().cpu().to(at::kInt).equal(at::tensor({1, 0, 0}, at::kInt)));
    CHECK(torch::autograd::grad({r.weights_TK.sum()}, {logits})[0].size(0) == 3);
    // The kernels at the speed of memory, and the general one.
    for (auto [latent, rope] : {std::pair<int64_t, int64_t>{512, 64}, {128, 2}})
        for (auto format : {LatentCache::Format::plain, LatentCache::Format::fp8})
            for (int64_t length : {1, 200, 5000}) {
                CAPTURE(latent, int(format), length);
                const int64_t blocks = (length + 63) / 64;
                LatentCache cache{format, latent, rope, make_cache_rows(format, blocks, latent, rope, at::kBFloat16, at::kCUDA), at::arange(blocks, cuda.dtype(at::kInt)).view({1, blocks})};
                Tensor x = at::ones({1, latent}, cuda), at_end = at::full({1}, length - 1, cuda.dtype(at::kInt)), zero = at::zeros({1}, cuda.dtype(at::kInt));
                x[0][5] = NAN;
                append_latent(cache, x, at::ones({1, rope}, cuda), zero, at_end);
                Tensor q = at::ones({1, 1, 16, latent}, cuda), q_rope = at::ones({1, 1, 16, rope}, cuda);
                MlaDecoded seen = mla_decode(q, q_rope, cache, at_end + 1, 0.01), before = mla_decode(q, q_rope, cache, at_end, 0.01);
                CHECK(seen.out.isnan().all().item<bool>());
                CHECK(seen.lse.isnan().all().item<bool>());
                if (length % 64 == 1) CHECK(before.out.isfinite().all().item<bool>());       // the NaN lies in no block that is read
            }
}
