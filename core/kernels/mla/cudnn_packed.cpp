#ifdef MOE_WITH_CUDA
#include "core/kernels/mla/cudnn_packed.h"

#include "core/base/error.h"

#include <ATen/cudnn/Handle.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/diff.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/stack.h>
#define NV_CUDNN_FRONTEND_DISABLE_LOGGING
#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#include <cudnn_frontend.h>

#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace cudnn_frontend {
/// Where its symbols are looked up: null is the whole process, to which LibTorch brings its cuDNN.
void* cudnn_dlhandle = nullptr;
}  // namespace cudnn_frontend

namespace moe::kernels {
namespace {
namespace fe = cudnn_frontend;
using Attributes = std::shared_ptr<fe::graph::Tensor_attributes>;

/// Rows of PackedDocuments::offsets, in the order in which packed_documents makes them.
enum Offset : int64_t { kOfQ, kOfK, kOfV, kOfOut, kOfDv, kOfLse };
/// Names of tensors in a graph; offsets follow from kFirstOffset on.
enum Id : int64_t { kQ = 1, kK, kV, kOut, kLse, kDout, kDq, kDk, kDv, kLengthsQ, kLengthsK, kFirstOffset };

void check(fe::error_t status, const char* what) {
    std::string reason = status.is_good() ? "" : status.get_message();
    MOE_CHECK(status.is_good(), cuda, std::string("mla_attention: cuDNN: ") + what, reason.empty() ? "error " + std::to_string(int(status.get_code())) : reason, "a graph that cuDNN supports", "");
}

struct Plan {
    std::shared_ptr<fe::graph::Graph> graph = std::make_shared<fe::graph::Graph>();
    int64_t workspace_bytes = 0;

