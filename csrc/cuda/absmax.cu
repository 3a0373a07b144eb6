// absmax_quantize and absmax_dequantize on CUDA: the double quantisation.
//
// Quantising happens once, while a model loads, on 1/64 of its numbers: its kernels are written to keep the order of
// summation, not to be fast. Dequantising is part of every use of a weight and moves 5 bytes per 64 weights.
#include "../ceil_div.h"
#include "codes.cuh"
#include "launch.h"
#include "scales.cuh"
#include "vector.cuh"
#include "warp.cuh"

namespace nf4lora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// ---- absmax_quantize

// The sum of values in index order, in float64: the same in every lane, and the same bits on every device.
template <typename T>
__device__ double ordered_sum(const T* __restrict__ values, int64_t count) {
  double sum = 0.0;
  for (int64_t first = 0; first < count; first += kWarp) {
    const int64_t at = first + threadIdx.x % kWarp;
    const double mine = at < count ? static_cast<double>(values[at]) : 0.0;
    for (int lane = 0; lane < kWarp; ++lane) sum = __dadd_rn(sum, __shfl_sync(kAllLanes, mine, lane));
  }
  return sum;
}

// Formula   block_sums[b] = sum of absmax[256 b .. 256 b + 255], in index order
// Threads   one warp per block; its lanes load together and add the same sum
// Bound     256 dependent additions
__global__ void __launch_bounds__(kThreads)
    absmax_block_sums_kernel(const float* __restrict__ absmax,  // [count]
                             double* __restrict__ block_sums,   // [ceil(count / 256)]
                             int64_t count) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t first = block * kNestedBlocksize;
  if (first >= count) return;
  const int64_t size = min(count - first, static_cast<int64_t>(kNestedBlocksize));
  const double sum = ordered_sum(absmax + first, size);
  if (threadIdx.x % kWarp == 0) block_sums[block] = sum;
}

// Formula   offset = round_to_float32(sum of block_sums in index order / count)
// Threads   a single warp, for the order
// Bound     one dependent addition per 16384 weights: 0.1 ms for the largest layers of an 8B model
__global__ void __launch_bounds__(kWarp) absmax_offset_kernel(const double* __restrict__ block_sums,  // [blocks]
                                                              float* __restrict__ offset,             // [1]
                                                              int64_t blocks, int64_t count) {
  const double sum = ordered_sum(block_sums, blocks);
  if (threadIdx.x == 0) *offset = __double2float_rn(__ddiv_rn(sum, static_cast<double>(count)));
}

// Formula   nested = max |absmax - offset|;  q = nearest((absmax - offset) / nested), kNestedZero where nested is 0
// Threads   one warp per block of 256, eight values a lane
// Bound     latency
__global__ void __launch_bounds__(kThreads) absmax_encode_kernel(const float* __restrict__ absmax,  // [count]
                                                                 uint8_t* __restrict__ absmax_q,    // [count]
                                                                 float* __restrict__ nested,        // [blocks]
                                                                 const float* __restrict__ offset,  // [1]
                                                                 int64_t count) {
  __shared__ float map[256];
  map[threadIdx.x] = kDeviceMap.value[threadIdx.x];
  __syncthreads();

  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t first = block * kNestedBlocksize + threadIdx.x % kWarp;
  if (block * kNestedBlocksize >= count) return;
  constexpr int kPerLane = kNestedBlocksize / kWarp;
  float centred[kPerLane];
  float peak = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t at = first + i * kWarp;
    centred[i] = at < count ? __fsub_rn(absmax[at], *offset) : 0.0f;
    peak = fmaxf(peak, fabsf(centred[i]));
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, distance));
  }
  if (threadIdx.x % kWarp == 0) nested[block] = peak;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t at = first + i * kWarp;
    if (at >= count) break;
    const float x = __fdiv_rn(centred[i], peak);
    // Binary search over the midpoints of the map; a tie stays on the lower index.
    int index = 0;
    for (int step = 128; step > 0; step /= 2) {
      const float midpoint = __fmul_rn(__fadd_rn(map[index + step - 1], map[index + step]), 0.5f);
      if (x > midpoint) index += step;
    }
    absmax_q[at] = static_cast<uint8_t>(peak > 0.0f ? index : kNestedZero);
  }
}

// ---- absmax_dequantize

constexpr int kDecodedPerThread = 4;  // one 16-byte store

// Formula   absmax = RN(RN(map[q] * nested) + offset): two roundings, never a fused multiply-add
// Threads   four neighbours each; 256 is a multiple of four, so they share their nested absmax
// Bound     writing absmax
__global__ void __launch_bounds__(kThreads)
    absmax_dequantize_kernel(const uint8_t* __restrict__ absmax_q,  // [count]
                             const float* __restrict__ nested,      // [blocks + 1], the offset last
                             float* __restrict__ absmax,            // [count]
                             int64_t count, bool aligned) {
  __shared__ float map[256];
  map[threadIdx.x] = kDeviceMap.value[threadIdx.x];
  __syncthreads();

  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kDecodedPerThread;
  if (first >= count) return;
  const float scale = nested[first / kNestedBlocksize];
  const float offset = nested[ceil_div(count, kNestedBlocksize)];
  if (first + kDecodedPerThread <= count) {
    const auto codes = load<kDecodedPerThread>(absmax_q + first, aligned);
    Vector<float, kDecodedPerThread> decoded;
#pragma unroll
    for (int i = 0; i < kDecodedPerThread; ++i) {
      decoded.value[i] = decode_absmax(map, codes.value[i], scale, offset);
    }
    store(absmax + first, decoded, aligned);
    return;
  }
  for (int64_t at = first; at < count; ++at) absmax[at] = decode_absmax(map, absmax_q[at], scale, offset);
}

unsigned blocks_of(int64_t count, int64_t per_block) { return static_cast<unsigned>(ceil_div(count, per_block)); }

}  // namespace

Error absmax_quantize(const float* absmax, uint8_t* absmax_q, float* nested, double* block_sums, int64_t count,
                      void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (count == 0) {
    cudaMemsetAsync(nested, 0, sizeof(float), cuda_stream);  // no absmax: an offset of zero
    return launched();
  }
  const int64_t blocks = blocks_of(count, kNestedBlocksize);
  float* offset = nested + blocks;
  const unsigned grid = blocks_of(blocks, kWarps);
  absmax_block_sums_kernel<<<grid, kThreads, 0, cuda_stream>>>(absmax, block_sums, count);
  absmax_offset_kernel<<<1, kWarp, 0, cuda_stream>>>(block_sums, offset, blocks, count);
  absmax_encode_kernel<<<grid, kThreads, 0, cuda_stream>>>(absmax, absmax_q, nested, offset, count);
  return launched();
}

Error absmax_dequantize(const uint8_t* absmax_q, const float* nested, float* absmax, int64_t count, void* stream) {
  if (count == 0) return nullptr;
  const unsigned grid = blocks_of(count, kThreads * kDecodedPerThread);
  absmax_dequantize_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      absmax_q, nested, absmax, count, is_aligned(absmax_q) && is_aligned(absmax));
  return launched();
}

}  // namespace nf4lora::cuda
