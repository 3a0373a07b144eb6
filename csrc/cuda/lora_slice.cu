// A rectangle of W in 16 bits (or in float32), for lora_linear a slice at a time: torch multiplies what this unpacks.
//
// The bits are those of nf4_dequantize. It differs in what surrounds them: a rectangle of any tensor of codes, scales
// still double-quantised, rows as far apart as the caller likes, so that one launch of a small kernel makes a slice. The
// same launch may put a factor of LoRA beside the slice or below it: where the rows of x go on with those of S, one
// product [x | S] [W | s B]^T holds the low-rank term too, and backwards [dy | T] [W over s A] does.
#include <bit>

#include "../ceil_div.h"
#include "codes.cuh"
#include "dtype.cuh"
#include "factor.cuh"
#include "launch.h"
#include "scales.cuh"
#include "vector.cuh"
#include "warp.cuh"

namespace nf4lora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLoads = 4;                      // in flight per thread, to cover the latency of memory
constexpr int kRowsPerTile = kWarps * kLoads;  // a tile is as wide as a warp stores at once
constexpr int64_t kUnit = kMinBlocksize;       // of columns: 16 bytes of codes, one absmax

template <typename T>
constexpr int kPerStore = 16 / sizeof(T);
template <typename T>
constexpr int kTileColumns = kPerStore<T> * kWarp;

// The factor of LoRA that surrounds a slice.
struct Surrounding {
  const void* factor;  // lora_B [N, R], or below lora_A [R, K]
  Dtype dtype;
  bool is_below, aligned;
  float scaling;
  int64_t R;
  int64_t first, all;  // beside: its first rank of all

  int64_t padded() const { return factor ? padded_rank(all) : 0; }
};

// 16 bytes of round_to_T(round_to_T(factor) * scaling), from value `at` of the factor on; zeros before `begin` and from
// `end` on.
template <typename T>
__device__ __forceinline__ Vector<T, kPerStore<T>> scaled(const Surrounding& s, int64_t at, int64_t begin,
                                                          int64_t end) {
  Vector<T, kPerStore<T>> values;
  const bool all = begin <= 0 && end >= kPerStore<T>;
  with_dtype(s.dtype, [&]<typename F>(std::type_identity<F>) {
    const F* const from = static_cast<const F*>(s.factor) + at;
    constexpr int kAtOnce = 4;  // so that no load is wider than 16 bytes
#pragma unroll
    for (int i = 0; i < kPerStore<T>; i += kAtOnce) {
      Vector<F, kAtOnce> part{};
      if (all && s.aligned) {
        part = load<kAtOnce>(from + i, true);
      } else {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          if (begin <= i + j && i + j < end) part.value[j] = from[i + j];
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; j += 2) {
        round_pair(__fmul_rn(rounded<T>(to_float(part.value[j])), s.scaling),
                   __fmul_rn(rounded<T>(to_float(part.value[j + 1])), s.scaling), &values.value[i + j]);
      }
    }
  });
  return values;
}

// Formula   weight[r, c] = round_to_T(code[q] * absmax) at row n0 + r and column k0 + c of W; P columns more hold
//           round_to_T(scaling * lora_B[n0 + r, j]), or P rows more that of lora_A[j, k0 + c], zero from R on
// Threads   a lane per 16 bytes of a row, 4 rows each, 8 apart; blocks go along the rows, so that those which run
//           together read codes which lie together; after them blocks with a thread per 16 bytes of the factor
// Assumes   K a multiple of blocksize, k0 and columns multiples of 32: 16 bytes of weights share an absmax
// Bound     writing the weights, which L2 takes where the slice fits; else reading the codes
template <typename T>
__global__ void __launch_bounds__(kThreads)
    lora_slice_kernel(const uint8_t* __restrict__ qweight,   // [N, K/2]
                      const float* __restrict__ absmax,      // [N, K/blocksize] or null, then
                      const uint8_t* __restrict__ absmax_q,  // [N, K/blocksize]
                      const float* __restrict__ nested,      // [ceil(N * K / blocksize / 256) + 1], the offset last
                      T* __restrict__ weight,                // [rows, columns], and what surrounds them
                      int64_t count,                         // N * K / blocksize
                      int64_t K, int64_t n0, int64_t rows, int64_t k0, int64_t columns, int64_t stride,
                      int log2_blocksize, unsigned tiles_per_row, unsigned tiles, bool aligned,
                      const __grid_constant__ Surrounding around, int64_t chunks_per_row, int64_t chunks) {
  if (blockIdx.x >= tiles) {
    const int64_t chunk = static_cast<int64_t>(blockIdx.x - tiles) * kThreads + threadIdx.x;
    if (chunk >= chunks) return;
    const int64_t row = chunk / chunks_per_row, first = chunk % chunks_per_row * kPerStore<T>;
    const int64_t begin = around.first - first;  // below there is only one factor, and it is 0 at most
    const int64_t end = around.is_below ? (row < around.R ? columns - first : 0) : begin + around.R;
    const int64_t at = around.is_below ? row * K + k0 + first : (n0 + row) * around.R - begin;
    T* const to = weight + (around.is_below ? (rows + row) * stride : row * stride + columns) + first;
    store(to, scaled<T>(around, at, begin, end), aligned);
    return;
  }
  __shared__ float code[16];  // sixteen banks: lanes never collide
  __shared__ float map[256];
  if (threadIdx.x < 16) code[threadIdx.x] = kDeviceCode.value[threadIdx.x];
  if (!absmax) map[threadIdx.x] = kDeviceMap.value[threadIdx.x];
  __syncthreads();

  const unsigned tile_row = blockIdx.x / tiles_per_row, tile_column = blockIdx.x % tiles_per_row;
  const int64_t column = static_cast<int64_t>(tile_column) * kTileColumns<T> + threadIdx.x % kWarp * kPerStore<T>;
  const int64_t first_row = static_cast<int64_t>(tile_row) * kRowsPerTile + threadIdx.x / kWarp;
  if (column >= columns) return;
  Vector<uint8_t, kPerStore<T> / 2> packed[kLoads];
  float scale[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t row = first_row + i * kWarps;
    if (row >= rows) break;
    const int64_t at = (n0 + row) * K + k0 + column;
    packed[i] = load<kPerStore<T> / 2>(qweight + at / 2, aligned);
    // Made anew for each row: an offset that is kept for all of them takes four registers more.
    scale[i] = Scales({qweight, absmax, absmax_q, nested}, count, map).scale_of(at >> log2_blocksize);
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t row = first_row + i * kWarps;
    if (row >= rows) break;
    Vector<T, kPerStore<T>> decoded;
#pragma unroll
    for (int j = 0; j < kPerStore<T>; j += 2) {
      const uint8_t pair = packed[i].value[j / 2];
      round_pair(__fmul_rn(code[first_code(pair)], scale[i]), __fmul_rn(code[second_code(pair)], scale[i]),
                 &decoded.value[j]);
    }
    store(weight + row * stride + column, decoded, aligned);
  }
}

