#include "core/base/error.h"
#include "core/store/safetensors.h"
#include "core/tensor/check.h"
#include "core/train/interventions.h"

#include <ATen/ATen.h>

#include <array>
#include <cstring>

namespace moe::train {
namespace {
constexpr char kLetters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

std::string to_base64(const uint8_t* data, size_t n) {
    std::string out;
    out.reserve((n + 2) / 3 * 4);
    for (size_t i = 0; i < n; i += 3) {
        uint32_t v = uint32_t(data[i]) << 16 | (i + 1 < n ? uint32_t(data[i + 1]) << 8 : 0) | (i + 2 < n ? data[i + 2] : 0);
        for (int k = 0; k < 4; ++k) out += size_t(k) > n - i ? '=' : kLetters[v >> (18 - 6 * k) & 63];
    }
    return out;
}

std::string from_base64(const std::string& text) {
    std::array<int, 256> value;
    value.fill(-1);
    for (int i = 0; i < 64; ++i) value[uint8_t(kLetters[i])] = i;
    std::string out;
    uint32_t bits = 0;
    int n = 0;
    for (char c : text) {
        if (c == '=') break;
        int v = value[uint8_t(c)];
        MOE_CHECK(v >= 0, data, "a stored tensor", "a letter that is not of base64", "base64", "");
        bits = bits << 6 | uint32_t(v);
        if ((n += 6) >= 8) out += char(bits >> (n -= 8) & 255);
    }
    return out;
}
}  // namespace

bool is_tensor_values(const Values& value) { return value.is_object() && value.contains("base64") && value.contains("dtype") && value.contains("shape"); }

Values tensor_to_values(const at::Tensor& tensor) {
    at::Tensor t = tensor.detach().to(at::kCPU).contiguous();
    return {{"dtype", store::safetensors_dtype(t.scalar_type())}, {"shape", t.sizes().vec()}, {"base64", to_base64(static_cast<const uint8_t*>(t.const_data_ptr()), size_t(t.nbytes()))}};
}

at::Tensor tensor_from_values(const Values& value) {
    try {
        auto dtype = store::safetensors_dtype_named(value.at("dtype"));
        MOE_CHECK(dtype, data, "a stored tensor", value.at("dtype").dump(), "a known dtype", "");
        at::Tensor t = at::empty(value.at("shape").get<std::vector<int64_t>>(), at::TensorOptions().dtype(*dtype));
        std::string bytes = from_base64(value.at("base64"));
        MOE_CHECK(bytes.size() == t.nbytes(), data, "a stored tensor", fmt::format("{} bytes", bytes.size()), fmt::format("{} bytes of {}", t.nbytes(), shape_text(t.sizes())), "");
        if (!bytes.empty()) std::memcpy(t.mutable_data_ptr(), bytes.data(), bytes.size());
        return t;
    } catch (const Values::exception& e) {
        MOE_THROW(data, "a stored tensor", e.what(), "{dtype, shape, base64}", "");
    }
}

}  // namespace moe::train
