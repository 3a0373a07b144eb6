// lora_linear and its dx on tensor cores, from the packed weight as it is stored.
//
//   forward    y  = x W^T + scaling * S B^T + bias
//   backward   dx = dy W + scaling * mask(T A)
//
// One kernel does both. A block multiplies a tile of tokens with 128 outputs (n forward, k backward), 64 of the summed
// index at a time: tokens come by asynchronous copies, W is unpacked by all threads into shared memory, 64 weights each,
// between the matrix instructions of the step before. What differs is which way a tile of W lies, and ldmatrix can
// transpose. The low-rank term is summed first, scaled in float32, and W is added to it.
#include "../ceil_div.h"
#include "lora_gemm.cuh"

#include <algorithm>
#include <bit>

#include "card.h"
#include "dtype.cuh"
#include "per_device.h"

namespace nf4lora::cuda {
namespace {

template <typename T>
__device__ __forceinline__ void store_pair(T* to, float first, float second, bool paired, bool both) {
  Vector<T, 2> pair;
  round_pair(first, second, pair.value);
  if (paired) {
    *reinterpret_cast<Vector<T, 2>*>(to) = pair;
  } else {
    to[0] = pair.value[0];
    if (both) to[1] = pair.value[1];
  }
}

// Formula   out = rows W^T or rows W, plus scaling * low_rank factor^T or scaling * mask(low_rank factor), plus bias;
//           split over the summed index, partials[split] in float32 instead
// Threads   a block for kTokens x 128 outputs and one split; a warp for a quarter of it in registers
// Assumes   rows and qweight aligned to 16 bytes; K a multiple of 32, backward N one of 8
// Bound     kTokens 128: shared memory, 96 to 116 KB for each step of 128 x 128 x 64; fewer: unpacking, 3 instructions
//           a weight
template <typename T, bool kBackward, int kTokens>
__global__ void __launch_bounds__(kThreads, Warps<kTokens>::kResident)
    lora_gemm_kernel(const __grid_constant__ LoraGemm g, int log2_blocksize, int steps_of_split) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ float map[256];
  for (int i = threadIdx.x; i < 256; i += kThreads) map[i] = kDeviceMap.value[i];
  T* const tokens = reinterpret_cast<T*>(memory);
  const int64_t count = (g.N * g.K) >> log2_blocksize;
  Block<T, kBackward, kTokens> block{g,
                                     Scales(g.W, count, map),
                                     tokens,
                                     tokens + kStages * kTokens * kStep,
                                     static_cast<int64_t>(blockIdx.x) * kTokens,
                                     static_cast<int64_t>(blockIdx.y) * kOutputs,
                                     log2_blocksize};
  const int steps = static_cast<int>(ceil_div(block.depth(), kStep));
  const int begin = blockIdx.z * steps_of_split, end = min(steps, begin + steps_of_split);

  // The stages are numbered from the split's first step, so that the last is free for the low-rank term.
  const auto copy = [&](int step) {
    if (step < end) block.copy_tokens(step, block.stage_of(step - begin));
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy(begin + i);
  Fetched fetched = block.fetch(begin);
  __syncthreads();  // the map
  if (g.R > 0 && blockIdx.z == 0) {
    block.start_with_low_rank();
    if (kBackward && g.seed) block.drop();
  }
  {
    const Products<T> first = block.products(fetched, 0), second = block.products(fetched, 1);
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      block.unpack(fetched, quarter < 2 ? first : second, quarter, block.weights_of(0));
    }
  }
  fetched = block.fetch(begin + 1);

  for (int step = begin; step < end; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // this step's tiles are there, and nobody reads those of the last one any more
    copy(step + kStages - 1);
    const T* const token_tile = block.stage_of(step - begin);
    const T* const weight_tile = block.weights_of(step - begin);
    T* const next_tile = block.weights_of(step - begin + 1);
    Products<T> products = block.products(fetched, 0);
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      block.accumulate(token_tile, weight_tile, quarter);
      if (quarter == 2 && log2_blocksize == 5) products = block.products(fetched, 1);
      block.unpack(fetched, products, quarter, next_tile);
    }
    fetched = block.fetch(step + 2);
  }

  const int64_t outputs = block.outputs();
  float* const partial = g.partials ? g.partials + blockIdx.z * g.M * outputs : nullptr;
  const bool paired = outputs % 2 == 0;  // rows of two-value vectors are aligned
  block.each_pair([&](float first, float second, int token, int output) {
    const int64_t m = block.first_token + token, o = block.first_output + output, at = m * outputs + o;
    if (m >= g.M || o >= outputs) return;
    if (partial) return store_pair(partial + at, first, second, paired, o + 1 < outputs);
    if (g.bias) first += g.bias[o];
    if (g.bias && o + 1 < outputs) second += g.bias[o + 1];
    store_pair(static_cast<T*>(g.out) + at, first, second, paired, o + 1 < outputs);
  });
}

constexpr int kSumThreads = 256;

