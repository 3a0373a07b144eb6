// lora_linear for a few rows of x, a generated token's above all: the packed weight is streamed once.
//
// Two kernels: S = dropout(x) A^T, then y. Both sum in a fixed order and keep no state, so that they repeat bit for bit
// and may be captured in a CUDA graph. From Hopper on the second starts beside the first and waits for it where it needs
// S, at its end: its launch, its tables and its stream of codes hide S. (One kernel for both would have to count the
// blocks that are done with S in memory that outlives a launch, which two replays of a graph could meet in.)
#include <algorithm>
#include <bit>

#include "../ceil_div.h"
#include "card.h"
#include "codes.cuh"
#include "dtype.cuh"
#include "factor.cuh"
#include "launch.h"
#include "matrix.cuh"
#include "per_device.h"
#include "philox.cuh"
#include "scales.cuh"
#include "vector.cuh"
#include "warp.cuh"

namespace nf4lora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Eight neighbours of a factor of LoRA, rounded to T.
template <typename T>
__device__ __forceinline__ void load_factors(const void* factor, Dtype dtype, int64_t at, bool aligned,
                                             float (&out)[8]) {
  with_dtype(dtype, [&]<typename F>(std::type_identity<F>) {
    constexpr int kPerLoad = 16 / sizeof(F);
#pragma unroll
    for (int i = 0; i < 8; i += kPerLoad) {
      const auto loaded = load<kPerLoad>(static_cast<const F*>(factor) + at + i, aligned);
#pragma unroll
      for (int j = 0; j < kPerLoad && i + j < 8; ++j) out[i + j] = rounded<T>(to_float(loaded.value[j]));
    }
  });
}

// Lets the kernel after this one start, where it was launched to start early.
__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits for the end of the kernel before this one, and for what it wrote.
__device__ __forceinline__ void wait_for_last_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// A value of what it wrote, from the second cache level. A plain load of a `const __restrict__` pointer becomes
// ld.global.nc, which is for memory that nobody writes from this kernel's start to its end.
template <typename T>
__device__ __forceinline__ T load_from_last_kernel(const T* from) {
  uint16_t bits;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(from) : "memory");
  return reinterpret_cast<const T&>(bits);
}

// ---- S

constexpr int kRowsOfX = 4;  // that share a pass over a row of A

// Formula   S[m, r] = round_to_T(inverse_keep * sum over k of mask(x)[m, k] A[r, k])
// Threads   a block for one r and four m; each thread every 256th group of eight k
// Assumes   K a multiple of 32, x aligned to 16 bytes
// Bound     latency: A is a few hundred KB
template <typename T>
__global__ void __launch_bounds__(kThreads)
    low_rank_kernel(const T* __restrict__ x,            // [M, K]
                    const void* __restrict__ A,         // [R, K]
                    T* __restrict__ S,                  // [M, R]
                    const uint64_t* __restrict__ seed,  // [1], null without dropout
                    int64_t M, int64_t K, int64_t R, Dtype dtype_of_A, uint32_t threshold, float inverse_keep,
                    bool aligned_A) {
  __shared__ float sums_of[kWarps][kRowsOfX];
  allow_next_kernel();
  const int64_t r = blockIdx.x, first = static_cast<int64_t>(blockIdx.y) * kRowsOfX;
  float sums[kRowsOfX] = {};
  for (int64_t k = threadIdx.x * 8; k < K; k += kThreads * 8) {
    float a[8];
    load_factors<T>(A, dtype_of_A, r * K + k, aligned_A, a);
#pragma unroll
    for (int m = 0; m < kRowsOfX; ++m) {
      if (first + m >= M) break;
      const int64_t at = (first + m) * K + k;
      const auto values = load<8>(x + at, true);
      float keep[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) keep[i] = to_float(values.value[i]);
      if (seed) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          const Words words = philox(*seed, static_cast<uint64_t>(at + i) / 4);
#pragma unroll
          for (int j = 0; j < 4; ++j) keep[i + j] = words.value[j] >= threshold ? keep[i + j] : 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[m] = fmaf(keep[i], a[i], sums[m]);
    }
  }
#pragma unroll
  for (int m = 0; m < kRowsOfX; ++m) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      sums[m] += __shfl_xor_sync(kAllLanes, sums[m], distance);
    }
    if (threadIdx.x % kWarp == 0) sums_of[threadIdx.x / kWarp][m] = sums[m];
  }
  __syncthreads();
  if (threadIdx.x >= kRowsOfX || first + threadIdx.x >= M) return;
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += sums_of[warp][threadIdx.x];
  S[(first + threadIdx.x) * R + r] = narrow<T>(total * inverse_keep);
}