int64_t ranks_of(const Slice& slice) { return slice.all_ranks ? slice.all_ranks : slice.R; }

int64_t stride_of(const Slice& slice) {
  if (slice.stride) return slice.stride;
  return slice.columns + (slice.factor && !slice.factor_is_below ? padded_rank(ranks_of(slice)) : 0);
}

template <typename T>
void unpack(const Slice& slice, cudaStream_t stream) {
  constexpr int kPer = kPerStore<T>;
  const int64_t tiles_per_row = ceil_div(slice.columns, kTileColumns<T>);
  const int64_t tiles = ceil_div(slice.rows, kRowsPerTile) * tiles_per_row, stride = stride_of(slice);
  Surrounding around{slice.factor, slice.dtype_of_factor, slice.factor_is_below, false, slice.scaling,
                     slice.R,      slice.first_rank,      ranks_of(slice)};
  around.aligned =
      is_aligned(slice.factor) && (around.is_below || (slice.R % kPer == 0 && slice.first_rank % kPer == 0));
  const int64_t chunks_per_row = (around.is_below ? slice.columns : around.padded()) / kPer;
  const int64_t chunks = (around.is_below ? around.padded() : slice.rows) * chunks_per_row;
  const int64_t blocks = tiles + ceil_div(chunks, kThreads);
  if (blocks == 0) return;  // a grid of zero blocks is an error
  lora_slice_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      slice.W.qweight, slice.W.absmax, slice.W.absmax_q, slice.W.nested, static_cast<T*>(slice.weight),
      slice.N * (slice.K / slice.blocksize), slice.K, slice.n0, slice.rows, slice.k0, slice.columns, stride,
      std::countr_zero(static_cast<uint64_t>(slice.blocksize)), static_cast<unsigned>(tiles_per_row),
      static_cast<unsigned>(tiles), is_aligned(slice.W.qweight) && is_aligned(slice.weight) && stride % kPer == 0,
      around, chunks_per_row, chunks);
}

}  // namespace

Error lora_slice(const Slice& slice, void* stream) {
  if (slice.k0 % kUnit != 0 || slice.columns % kUnit != 0) return "columns off a multiple of 32";
  if (slice.n0 < 0 || slice.rows < 0 || slice.rows > slice.N - slice.n0) return "rows outside W";
  if (slice.k0 < 0 || slice.columns < 0 || slice.columns > slice.K - slice.k0) return "columns outside W";
  if (slice.factor && slice.R < 0) return "a negative rank";
  const bool beside = slice.factor && !slice.factor_is_below;
  if (slice.first_rank < 0 || slice.first_rank + slice.R > ranks_of(slice)) return "ranks outside all ranks";
  if (slice.factor_is_below && ranks_of(slice) != slice.R) return "some of the ranks, below W";
  if (stride_of(slice) < slice.columns + (beside ? padded_rank(ranks_of(slice)) : 0)) return "rows that overlap";
  with_dtype(slice.dtype,
             [&]<typename T>(std::type_identity<T>) { unpack<T>(slice, static_cast<cudaStream_t>(stream)); });
  return launched();
}

}  // namespace nf4lora::cuda
