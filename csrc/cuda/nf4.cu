// nf4_quantize and nf4_dequantize on CUDA.
//
// Both are bound by memory: 16 bytes of weights a thread at a time, neighbouring threads at neighbouring addresses.
// The arithmetic is IEEE and spelled out (__fmul_rn, __frcp_rn), so that the bits are those of the CPU whatever the
// compiler's flags.
#include <bit>

#include "../ceil_div.h"
#include "codes.cuh"
#include "dtype.cuh"
#include "launch.h"
#include "vector.cuh"
#include "warp.cuh"

namespace nf4lora::cuda {
namespace {

__device__ constexpr Code kDeviceTree = kThresholdTree;

// ---- nf4_quantize

constexpr int kEncodedPerThread = 8;  // a 16-byte load of 16-bit weights, a 4-byte store of codes
constexpr int kEncodedPerWarp = kEncodedPerThread * kWarp;
constexpr int kEncodeThreads = kMaxBlocksize / kEncodedPerThread;  // one round holds the largest block
constexpr unsigned kInfinity = 0x7F800000u;

// Nearest code of x in [-1, 1], the lower one of two that are equally near: four steps down the tree of thresholds.
// Sixteen floats in shared memory lie in sixteen banks, so lanes never collide.
__device__ __forceinline__ unsigned nearest_code(float x, const float* tree) {
  unsigned node = 1;
#pragma unroll
  for (int step = 0; step < 4; ++step) node = 2 * node + (x > tree[node] ? 1 : 0);
  return node - 16;
}

// Formula   absmax = max |w|;  code = nearest(w * (1 / max(absmax, kMinAbsmax)))
// Threads   8 weights each; blocksize / 8 neighbours share a block: part of a warp, or up to 16 warps
// Assumes   count a multiple of blocksize, blocksize a power of two between 32 and 4096
// Bound     reading the weights
template <typename T>
__global__ void __launch_bounds__(kEncodeThreads)
    nf4_quantize_kernel(const T* __restrict__ weight,   // [count]
                        uint8_t* __restrict__ qweight,  // [count / 2]
                        float* __restrict__ absmax,     // [count / blocksize]
                        unsigned long long* first_bad,  // [1]
                        int64_t count, int log2_blocksize, bool aligned) {
  __shared__ float tree[16];
  __shared__ unsigned warp_peak[kEncodeThreads / kWarp];
  if (threadIdx.x < 16) tree[threadIdx.x] = kDeviceTree.value[threadIdx.x];

  constexpr int kPerLoad = 16 / sizeof(T);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kEncodeThreads + threadIdx.x) * kEncodedPerThread;
  float w[kEncodedPerThread] = {};
  if (first < count) {
#pragma unroll
    for (int i = 0; i < kEncodedPerThread; i += kPerLoad) {
      const auto loaded = load<kPerLoad>(weight + first + i, aligned);
#pragma unroll
      for (int j = 0; j < kPerLoad; ++j) w[i + j] = to_float(loaded.value[j]);
    }
  }

  // The bits of |w| as an integer order like |w|, with NaN above Inf above all: one maximum finds both the peak and
  // what is not finite, where fmaxf would drop a NaN.
  unsigned peak = 0;
#pragma unroll
  for (int i = 0; i < kEncodedPerThread; ++i) peak = max(peak, __float_as_uint(w[i]) & 0x7FFFFFFFu);
  const int blocksize = 1 << log2_blocksize;
  const int lanes = min(blocksize / kEncodedPerThread, kWarp);  // of this warp that share the block
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    peak = max(peak, __shfl_xor_sync(kAllLanes, peak, distance));
  }
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) warp_peak[warp] = peak;
  __syncthreads();
  if (first >= count) return;
  if (blocksize > kEncodedPerWarp) {
    const int warps = blocksize / kEncodedPerWarp;
#pragma unroll 1  // a few cheap steps, which the compiler would unroll into most of the kernel
    for (int i = 0; i < warps; ++i) peak = max(peak, warp_peak[(warp & -warps) + i]);
  }

  if ((first & (blocksize - 1)) == 0) {
    absmax[first >> log2_blocksize] = __uint_as_float(peak);
    if (peak >= kInfinity) atomicMin(first_bad, static_cast<unsigned long long>(first >> log2_blocksize));
  }
  const float inverse = __frcp_rn(fmaxf(__uint_as_float(peak), kMinAbsmax));
  Vector<uint8_t, kEncodedPerThread / 2> packed;
#pragma unroll
  for (int i = 0; i < kEncodedPerThread; i += 2) {
    packed.value[i / 2] =
        pack(nearest_code(__fmul_rn(w[i], inverse), tree), nearest_code(__fmul_rn(w[i + 1], inverse), tree));
  }
  store(qweight + first / 2, packed, aligned);
}

