// Every value is read once and kept in registers between the search for the largest and the rounding.
#include "core/kernels/quantize/rows_sm90.cuh"

namespace moe::kernels::sm90 {
namespace {
constexpr int kBlock = kScaleColumns, kPart = kCopyPart;
constexpr int kThreads = 256;

/// The bits of |x|, see scale_of.
__device__ unsigned size_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

template <class T> struct Part {
    float at[kPart];
    __device__ void read(const T* p, bool inside) {
        if (!inside) {
            for (float& x : at) x = 0;
            return;
        }
        constexpr int n = kVector<T>;
#pragma unroll
        for (int i = 0; i < kPart; i += n) {
            const Vector<T, n> v = load<n>(p + i);
#pragma unroll
            for (int j = 0; j < n; ++j) at[i + j] = widen(v.at[j]);
        }
    }
    __device__ unsigned largest() const {
        unsigned bits = 0;
#pragma unroll
        for (float x : at) bits = max(bits, size_bits(x));
        return bits;
    }
    __device__ uint2 rounded(float inverse) const { return to_e4m3(at, inverse); }
};

/// 32 rows and two blocks of columns by 16 threads a row of a block. Scales leave through shared memory, 32 side by side.
template <class T> __global__ void __launch_bounds__(kThreads) rows_kernel(const T* x, int64_t rows, int64_t columns, uint2* q, float* scales, int64_t scale_pitch, const int* used) {
    constexpr int kRows = 32, kRowsAtOnce = kThreads / 32;
    __shared__ float scale_of_row[2][kRows];
    const int64_t first = int64_t(blockIdx.x) * kRows;
    if (used) rows = min(rows, int64_t(*used));
    if (first >= rows) return;
    const int half = threadIdx.x / 16 % 2, warp = threadIdx.x / 32;
    const int64_t column = (int64_t(blockIdx.y) * 2 + half) * kBlock + threadIdx.x % 16 * kPart;
    Part<T> part[kRows / kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
        const int64_t row = first + i * kRowsAtOnce + warp;
        part[i].read(x + row * columns + column, row < rows && column < columns);
    }
#pragma unroll
    for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
        const int64_t row = first + i * kRowsAtOnce + warp;
        unsigned bits = part[i].largest();
        for (int lane = 8; lane; lane /= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, lane));
        const RowScale s = scale_of(bits);
        if (threadIdx.x % 16 == 0) scale_of_row[half][i * kRowsAtOnce + warp] = s.scale;
        if (row < rows && column < columns) q[(row * columns + column) / kPart] = part[i].rounded(s.inverse);
    }
    __syncthreads();
    if (threadIdx.x < 2 * kRows) {
        const int64_t block = int64_t(blockIdx.y) * 2 + threadIdx.x / kRows, row = first + threadIdx.x % kRows;
        if (block * kBlock < columns && row < rows) scales[block * scale_pitch + row] = scale_of_row[threadIdx.x / kRows][threadIdx.x % kRows];
    }
}

/// A tile of 128 x 128. A thread holds 8 x 8 of it, which it transposes by itself; the tile's transpose goes through shared memory in pieces of 8 bytes, the piece's
/// place in its row being exchanged by the row's number so that 16 threads writing a column of pieces meet all banks.
template <class T> __global__ void __launch_bounds__(kThreads) weight_kernel(const T* w, int64_t out, int64_t in, uint2* q, uint4* transposed, float* scales) {
    __shared__ uint2 tile[kBlock][16];
    __shared__ unsigned largest[kThreads / 32];
    const int64_t o0 = int64_t(blockIdx.y) * kBlock, i0 = int64_t(blockIdx.x) * kBlock, expert = int64_t(blockIdx.z) * out * in;
    const int over = threadIdx.x % 16, down = threadIdx.x / 16;
    const int64_t column = i0 + over * kPart, row = o0 + down * kPart;
    Part<T> part[kPart];
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < kPart; ++i) part[i].read(w + expert + (row + i) * in + column, row + i < out && column < in);
#pragma unroll
    for (int i = 0; i < kPart; ++i) bits = max(bits, part[i].largest());
    bits = warp_max(bits);
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = bits;
    __syncthreads();
    for (unsigned other : largest) bits = max(bits, other);
    const RowScale s = scale_of(bits);
    if (threadIdx.x == 0) scales[(int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = s.scale;

    uint2 line[kPart];
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
        line[i] = part[i].rounded(s.inverse);
        if (row + i < out && column < in) q[(expert + (row + i) * in + column) / kPart] = line[i];
    }
#pragma unroll
    for (int j = 0; j < kPart; ++j) {
        auto byte = [&](int i) { return (j < 4 ? line[i].x : line[i].y) >> (j % 4 * 8) & 0xffu; };
        tile[over * kPart + j][down ^ over] = make_uint2(byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24, byte(4) | byte(5) << 8 | byte(6) << 16 | byte(7) << 24);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kBlock * 8 / kThreads; ++i) {
        const int line_of_tile = threadIdx.x / 8 + i * (kThreads / 8), piece = threadIdx.x % 8 * 2, by = line_of_tile / kPart;
        const uint2 a = tile[line_of_tile][piece ^ by], b = tile[line_of_tile][(piece + 1) ^ by];
        const int64_t o = o0 + piece * kPart, in_row = i0 + line_of_tile;
        if (in_row < in && o < out) transposed[(expert + in_row * out + o) / 16] = make_uint4(a.x, a.y, b.x, b.y);
    }
}

template <class F> void by_input(Dtype dtype, F f) {
    if (dtype == Dtype::fp32) f(float{});
    else f(__nv_bfloat16{});
}
unsigned blocks_of(int64_t n, int64_t size) { return unsigned((n + size - 1) / size); }
}  // namespace

cudaError_t quantize_rows(const void* x, Dtype dtype, int64_t rows, int64_t columns, void* q, float* scales, int64_t scale_pitch, const int* used, cudaStream_t stream) {
    if (rows == 0 || columns == 0) return cudaSuccess;
    by_input(dtype, [&](auto element) {
        using T = decltype(element);
        rows_kernel<<<dim3(blocks_of(rows, 32), blocks_of(columns, 2 * kBlock)), kThreads, 0, stream>>>(static_cast<const T*>(x), rows, columns, static_cast<uint2*>(q), scales, scale_pitch, used);
    });
    return cudaGetLastError();
}

cudaError_t quantize_weight(const void* w, Dtype dtype, int64_t experts, int64_t out, int64_t in, void* q, void* transposed, float* scales, cudaStream_t stream) {
    if (experts == 0 || out == 0 || in == 0) return cudaSuccess;
    by_input(dtype, [&](auto element) {
        using T = decltype(element);
        weight_kernel<<<dim3(blocks_of(in, kBlock), blocks_of(out, kBlock), unsigned(experts)), kThreads, 0, stream>>>(static_cast<const T*>(w), out, in, static_cast<uint2*>(q),
                                                                                                                      static_cast<uint4*>(transposed), scales);
    });
    return cudaGetLastError();
}
}  // namespace moe::kernels::sm90
