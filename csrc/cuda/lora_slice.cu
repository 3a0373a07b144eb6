// A rectangle of W in 16 bits (or in float32), for lora_linear a slice at a time: torch multiplies what this unpacks.
//
// The bits are those of nf4_dequantize. It differs in what surrounds them: a rectangle of any tensor of codes, scales
// still double-quantised, so that one launch of a small kernel makes a slice.
#include <bit>

#include "../ceil_div.h"
#include "codes.cuh"
#include "dtype.cuh"
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

// Formula   weight[r, c] = round_to_T(code[q] * absmax) at row n0 + r and column k0 + c of W
// Threads   a lane per 16 bytes of a row, 4 rows each, 8 apart; blocks go along the rows, so that those which run
//           together read codes which lie together
// Assumes   K a multiple of blocksize, k0 and columns multiples of 32: 16 bytes of weights share an absmax
// Bound     writing the weights, which L2 takes where the slice fits; else reading the codes
template <typename T>
__global__ void __launch_bounds__(kThreads)
    lora_slice_kernel(const uint8_t* __restrict__ qweight,   // [N, K/2]
                      const float* __restrict__ absmax,      // [N, K/blocksize] or null, then
                      const uint8_t* __restrict__ absmax_q,  // [N, K/blocksize]
                      const float* __restrict__ nested,      // [ceil(N * K / blocksize / 256) + 1], the offset last
                      T* __restrict__ weight,                // [rows, columns]
                      int64_t count,                         // N * K / blocksize
                      int64_t K, int64_t n0, int64_t rows, int64_t k0, int64_t columns, int log2_blocksize,
                      unsigned tiles_per_row, bool aligned) {
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
    store(weight + row * columns + column, decoded, aligned);
  }
}

template <typename T>
void unpack(const Slice& slice, cudaStream_t stream) {
  const int64_t tiles_per_row = ceil_div(slice.columns, kTileColumns<T>);
  const int64_t tiles = ceil_div(slice.rows, kRowsPerTile) * tiles_per_row;
  lora_slice_kernel<<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(
      slice.W.qweight, slice.W.absmax, slice.W.absmax_q, slice.W.nested, static_cast<T*>(slice.weight),
      slice.N * (slice.K / slice.blocksize), slice.K, slice.n0, slice.rows, slice.k0, slice.columns,
      std::countr_zero(static_cast<uint64_t>(slice.blocksize)), static_cast<unsigned>(tiles_per_row),
      is_aligned(slice.W.qweight) && is_aligned(slice.weight));
}

}  // namespace

Error lora_slice(const Slice& slice, void* stream) {
  if (slice.k0 % kUnit != 0 || slice.columns % kUnit != 0) return "columns off a multiple of 32";
  if (slice.n0 < 0 || slice.rows < 0 || slice.rows > slice.N - slice.n0) return "rows outside W";
  if (slice.k0 < 0 || slice.columns < 0 || slice.columns > slice.K - slice.k0) return "columns outside W";
  if (slice.rows == 0 || slice.columns == 0) return nullptr;  // a grid of zero blocks is an error
  with_dtype(slice.dtype,
             [&]<typename T>(std::type_identity<T>) { unpack<T>(slice, static_cast<cudaStream_t>(stream)); });
  return launched();
}

}  // namespace nf4lora::cuda