// Formula   out = round_to_T(sum of partials in order + bias)
// Threads   one value each
// Bound     reading the partials, which the second cache level still holds
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    lora_gemm_sum_kernel(const float* __restrict__ partials,  // [splits, M, O]
                         const float* __restrict__ bias,      // [O] or null
                         T* __restrict__ out,                 // [M, O]
                         int splits, int64_t count, int64_t outputs) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (at >= count) return;
  float sum = partials[at];
  for (int split = 1; split < splits; ++split) sum += partials[split * count + at];
  out[at] = narrow<T>(bias ? sum + bias[at % outputs] : sum);
}

// ---- what is launched

struct Plan {
  int tokens;  // of a block
  int splits;
  int steps_of_split;
};

// The card runs a fixed number of blocks at a time, a round. Splitting the sum over k gives the last round enough blocks,
// at the price of partial sums, which take about as long as six steps of a block to be written and read.
Plan plan_of(const LoraGemm& g) {
  constexpr int64_t kStepsOfAPartial = 6, kMostSplits = 8;
  const Card card = current_card();
  const int tokens = g.M <= 32 ? 32 : g.M <= 64 ? 64 : 128;
  const auto resident_of = [&](auto warps) {  // the map of scales, and what the system reserves, are a KB each
    return std::clamp(card.shared_bytes / (decltype(warps)::kSharedBytes + 2048), 1, decltype(warps)::kResident);
  };
  const int resident = tokens == 128  ? resident_of(Warps<128>{})
                       : tokens == 64 ? resident_of(Warps<64>{})
                                      : resident_of(Warps<32>{});
  const int64_t steps = ceil_div(g.backward ? g.N : g.K, kStep), slots = resident * card.multiprocessors;
  const int64_t tiles = ceil_div(g.M, tokens) * ceil_div(g.backward ? g.K : g.N, kOutputs);
  Plan best{tokens, 1, static_cast<int>(steps)};
  int64_t least = ceil_div(tiles, slots) * steps;
  for (int64_t splits = 2; splits <= std::min(kMostSplits, steps); ++splits) {
    const int64_t each = ceil_div(steps, splits), used = ceil_div(steps, each);
    const int64_t cost = ceil_div(tiles * used, slots) * (each + kStepsOfAPartial);
    if (cost < least) least = cost, best = {tokens, static_cast<int>(used), static_cast<int>(each)};
  }
  return best;
}

template <typename T, bool kBackward, int kTokens>
void launch_gemm(const LoraGemm& g, const Plan& plan, cudaStream_t stream) {
  const auto kernel = lora_gemm_kernel<T, kBackward, kTokens>;
  constexpr int kBytes = Warps<kTokens>::kSharedBytes;
  static PerDevice raised;
  raised.get([&](int) -> uint64_t {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    return 1;
  });
  const dim3 grid(static_cast<unsigned>(ceil_div(g.M, kTokens)),
                  static_cast<unsigned>(ceil_div(kBackward ? g.K : g.N, kOutputs)), plan.splits);
  kernel<<<grid, kThreads, kBytes, stream>>>(g, std::countr_zero(static_cast<uint64_t>(g.blocksize)),
                                             plan.steps_of_split);
}

template <typename T, bool kBackward>
void launch(const LoraGemm& g, cudaStream_t stream) {
  const Plan plan = plan_of(g);
  LoraGemm direct = g;
  if (plan.splits == 1) direct.partials = nullptr;
  (plan.tokens == 32   ? launch_gemm<T, kBackward, 32>
   : plan.tokens == 64 ? launch_gemm<T, kBackward, 64>
                       : launch_gemm<T, kBackward, 128>)(direct, plan, stream);
  if (plan.splits == 1) return;
  const int64_t outputs = kBackward ? g.K : g.N, count = g.M * outputs;
  const auto blocks = static_cast<unsigned>(ceil_div(count, kSumThreads));
  lora_gemm_sum_kernel<<<blocks, kSumThreads, 0, stream>>>(g.partials, g.bias, static_cast<T*>(g.out), plan.splits,
                                                           count, outputs);
}

}  // namespace

int64_t lora_gemm_partials(const LoraGemm& g) {
  if (g.M == 0) return 0;
  const Plan plan = plan_of(g);
  return plan.splits == 1 ? 0 : plan.splits * g.M * (g.backward ? g.K : g.N);
}

Error lora_gemm(const LoraGemm& g, void* stream) {
  constexpr int64_t kMostOutputs = int64_t{65535} * kOutputs;
  if (g.dtype == Dtype::f32) return "float32, which the kernel for tensor cores does not take";
  if (!is_aligned(g.rows) || !is_aligned(g.W.qweight)) return "rows or qweight off a multiple of 16 bytes";
  if (g.backward && g.N % kChunk) return "out features that are no multiple of 8, backwards";
  if ((g.backward ? g.K : g.N) > kMostOutputs) return "more outputs than a grid has rows of blocks";
  if (g.M == 0 || g.N == 0) return nullptr;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  with_16_bits(g.dtype, [&]<typename T>(std::type_identity<T>) {
    g.backward ? launch<T, true>(g, cuda_stream) : launch<T, false>(g, cuda_stream);
  });
  return launched();
}

}  // namespace nf4lora::cuda
