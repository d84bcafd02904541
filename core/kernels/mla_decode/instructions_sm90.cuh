// The instructions that CUDA C++ has no name for, one function each. Addresses are those of the shared state space.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace moe::kernels::sm90 {

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

/// threadIdx.x read anew, so that what follows from it takes no registers in between.
__device__ inline unsigned thread_again() {
    unsigned thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// ---- barriers in shared memory that also count bytes

__device__ inline void barrier_init(uint32_t bar, uint32_t arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory"); }
/// Makes initialised barriers known to the copy engine.
__device__ inline void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_expect(uint32_t bar, uint32_t bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory"); }
__device__ inline void barrier_arrive(uint32_t bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
/// What a warp's arrival counts. compute-sanitizer's racecheck follows an arrival only for the lane that executes it, not through __syncwarp: in a build for it all lanes arrive.
#ifdef MOE_RACECHECK
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif
/// A whole warp calls it: what its lanes have read and written comes before what others do after the wait.
__device__ inline void warp_arrive(uint64_t& bar) {
    __syncwarp();
    if (kWarpArrivals > 1 || threadIdx.x % 32 == 0) barrier_arrive(shared_address(&bar));
}
/// Waits for the end of the phase of this parity.
__device__ inline void barrier_wait(uint32_t bar, uint32_t parity) {
    asm volatile("{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra.uni out;\nbra.uni wait;\nout:\n}" ::"r"(bar), "r"(parity) : "memory");
}
/// Ordinary stores of this thread become visible to the copy engine and to wgmma.
__device__ inline void fence_for_engines() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
template <int kId, int kThreads> __device__ inline void named_barrier() { asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory"); }

/// The next kernel of the stream may start as soon as all blocks said so; it waits for this one's results by itself.
__device__ inline void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- copies into shared memory that end at a barrier

/// bytes a multiple of 16, both ends at multiples of 16.
__device__ inline void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
__device__ inline void tensor_load(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(map), "r"(x), "r"(y), "r"(bar) : "memory");
}
/// Into the L2 cache only.
__device__ inline void bulk_prefetch(const void* from, uint32_t bytes) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory"); }
__device__ inline void prefetch_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// ---- products of a warp

/// Four 8 x 8 matrices of 2-byte elements; lane l gives the address of row l % 8 of matrix l / 8 and gets elements (l / 4, 2 (l % 4)) and the next of each.
__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
/// The same of the transposed matrices.
__device__ inline void load_transposed(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
/// The inverse of load_matrices.
__device__ inline void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
/// The same with the matrices transposed.
__device__ inline void store_transposed(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
/// c [16, 8] += a [16, 16] b [16, 8].
__device__ inline void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// Four E4M3 values as fp16 values, the lower bytes first.
__device__ inline void halves_of_e4m3(uint32_t four, uint32_t& low, uint32_t& high) {
    asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.rn.f16x2.e4m3x2 %0, a;\ncvt.rn.f16x2.e4m3x2 %1, b;\n}" : "=r"(low), "=r"(high) : "r"(four));
}
__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- products of a warpgroup (128 threads)

/// Tile in shared memory whose rows of 128 bytes are swizzled, the contracted dim along a row; eight rows every 1024 bytes.
__device__ inline uint64_t rows_descriptor(uint32_t at) { return (uint64_t(1) << 62) | (uint64_t(64) << 32) | (uint64_t(1) << 16) | (at >> 4 & 0x3fff); }
/// The same tile with the contracted dim across rows; the next 64 columns lie `apart` bytes on.
__device__ inline uint64_t columns_descriptor(uint32_t at, uint32_t apart) {
    return (uint64_t(1) << 62) | (uint64_t(64) << 32) | (uint64_t(apart >> 4) << 16) | (at >> 4 & 0x3fff);
}
/// 64 rows of 16 columns as 8 x 8 matrices of 128 bytes: two side by side, then the next eight rows.
__device__ inline uint64_t plain_descriptor(uint32_t at) { return (uint64_t(16) << 32) | (uint64_t(8) << 16) | (at >> 4 & 0x3fff); }
__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Until at most kUnderWay groups are.
template <int kUnderWay = 0> __device__ inline void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kUnderWay) : "memory"); }

#define MOE_D8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define MOE_D32(d, i) MOE_D8(d, i), MOE_D8(d, i + 8), MOE_D8(d, i + 16), MOE_D8(d, i + 24)

#define MOE_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MOE_R16 MOE_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MOE_R32 MOE_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MOE_WGMMA(n, type, sums, operands, b_at, add_at, ...)                                                                                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type            \
                 " {" sums "}, {" operands "}, " b_at ", p, 1, 1, 0;\n}"                                                                      \
                 : __VA_ARGS__                                                                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)))

/// d [64, N] = (add ? d : 0) + a [64, 16] b [N, 16]ᵀ of fp16 or bf16; a in registers, b by rows_descriptor or plain_descriptor.
template <int N> __device__ inline void wgmma_64(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add, bool fp16) {
    static_assert(N == 16 || N == 32 || N == 64);
    if constexpr (N == 16) {
        if (fp16) MOE_WGMMA(16, "f16", MOE_R8, "%8, %9, %10, %11", "%12", "%13", MOE_D8(d, 0));
        else MOE_WGMMA(16, "bf16", MOE_R8, "%8, %9, %10, %11", "%12", "%13", MOE_D8(d, 0));
    } else if constexpr (N == 32) {
        if (fp16) MOE_WGMMA(32, "f16", MOE_R16, "%16, %17, %18, %19", "%20", "%21", MOE_D8(d, 0), MOE_D8(d, 8));
        else MOE_WGMMA(32, "bf16", MOE_R16, "%16, %17, %18, %19", "%20", "%21", MOE_D8(d, 0), MOE_D8(d, 8));
    } else {
        if (fp16) MOE_WGMMA(64, "f16", MOE_R32, "%32, %33, %34, %35", "%36", "%37", MOE_D32(d, 0));
        else MOE_WGMMA(64, "bf16", MOE_R32, "%32, %33, %34, %35", "%36", "%37", MOE_D32(d, 0));
    }
}
#undef MOE_WGMMA
#undef MOE_R8
#undef MOE_R16
#undef MOE_R32
/// d [64, 64] += a [64, 16] b [64, 16]ᵀ; both by rows_descriptor.
__device__ inline void wgmma_64x64_shared(float (&d)[32], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, 1, 1, 1, 0, 0;"
        : MOE_D32(d, 0)
        : "l"(a), "l"(b));
}
/// d [64, 256] = (add ? d : 0) + a [64, 16] b [16, 256]; a by rows_descriptor, b by columns_descriptor.
__device__ inline void wgmma_64x256(float (&d)[128], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, "
        "%124, %125, %126, %127}, %128, %129, p, 1, 1, 0, 1;\n}"
        : MOE_D32(d, 0), MOE_D32(d, 32), MOE_D32(d, 64), MOE_D32(d, 96)
        : "l"(a), "l"(b), "r"(int(add)));
}

#undef MOE_D8
#undef MOE_D32
/// Registers of a thread from here on; it started with kBefore. What some warpgroups give others take, all of a block's together.
template <int kRegisters, int kBefore> __device__ inline void set_registers() {
    if constexpr (kRegisters > kBefore) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
    else if constexpr (kRegisters < kBefore) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace moe::kernels::sm90
