// A copy lies in the tensor's backend_meta, which detach() shares and views do not have.
#include "core/kernels/quantize/quantize.h"

#include "core/tensor/check.h"

#include <c10/core/TensorImpl.h>

namespace moe::kernels {
namespace {
/// Tensors that share memory by detach() share the object too, so a copy that one of them gives up is gone for all.
struct Attached : c10::BackendMeta {
    QuantizedRows copy;
    int64_t version;
    const void* data;
    int readers;
    Attached(QuantizedRows copy, int64_t version, const void* data, int readers) : copy(std::move(copy)), version(version), data(data), readers(readers) {}
};
int64_t version_of(const Tensor& x) { return x.is_inference() ? 0 : int64_t(x._version()); }
}  // namespace

QuantizedRows copy_to_fill(int64_t rows, int64_t columns, const Tensor& like, bool wanted) {
    return wanted && like.scalar_type() == at::kBFloat16 ? empty_quantized_rows(rows, columns, like) : QuantizedRows{};
}

void attach_rows(const Tensor& x_RK, QuantizedRows copy, int readers) {
    if (!copy.q_RK.defined() || readers < 1) return;
    MOE_CHECK(x_RK.sizes() == copy.q_RK.sizes(), shape, "attach_rows: copy", shape_text(copy.q_RK.sizes()), shape_text(x_RK.sizes()), "");
    check_contiguous("attach_rows", {"x", x_RK});
    check_same_device("attach_rows", {"x", x_RK}, {"copy", copy.q_RK});
    x_RK.unsafeGetTensorImpl()->set_backend_meta(c10::make_intrusive<Attached>(std::move(copy), version_of(x_RK), x_RK.const_data_ptr(), readers));
}

void pass_rows(const Tensor& x_RK, const Tensor& to_RK) {
    auto* meta = x_RK.unsafeGetTensorImpl()->get_backend_meta();
    if (dynamic_cast<Attached*>(meta)) to_RK.unsafeGetTensorImpl()->set_backend_meta(c10::intrusive_ptr<c10::BackendMeta>::reclaim_copy(meta));
}

std::optional<QuantizedRows> take_rows(const Tensor& x_RK) {
    auto* a = dynamic_cast<Attached*>(x_RK.unsafeGetTensorImpl()->get_backend_meta());
    if (!a || a->readers < 1) return {};
    const bool same = a->version == version_of(x_RK) && a->data == x_RK.const_data_ptr() && a->copy.q_RK.sizes() == x_RK.sizes();
    if (same && --a->readers > 0) return a->copy;
    a->readers = 0;
    QuantizedRows last = std::exchange(a->copy, {});
    return same ? std::optional(std::move(last)) : std::nullopt;
}
}  // namespace moe::kernels