// ---- y

constexpr int kRowsOfW = 16;  // of a matrix instruction
constexpr int kTile = 128;    // columns that a warp takes at a time: 32 for each lane of a quad, 16 bytes
constexpr int kLoads = 2;     // tiles whose bytes are in flight in each thread
constexpr int kPadded = 20;   // floats from one token's 16 sums to the next: no two lanes of a warp meet in a bank

__device__ __forceinline__ uint4 load_streamed(const uint8_t* from) {
  uint4 bytes;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(bytes.x), "=r"(bytes.y), "=r"(bytes.z), "=r"(bytes.w)
      : "l"(from));
  return bytes;
}

// Formula   y[m, n] = round_to_T(sum over k of x[m, k] W[n, k] + scaling * sum over r of S[m, r] B[n, r] + bias[n])
// Threads   a block for 16 n at a time and all m; its warps share the columns. A lane decodes 32 neighbours in either of
//           two rows of W, looking codes up two at a time in a table of which each lane of a half warp has its own copy,
//           so that no two lanes meet in a bank; the order of k in a matrix instruction is free, so nothing is moved.
// Assumes   M at most 8 * kTokenTiles; K and blocksize multiples of 32; x, qweight aligned to 16 bytes
// Bound     reading the codes; the look-ups take 32 weights a clock of each multiprocessor
template <typename T, int kTokenTiles>
__global__ void __launch_bounds__(kThreads)
    lora_few_kernel(const T* __restrict__ x,               // [M, K]
                    const uint8_t* __restrict__ qweight,   // [N, K / 2]
                    const float* __restrict__ absmax,      // [N, K / blocksize], null with double quantisation
                    const uint8_t* __restrict__ absmax_q,  // [N, K / blocksize]
                    const float* __restrict__ nested,      // [blocks of 256 + 1], the offset last
                    const float* __restrict__ bias,        // [N] or null
                    const T* S,                            // [M, R], of low_rank_kernel
                    const void* __restrict__ B,            // [N, R]
                    T* __restrict__ y,                     // [M, N]
                    int64_t M, int64_t N, int64_t K, int64_t R, Dtype dtype_of_B, int log2_blocksize, float scaling) {
  __shared__ float2 pairs[256][16];  // the two codes of a byte, first to second
  __shared__ float map[256];
  __shared__ float partial[kWarps][8 * kTokenTiles][kPadded];
  for (int i = threadIdx.x; i < 256 * 16; i += kThreads) {
    const auto byte = static_cast<uint8_t>(i / 16);
    pairs[byte][i % 16] = {kDeviceCode.value[first_code(byte)], kDeviceCode.value[second_code(byte)]};
  }
  map[threadIdx.x] = kDeviceMap.value[threadIdx.x];
  __syncthreads();

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, quad = lane / 4, member = lane % 4;
  const float2* own = pairs[0] + lane % 16;
  const Packed W{qweight, absmax, absmax_q, nested};
  const Scales scales(W, N * K >> log2_blocksize, map);

  for (int64_t group = blockIdx.x; group * kRowsOfW < N; group += gridDim.x) {
    float sums[kTokenTiles][4] = {};
    for (int64_t tile = warp; tile * kTile < K; tile += kWarps * kLoads) {
      uint4 bytes[kLoads][2];
      float scale[kLoads][2];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int64_t k = (tile + i * kWarps) * kTile + member * 32;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t n = group * kRowsOfW + half * 8 + quad;
          bytes[i][half] = {};
          scale[i][half] = 0.0f;
          if (n >= N || k >= K) continue;
          bytes[i][half] = load_streamed(qweight + (n * K + k) / 2);
          scale[i][half] = scales.scale_of((n * K + k) >> log2_blocksize);
        }
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if ((tile + i * kWarps) * kTile >= K) break;
        const int64_t k = (tile + i * kWarps) * kTile + member * 32;
        uint4 tokens[kTokenTiles][4];
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          const bool exists = k < K && t * 8 + quad < M;
          const auto* from = reinterpret_cast<const uint4*>(x + (t * 8 + quad) * K + k);
#pragma unroll
          for (int j = 0; j < 4; ++j) tokens[t][j] = exists ? from[j] : uint4{};
        }
        const unsigned words[2][4] = {{bytes[i][0].x, bytes[i][0].y, bytes[i][0].z, bytes[i][0].w},
                                      {bytes[i][1].x, bytes[i][1].y, bytes[i][1].z, bytes[i][1].w}};
#pragma unroll
        for (int step = 0; step < 8; ++step) {  // four columns of each lane: two bytes of either row
          unsigned A[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int half = j % 2, at = 2 * step + j / 2;
            const unsigned byte = words[half][at / 4] >> at % 4 * 8 & 0xFF;
            const float2 codes = own[byte * 16];
            T weights[2];
            round_pair(__fmul_rn(codes.x, scale[i][half]), __fmul_rn(codes.y, scale[i][half]), weights);
            A[j] = as_word(weights);
          }
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t) {
            const uint4 four = tokens[t][step / 2];
            mma<T>(sums[t], A, step % 2 ? four.z : four.x, step % 2 ? four.w : four.y);
          }
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) partial[warp][t * 8 + member * 2 + i % 2][i / 2 * 8 + quad] = sums[t][i];
    }
    __syncthreads();
    wait_for_last_kernel();  // S
    if (const int row = threadIdx.x % kRowsOfW, m = threadIdx.x / kRowsOfW; m < M) {
      const int64_t n = group * kRowsOfW + row;
      if (n < N) {
        float total = 0.0f, low_rank = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) total += partial[w][m][row];
        for (int64_t r = 0; r < R; ++r) {
          const float s = to_float(load_from_last_kernel(S + m * R + r));
          low_rank = fmaf(s, load_factor<T>(B, dtype_of_B, n * R + r), low_rank);
        }
        total = fmaf(scaling, low_rank, total);
        if (bias) total += bias[n];
        y[m * N + n] = narrow<T>(total);
      }
    }
    __syncthreads();
  }
}

