// The kernels in a CUDA source and what they take: as much of C++ as that needs.
#pragma once
#include <c10/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

namespace moe::lua {

/// One parameter of a kernel: a pointer to numbers, or a number.
struct KernelParameter {
    std::string name, type;                         ///< type as written, without const and __restrict__: "float*"
    bool is_pointer = false;
    bool is_read_only = false;                      ///< a pointer to const
    std::optional<at::ScalarType> dtype;            ///< of a tensor or a number; none for void*
    bool is_unsigned = false;                       ///< numbers
    size_t bytes = 8;                               ///< of the value as it is passed
};
struct KernelSignature {
    std::string name;
    std::vector<KernelParameter> parameters;
};

/// Every `__global__ void name(…)` that is no template, in order. Comments, launch bounds and qualifiers are passed over.
/// Throws moe::Error (usage) for a parameter that no argument of Lua's could be: structs, references, pointers to pointers.
std::vector<KernelSignature> kernel_signatures(const std::string& source);

}  // namespace moe::lua