    explicit Plan(const PackedShape& s) : shape_(s) {
        graph->set_io_data_type(s.dtype == at::kHalf ? fe::DataType_t::HALF : fe::DataType_t::BFLOAT16).set_intermediate_data_type(fe::DataType_t::FLOAT).set_compute_data_type(fe::DataType_t::FLOAT);
    }
    Attributes rows(Id id, Offset offset, int64_t heads, int64_t width, int64_t row, int64_t head) {
        auto t = graph->tensor(fe::graph::Tensor_attributes());
        return describe(t, id, offset, heads, width, row, head);
    }
    /// What cuDNN sees of a packed tensor: N sequences of S positions at most, whose starts are a tensor of their own.
    Attributes describe(Attributes t, Id id, Offset offset, int64_t heads, int64_t width, int64_t row, int64_t head) {
        t->set_uid(id).set_dim({shape_.N, heads, shape_.S, width}).set_stride({row * shape_.S, head, row, 1}).set_ragged_offset(start(offset));
        return t;
    }
    Attributes start(Offset offset) {
        auto& t = starts_[offset];
        if (!t) t = graph->tensor(fe::graph::Tensor_attributes().set_uid(int64_t(kFirstOffset) + int64_t(offset)).set_dim({shape_.N + 1, 1, 1, 1}).set_stride({1, 1, 1, 1}).set_data_type(fe::DataType_t::INT64));
        return t;
    }
    Attributes lengths(Id id) {
        return graph->tensor(fe::graph::Tensor_attributes().set_uid(id).set_dim({shape_.N, 1, 1, 1}).set_stride({1, 1, 1, 1}).set_data_type(fe::DataType_t::INT32));
    }
    template <class Options> Options options() {
        Options o;
        o.set_attn_scale(float(shape_.scale)).set_padding_mask(true).set_seq_len_q(lengths(kLengthsQ)).set_seq_len_kv(lengths(kLengthsK)).set_max_total_seq_len_q(shape_.T).set_max_total_seq_len_kv(shape_.T);
        o.set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT).set_diagonal_band_right_bound(0);
        if (shape_.window > 0) o.set_diagonal_band_left_bound(int(shape_.window));
        return o;
    }
    void finish() {
        cudnnHandle_t handle = at::native::getCudnnHandle();
        check(graph->validate(), "graph");
        check(graph->build_operation_graph(handle), "operations");
        check(graph->create_execution_plans({fe::HeurMode_t::A}), "plans");
        check(graph->check_support(), "support");
        check(graph->build_plans(), "building a plan");
        check(graph->get_workspace_size(workspace_bytes), "workspace");
    }
    void run(std::unordered_map<int64_t, void*> pack, const PackedDocuments& documents, const Tensor& like) const {
        pack[kLengthsQ] = pack[kLengthsK] = documents.lengths.data_ptr();
        for (auto& [offset, t] : starts_) pack[int64_t(kFirstOffset) + int64_t(offset)] = documents.offsets.select(0, offset).data_ptr();
        Tensor workspace = at::empty({workspace_bytes}, like.options().dtype(at::kByte));
        check(graph->execute(at::native::getCudnnHandle(), pack, workspace.data_ptr()), "execution");
    }

private:
    PackedShape shape_;
    std::map<Offset, Attributes> starts_;
};

/// The log-sum-exp: [T, H], a token's heads beside each other.
Attributes lse_of(Plan& plan, Attributes t, const PackedShape& s) {
    plan.describe(t, kLse, kOfLse, s.H, 1, s.H, 1)->set_data_type(fe::DataType_t::FLOAT);
    return t;
}

std::unique_ptr<Plan> plan_forward(const PackedShape& s) {
    auto p = std::make_unique<Plan>(s);
    auto q = p->rows(kQ, kOfQ, s.H, s.D, s.H * s.D, s.D), k = p->rows(kK, kOfK, s.G, s.D, s.G * s.D, s.D), v = p->rows(kV, kOfV, s.G, s.V, s.v_row, s.v_head);
    auto [out, lse] = p->graph->sdpa(q, k, v, p->options<fe::graph::SDPA_attributes>().set_generate_stats(true));
    p->describe(out, kOut, kOfOut, s.H, s.V, s.H * s.V, s.V)->set_output(true);
    lse_of(*p, lse, s)->set_output(true);
    p->finish();
    return p;
}

std::unique_ptr<Plan> plan_backward(const PackedShape& s) {
    auto p = std::make_unique<Plan>(s);
    auto q = p->rows(kQ, kOfQ, s.H, s.D, s.H * s.D, s.D), k = p->rows(kK, kOfK, s.G, s.D, s.G * s.D, s.D), v = p->rows(kV, kOfV, s.G, s.V, s.v_row, s.v_head);
    auto out = p->rows(kOut, kOfOut, s.H, s.V, s.H * s.V, s.V), dout = p->rows(kDout, kOfOut, s.H, s.V, s.H * s.V, s.V);
    auto lse = lse_of(*p, p->graph->tensor(fe::graph::Tensor_attributes()), s);
    auto [dq, dk, dv] = p->graph->sdpa_backward(q, k, v, out, dout, lse, p->options<fe::graph::SDPA_backward_attributes>());
    p->describe(dq, kDq, kOfQ, s.H, s.D, s.H * s.D, s.D)->set_output(true);
    p->describe(dk, kDk, kOfK, s.G, s.D, s.G * s.D, s.D)->set_output(true);
    p->describe(dv, kDv, kOfDv, s.G, s.V, s.G * s.V, s.V)->set_output(true);
    p->finish();
    return p;
}

/// One plan a shape, device and direction.
const Plan& plan_for(const PackedShape& shape, bool backward) {
    struct Plans { std::mutex mutex; std::map<std::tuple<int, bool, PackedShape>, std::unique_ptr<Plan>> by_shape; };
    static Plans& plans = *new Plans;                    // never destroyed: the device may be gone by then
    std::lock_guard lock(plans.mutex);
    auto& plan = plans.by_shape[{at::cuda::current_device(), backward, shape}];
    if (!plan) plan = backward ? plan_backward(shape) : plan_forward(shape);
    return *plan;
}
}  // namespace

PackedDocuments packed_documents(const Tensor& starts, const PackedShape& s) {
    Tensor wide = starts.to(at::kLong);
    std::vector<Tensor> offsets;                          // made by scalars, so that a graph of kernels can record it
    for (int64_t elements : {s.H * s.D, s.G * s.D, s.v_row, s.H * s.V, s.G * s.V, s.H}) offsets.push_back(at::mul(wide, elements));
    return {at::diff(starts), at::stack(offsets)};
}

void cudnn_packed_forward(const PackedShape& shape, const PackedDocuments& documents, const Tensor& q, const Tensor& k, const Tensor& v, Tensor out, Tensor lse) {
    plan_for(shape, false).run({{kQ, q.data_ptr()}, {kK, k.data_ptr()}, {kV, v.data_ptr()}, {kOut, out.data_ptr()}, {kLse, lse.data_ptr()}}, documents, q);
}

void cudnn_packed_backward(const PackedShape& shape, const PackedDocuments& documents, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& dout,
                           Tensor dq, Tensor dk, Tensor dv) {
    plan_for(shape, true).run({{kQ, q.data_ptr()}, {kK, k.data_ptr()}, {kV, v.data_ptr()}, {kOut, out.data_ptr()}, {kLse, lse.data_ptr()}, {kDout, dout.data_ptr()},
                               {kDq, dq.data_ptr()}, {kDk, dk.data_ptr()}, {kDv, dv.data_ptr()}}, documents, q);
}
}  // namespace moe::kernels
#endif