// Whether the code that this card runs waits where it must: not that of sm_80, which a later card may have translated. The
// answer is that of all kernels of this file.
template <class Kernel>
bool can_start_early(Kernel kernel) {
  static PerDevice versions;
  return versions.get([&](int) -> uint64_t {
    cudaFuncAttributes attributes{};
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess ? std::max(attributes.ptxVersion, 1) : 1;
  }) >= 90;
}

template <typename T>
void launch_few(const FewRows& few, int blocks, cudaStream_t stream) {
  const auto kernel = few.M <= 8 ? lora_few_kernel<T, 1> : lora_few_kernel<T, 2>;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(kThreads), config.stream = stream;
  config.attrs = &early,
  config.numAttrs = few.R > 0 && can_start_early(kernel);  // without S there is nothing to wait for
  cudaLaunchKernelEx(&config, kernel, static_cast<const T*>(few.x), few.W.qweight, few.W.absmax, few.W.absmax_q,
                     few.W.nested, few.bias, static_cast<const T*>(few.S), few.lora_B, static_cast<T*>(few.y), few.M,
                     few.N, few.K, few.R, few.dtype_of_B, std::countr_zero(static_cast<uint64_t>(few.blocksize)),
                     few.scaling);
}

template <typename T>
void launch_low_rank(const FewRows& few, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(few.R), static_cast<unsigned>(ceil_div(few.M, kRowsOfX)));
  low_rank_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const T*>(few.x), few.lora_A, static_cast<T*>(few.S),
                                                 few.seed, few.M, few.K, few.R, few.dtype_of_A, few.threshold,
                                                 few.inverse_keep, is_aligned(few.lora_A));
}

}  // namespace

Error lora_few(const FewRows& few, void* stream) {
  if (few.dtype == Dtype::f32) return "float32, which the kernel for a few rows does not take";
  if (few.M > kMostFewRows) return "more rows than the kernel for a few takes";
  if (!is_aligned(few.x) || !is_aligned(few.W.qweight)) return "x or qweight off a multiple of 16 bytes";
  if (few.M == 0 || few.N == 0) return nullptr;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  // Blocks stay and take group after group, so that the table is made once; four fit beside each other.
  const int64_t groups = ceil_div(few.N, kRowsOfW);
  const auto blocks = static_cast<int>(std::min<int64_t>(groups, 4 * current_card().multiprocessors));
  with_16_bits(few.dtype, [&]<typename T>(std::type_identity<T>) {
    if (few.R > 0) launch_low_rank<T>(few, cuda_stream);
    launch_few<T>(few, blocks, cuda_stream);
  });
  return launched();
}

}  // namespace nf4lora::cuda
