// MKL chooses its code paths by asking whether the processor's vendor is Intel. On an AMD processor with the same vector units
// its float32 products then run slower: at half the speed on a Zen 5 (AVX-512), a fifth slower on a Zen 3 (AVX2). LibTorch's
// copy of MKL asks through this exported function; the dynamic linker finds the one of the executable first, so answering
// here makes MKL choose by what the processor can do. On an Intel processor the answer is the same as MKL's own. MKL does not
// promise that this works: where a version asks in another way nothing breaks, products are only slower. The last bits of
// results may differ from those of LibTorch's own programs.
// The function sits beside one that linear_cpu.cpp calls, so that it is pulled out of the static library.
#include "core/kernels/linear/linear_kernels.h"

extern "C" __attribute__((visibility("default"), used)) int mkl_serv_intel_cpu_true() { return 1; }

namespace moe::kernels {
bool mkl_switch_active() { return mkl_serv_intel_cpu_true() == 1; }
}  // namespace moe::kernels
