#include "core/dist/layout.h"

#include "core/base/error.h"
#include "core/tensor/check.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <numeric>

namespace moe::dist {
namespace {
/// What the backward of an exchange needs: the same group with the counts swapped.
struct Exchange : torch::CustomClassHolder {
    Group group;
    std::vector<int64_t> send, recv;
    Exchange(Group group, std::vector<int64_t> send, std::vector<int64_t> recv) : group(std::move(group)), send(std::move(send)), recv(std::move(recv)) {}
};
using ExchangePtr = c10::intrusive_ptr<Exchange>;

/// Rows to the ranks that want them; the gradient's rows go back the same way. Every rank runs both directions, also with no
/// rows at all: a rank that stayed away would leave the others waiting.
struct ExchangeRows : torch::autograd::Function<ExchangeRows> {
    static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& rows, const ExchangePtr& x) {
        ctx->saved_data["exchange"] = c10::IValue::make_capsule(x);
        return x->group.all_to_all_rows(rows.contiguous(), x->send, x->recv);
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
        auto x = c10::static_intrusive_pointer_cast<Exchange>(ctx->saved_data.at("exchange").toCapsule());
        return {x->group.all_to_all_rows(grads[0].contiguous(), x->recv, x->send), Tensor()};
    }
};

/// Rows of all ranks, one after another; every rank has as many.
Tensor gather_rows(const Group& group, const Tensor& x) {
    auto sizes = x.sizes().vec();
    sizes[0] *= group.size();
    Tensor out = at::empty(sizes, x.options().requires_grad(false));
    group.all_gather(x.contiguous().view(-1), out.view(-1), std::vector<int64_t>(size_t(group.size()), x.numel()));
    return out;
}
/// The sum over the ranks, cut into as many runs of rows.
Tensor scatter_rows(const Group& group, const Tensor& x) {
    if (x.scalar_type() == at::kHalf) return scatter_rows(group, x.to(at::kFloat)).to(at::kHalf);      // libraries sum no halves on the host
    auto sizes = x.sizes().vec();
    MOE_CHECK(sizes[0] % group.size() == 0, shape, "tp.exit", fmt::format("{} tokens on {} ranks", sizes[0], group.size()), "tokens that divide evenly", "change training.micro_batch_size or seq_length");
    sizes[0] /= group.size();
    Tensor out = at::empty(sizes, x.options().requires_grad(false));
    group.reduce_scatter(x.contiguous().view(-1), out.view(-1), std::vector<int64_t>(size_t(group.size()), out.numel()));
    return out;
}
struct GroupHolder : torch::CustomClassHolder {
    Group group;
    explicit GroupHolder(Group g) : group(std::move(g)) {}
};
using GroupPtr = c10::intrusive_ptr<GroupHolder>;
Group held_group(torch::autograd::AutogradContext* ctx) { return c10::static_intrusive_pointer_cast<GroupHolder>(ctx->saved_data.at("group").toCapsule())->group; }

struct GatherRows : torch::autograd::Function<GatherRows> {
    static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const GroupPtr& group) {
        ctx->saved_data["group"] = c10::IValue::make_capsule(group);
        return gather_rows(group->group, x);
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) { return {scatter_rows(held_group(ctx), grads[0]), Tensor()}; }
};
struct ScatterRows : torch::autograd::Function<ScatterRows> {
    static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const GroupPtr& group) {
        ctx->saved_data["group"] = c10::IValue::make_capsule(group);
        return scatter_rows(group->group, x);
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) { return {gather_rows(held_group(ctx), grads[0]), Tensor()}; }
};

Tensor same_on_one_rank(const char* op, const Group& group, const Tensor& x) {
    MOE_CHECK(group.size() == 1, config, op, fmt::format("{} ranks", group.size()), "1", "this axis is not built yet");
    return x;
}
}  // namespace

ExpertPlan ExpertParallel::plan(const at::Tensor& offsets_E1) const {
    constexpr const char* op = "ep.plan";
    check_dims(op, {"offsets", offsets_E1}, 1);
    check_dtype(op, {"offsets", offsets_E1}, {at::kLong});
    MOE_CHECK(offsets_E1.is_cpu() && offsets_E1.numel() >= 2, shape, op, describe(offsets_E1), "int64 [E + 1] on the host", "");
    int64_t experts = offsets_E1.numel() - 1, ranks = group.size();
    MOE_CHECK(experts % ranks == 0, config, "distributed.expert_parallel_size", fmt::format("{} experts on {} ranks", experts, ranks), "experts that divide evenly", "");
    Tensor offsets = offsets_E1.contiguous();
    const int64_t* at_E1 = offsets.data_ptr<int64_t>();
    ExpertPlan plan;
    plan.offsets = offsets;
    int64_t local = experts / ranks;
    for (int64_t r = 0; r < ranks; ++r) plan.send.push_back(at_E1[(r + 1) * local] - at_E1[r * local]);
    if (ranks == 1) {
        plan.recv = plan.send;
        return plan;
    }
    Tensor counts = at::empty({ranks, local}, offsets.options());
    for (int64_t e = 0; e < experts; ++e) counts.data_ptr<int64_t>()[e] = at_E1[e + 1] - at_E1[e];
    std::vector<int64_t> ones(ranks, 1);
    Tensor received = group.all_to_all_rows(counts, ones, ones);      // [ranks, local experts]: row r is what rank r sends here
    const int64_t* n = received.data_ptr<int64_t>();
    for (int64_t r = 0; r < ranks; ++r) plan.recv.push_back(std::accumulate(n + r * local, n + (r + 1) * local, int64_t(0)));
    plan.expert_Q = at::empty({std::accumulate(plan.recv.begin(), plan.recv.end(), int64_t(0)), 1}, offsets.options());
    int64_t* out = plan.expert_Q.data_ptr<int64_t>();
    for (int64_t i = 0; i < ranks * local; ++i) out = std::fill_n(out, n[i], i % local);
    return plan;
}

at::Tensor ExpertParallel::dispatch(const at::Tensor& rows, const ExpertPlan& plan) const {
    if (group.size() == 1) return rows;
    return ExchangeRows::apply(rows, c10::make_intrusive<Exchange>(group, plan.send, plan.recv));
}

at::Tensor ExpertParallel::combine(const at::Tensor& rows, const ExpertPlan& plan) const {
    if (group.size() == 1) return rows;
    return ExchangeRows::apply(rows, c10::make_intrusive<Exchange>(group, plan.recv, plan.send));
}

at::Tensor TensorParallel::enter(const at::Tensor& x) const { return group.size() == 1 ? x : GatherRows::apply(x, c10::make_intrusive<GroupHolder>(group)); }
at::Tensor TensorParallel::exit(const at::Tensor& x) const { return group.size() == 1 ? x : ScatterRows::apply(x, c10::make_intrusive<GroupHolder>(group)); }
at::Tensor TensorParallel::part(const at::Tensor& x) const {
    if (group.size() == 1) return x;
    MOE_CHECK(x.size(0) % group.size() == 0, shape, "tp.part", fmt::format("{} tokens on {} ranks", x.size(0), group.size()), "tokens that divide evenly", "change training.micro_batch_size or seq_length");
    int64_t each = x.size(0) / group.size();
    return x.narrow(0, group.rank() * each, each);
}
at::Tensor ContextParallel::gather(const at::Tensor& x) const { return same_on_one_rank("distributed.context_parallel_size", group, x); }
}  // namespace moe::dist
