// AdamW over tiles of 128 x 128, whose E4M3 copies are made in passing. A block has a tile: a warp 16 of its rows, a lane 4 columns of them. A copy needs the tile's largest new weight, so the
// new bf16 weights wait in shared memory, each where only its own thread reads it.
#include "core/kernels/adamw/adamw_step_sm90.cuh"
#include "core/kernels/quantize/rows_sm90.cuh"

namespace moe::kernels::sm90 {
namespace {
constexpr int kThreads = 256, kWarps = kThreads / 32, kTile = kScaleColumns, kRows = kTile / kWarps, kColumns = kTile / 32;
constexpr int kRowsAtOnce = 2;                    // whose reads are on their way together
constexpr int kBlocks = 3;                        // of a multiprocessor at least: registers are bounded by it
static_assert(kRows == 16 && kColumns == 4);

/// Byte j of four words, the first lowest.
__device__ inline unsigned bytes_at(int j, unsigned a, unsigned b, unsigned c, unsigned d) {
    const unsigned pick = j | (j + 4) << 4;
    return __byte_perm(__byte_perm(a, b, pick), __byte_perm(c, d, pick), 0x5410);
}
/// The matrix that a tile belongs to.
__device__ inline int matrix_of(const AdamWTileList& list, int64_t tile) {
    int low = 0, high = list.count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (list.at[middle].first <= tile ? low : high) = middle;
    }
    return low;
}

template <class G, class M> __global__ void __launch_bounds__(kThreads, kBlocks) tile_kernel(const __grid_constant__ AdamWTileList list, const __grid_constant__ AdamWFactors<float> f) {
    // New weights by row and thread; then the tile's transpose by pieces of 16 bytes, a line's pieces exchanged by its number so that 8 threads writing a column of pieces meet all banks.
    __shared__ uint4 room[kTile][kTile / 16 * 2];
    __shared__ unsigned largest[kWarps];
    const AdamWTiles& a = list.at[matrix_of(list, blockIdx.x)];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int across = (a.in + kTile - 1) / kTile, down = (a.out + kTile - 1) / kTile, tile = int(blockIdx.x - a.first);
    const int o0 = tile / across % down * kTile, i0 = tile % across * kTile, row = o0 + warp * kRows, column = i0 + lane * kColumns;
    const int64_t expert = int64_t(tile / (across * down)) * a.out * a.in, first = expert + int64_t(row) * a.in + column;
    const bool inside = row < a.out && column < a.in;
    uint2* const held = reinterpret_cast<uint2*>(room) + threadIdx.x;

    unsigned sizes = 0;
    if (inside) {
#pragma unroll kRowsAtOnce
        for (int r = 0; r < kRows; ++r) {
            const int64_t i = first + r * int64_t(a.in);
            auto high = load<kColumns>(static_cast<const unsigned short*>(a.value) + i);
            auto rest = load<kColumns>(static_cast<const short*>(a.rest) + i);
            const auto g = load<kColumns>(static_cast<const G*>(a.grad) + i);
            auto m = load<kColumns>(static_cast<const M*>(a.m) + i);
            auto v = load<kColumns>(static_cast<const M*>(a.v) + i);
#pragma unroll
            for (int k = 0; k < kColumns; ++k) {
                float w = joined_master(high.at[k], rest.at[k]), mean = widen(m.at[k]), square = widen(v.at[k]);
                adamw_step(f, widen(g.at[k]), w, mean, square);
                split_master(w, high.at[k], rest.at[k]);
                m.at[k] = narrow<M>(mean);
                v.at[k] = narrow<M>(square);
            }
            store<kColumns>(static_cast<unsigned short*>(a.value) + i, high);
            store<kColumns>(static_cast<short*>(a.rest) + i, rest);
            store<kColumns>(static_cast<M*>(a.m) + i, m);
            store<kColumns>(static_cast<M*>(a.v) + i, v);
            const uint2 words = reinterpret_cast<const uint2&>(high);
            held[r * kThreads] = words;
            sizes = __vmaxu2(sizes, __vmaxu2(sizes_of(words.x), sizes_of(words.y)));
        }
    }
    unsigned bits = warp_max(larger_of(sizes));
    if (lane == 0) largest[warp] = bits;
    __syncthreads();
    for (unsigned other : largest) bits = max(bits, other);
    const RowScale s = scale_of(bits);
    if (threadIdx.x == 0) a.scales[tile] = s.scale;

    unsigned line[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const uint2 words = held[r * kThreads];
        auto low = [](unsigned two) { return __uint_as_float(two << 16); };
        auto high = [](unsigned two) { return __uint_as_float(two & 0xffff0000u); };
        line[r] = to_e4m3(low(words.x), high(words.x), s.inverse) | to_e4m3(low(words.y), high(words.y), s.inverse) << 16;
        if (inside) static_cast<unsigned*>(a.q)[(first + r * int64_t(a.in)) / kColumns] = line[r];
    }
    __syncthreads();                              // all have read what the transpose is written over
    auto* const turned = reinterpret_cast<uint4(*)[kTile / 16]>(room);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
        auto four = [&](int r) { return bytes_at(j, line[r], line[r + 1], line[r + 2], line[r + 3]); };
        turned[lane * kColumns + j][warp ^ lane % 8] = make_uint4(four(0), four(4), four(8), four(12));
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTile * kTile / 16 / kThreads; ++i) {
        const int in_tile = threadIdx.x / 8 + i * (kThreads / 8), piece = threadIdx.x % 8, in = i0 + in_tile, out = o0 + piece * 16;
        if (in < a.in && out < a.out) static_cast<uint4*>(a.transposed)[(expert + int64_t(in) * a.out + out) / 16] = turned[in_tile][piece ^ in_tile / kColumns % 8];
    }
}
}  // namespace

cudaError_t adamw_tiles(const AdamWTileList& list, const AdamWRule& rule, Dtype grad, Dtype moments, cudaStream_t stream) {
    if (list.tiles == 0) return cudaSuccess;
    const AdamWFactors<float> f(rule);
    auto launch = [&](auto g, auto m) { tile_kernel<decltype(g), decltype(m)><<<unsigned(list.tiles), kThreads, 0, stream>>>(list, f); };
    auto by_moments = [&](auto g) { moments == Dtype::bf16 ? launch(g, __nv_bfloat16{}) : launch(g, float{}); };
    grad == Dtype::bf16 ? by_moments(__nv_bfloat16{}) : by_moments(float{});
    return cudaGetLastError();
}
}  // namespace moe::kernels::sm90