template <typename T>
void quantize(const void* weight, uint8_t* qweight, float* absmax, uint64_t* first_bad, int64_t count,
              int64_t blocksize, cudaStream_t stream) {
  constexpr int64_t kPerBlock = kEncodeThreads * kEncodedPerThread;
  const unsigned grid = static_cast<unsigned>(ceil_div(count, kPerBlock));
  nf4_quantize_kernel<<<grid, kEncodeThreads, 0, stream>>>(
      static_cast<const T*>(weight), qweight, absmax, reinterpret_cast<unsigned long long*>(first_bad), count,
      std::countr_zero(static_cast<uint64_t>(blocksize)), is_aligned(weight) && is_aligned(qweight));
}

// ---- nf4_dequantize

constexpr int kDecodeThreads = 256;
constexpr int kDecodeLoads = 4;  // in flight per thread, to cover the latency of memory

// Formula   w = round_to_T(code[q] * absmax)
// Threads   4 x 16 bytes of weights each, a whole thread block apart, so that the stores of a warp are contiguous
// Assumes   count a multiple of blocksize, blocksize a power of two, at least 32: 16 bytes of weights share an absmax
// Bound     writing the weights
template <typename T>
__global__ void __launch_bounds__(kDecodeThreads)
    nf4_dequantize_kernel(const uint8_t* __restrict__ qweight,  // [count / 2]
                          const float* __restrict__ absmax,     // [count / blocksize]
                          T* __restrict__ weight,               // [count]
                          int64_t count, int log2_blocksize, bool aligned) {
  __shared__ float code[16];  // sixteen banks: lanes never collide
  if (threadIdx.x < 16) code[threadIdx.x] = kDeviceCode.value[threadIdx.x];
  __syncthreads();

  constexpr int kPerStore = 16 / sizeof(T);
  constexpr int64_t kStride = kDecodeThreads * kPerStore;
  const int64_t first = blockIdx.x * kStride * kDecodeLoads + threadIdx.x * kPerStore;
  Vector<uint8_t, kPerStore / 2> packed[kDecodeLoads];
  float scale[kDecodeLoads];
#pragma unroll
  for (int i = 0; i < kDecodeLoads; ++i) {
    const int64_t at = first + i * kStride;
    if (at >= count) break;
    packed[i] = load<kPerStore / 2>(qweight + at / 2, aligned);
    scale[i] = absmax[at >> log2_blocksize];
  }
#pragma unroll
  for (int i = 0; i < kDecodeLoads; ++i) {
    const int64_t at = first + i * kStride;
    if (at >= count) break;
    Vector<T, kPerStore> decoded;
#pragma unroll
    for (int j = 0; j < kPerStore; j += 2) {
      const uint8_t pair = packed[i].value[j / 2];
      round_pair(__fmul_rn(code[first_code(pair)], scale[i]), __fmul_rn(code[second_code(pair)], scale[i]),
                 &decoded.value[j]);
    }
    store(weight + at, decoded, aligned);
  }
}

template <typename T>
void dequantize(const uint8_t* qweight, const float* absmax, void* weight, int64_t count, int64_t blocksize,
                cudaStream_t stream) {
  constexpr int64_t kPerBlock = kDecodeThreads * kDecodeLoads * (16 / sizeof(T));
  const unsigned grid = static_cast<unsigned>(ceil_div(count, kPerBlock));
  nf4_dequantize_kernel<<<grid, kDecodeThreads, 0, stream>>>(qweight, absmax, static_cast<T*>(weight), count,
                                                             std::countr_zero(static_cast<uint64_t>(blocksize)),
                                                             is_aligned(qweight) && is_aligned(weight));
}

}  // namespace

Error nf4_quantize(const void* weight, Dtype dtype, uint8_t* qweight, float* absmax, uint64_t* first_bad, int64_t count,
                   int64_t blocksize, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaMemsetAsync(first_bad, 0xFF, sizeof(kNoBlock), cuda_stream);  // kNoBlock
  if (count == 0) return launched();                                // a grid of zero blocks is an error
  with_dtype(dtype, [&]<typename T>(std::type_identity<T>) {
    quantize<T>(weight, qweight, absmax, first_bad, count, blocksize, cuda_stream);
  });
  return launched();
}

Error nf4_dequantize(const uint8_t* qweight, const float* absmax, void* weight, Dtype dtype, int64_t count,
                     int64_t blocksize, void* stream) {
  if (count == 0) return nullptr;
  with_dtype(dtype, [&]<typename T>(std::type_identity<T>) {
    dequantize<T>(qweight, absmax, weight, count, blocksize, static_cast<cudaStream_t>(stream));
  });
  return launched();
}

}  // namespace nf4lora::cuda
