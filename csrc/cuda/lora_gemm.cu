// lora_linear and its dx on tensor cores, from the packed weight as it is stored.
//
//   forward    y  = x W^T + scaling * S B^T + bias
//   backward   dx = dy W + scaling * mask(T A)
//
// One kernel does both. A block multiplies a tile of tokens with 128 outputs (n forward, k backward), 64 of the summed
// index at a time: tokens come by asynchronous copies, W is unpacked by all threads into shared memory, 64 weights each,
// between the matrix instructions of the step before. What differs is which way a tile of W lies, and ldmatrix can
// transpose. The low-rank term is summed first, scaled in float32, and W is added to it.
#include <algorithm>
#include <bit>

#include "codes.cuh"
#include "factor.cuh"
#include "launch.h"
#include "matrix.cuh"
#include "philox.cuh"
#include "products.cuh"
#include "tile.cuh"
#include "warp.cuh"

namespace nf4lora::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kOutputs = 128;        // of a block
constexpr int kStep = kTileColumns;  // of the summed index
constexpr int kStages = 3;           // tiles of tokens that are there or on their way
constexpr int kTileOfW = kOutputs * kStep;
constexpr int kMaskWords = kOutputs / 32;  // of one token

// How the warps of a block share its tile.
template <int kTokens>
struct Warps {
  static constexpr int kAlongTokens = kTokens >= 64 ? 2 : 1;
  static constexpr int kTokensEach = kTokens / kAlongTokens, kRowTiles = kTokensEach / 16;
  static constexpr int kOutputsEach = kOutputs / (kThreads / kWarp / kAlongTokens), kColumnTiles = kOutputsEach / 8;
  static constexpr int kResident = kTokens == 128 ? 2 : kTokens == 64 ? 3 : 4;  // blocks of a multiprocessor
  static constexpr int kSharedBytes = 2 * (kStages * kTokens * kStep + 2 * kTileOfW);
};

// What a thread has loaded of the weights that it will unpack: 64 neighbours of a row, in halves, of which a blocksize
// of 32 makes two blocks.
struct Packed {
  uint4 codes[2];
  float scale[2];  // absmax; with double quantisation the nested absmax
  uint8_t index[2];
};

template <typename T, bool kBackward, int kTokens>
struct Block {
  using Shape = Warps<kTokens>;
  const LoraGemm& g;
  const float* map;     // [256], in shared memory
  T *tokens, *weights;  // [kStages] tiles and [2] tiles, in shared memory
  const int64_t first_token, first_output;
  const int log2_blocksize;
  const float offset;  // of double quantisation
  const int thread = threadIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_token = warp % Shape::kAlongTokens * Shape::kTokensEach;
  const int warp_output = warp / Shape::kAlongTokens * Shape::kOutputsEach;
  float sums[Shape::kRowTiles][Shape::kColumnTiles][4] = {};

  __device__ int64_t depth() const { return kBackward ? g.N : g.K; }  // of the summed index
  __device__ int64_t outputs() const { return kBackward ? g.K : g.N; }
  __device__ T* stage_of(int step) const { return tokens + step % kStages * (kTokens * kStep); }
  __device__ T* weights_of(int step) const { return weights + step % 2 * kTileOfW; }

  // The place of row and column of a tile of W or of a factor. Forward a row is an output; backward rows are of the
  // summed index, and the outputs lie in two tiles of 64 side by side.
  __device__ static int weight_at(int row, int column) {
    const int panel = kBackward ? column / kTileColumns * (kStep * kTileColumns) : 0;
    return panel + chunk_at(row, column % kTileColumns / kChunk) + column % kChunk;
  }

  __device__ void copy_tokens(int step, T* tile) const {
    constexpr int kRowsApart = kThreads / kChunks;
    const int row = thread / kChunks, chunk = thread % kChunks;
    const int64_t column = int64_t{step} * kStep + chunk * kChunk;
    const int rows = column < depth() ? static_cast<int>(min(g.M - first_token, static_cast<int64_t>(kTokens))) : 0;
    const T* from = static_cast<const T*>(g.rows) + (first_token + row) * depth() + column;
    T* const to = tile + chunk_at(row, chunk);
#pragma unroll
    for (int i = 0; i < kTokens; i += kRowsApart, from += kRowsApart * depth()) {
      copy_async(to + i * kTileColumns, from, row + i < rows);
    }
  }

  // Row and first column, in a tile of W, of the 64 weights that this thread unpacks.
  __device__ int own_row() const { return kBackward ? thread % kStep : thread; }
  __device__ int own_column() const { return kBackward ? thread / kStep * kTileColumns : 0; }

  __device__ Packed fetch(int step) const {
    const int64_t n = (kBackward ? int64_t{step} * kStep : first_output) + own_row();
    const int64_t k = kBackward ? first_output + own_column() : int64_t{step} * kStep;
    Packed packed{};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t column = k + half * 32;
      if (n >= g.N || column >= g.K) continue;
      packed.codes[half] = *reinterpret_cast<const uint4*>(g.qweight + (n * g.K + column) / 2);
      const int64_t block = (n * g.K + column) >> log2_blocksize;
      packed.scale[half] = g.absmax ? g.absmax[block] : g.nested[block / kNestedBlocksize];
      packed.index[half] = g.absmax ? 0 : g.absmax_q[block];
    }
    return packed;
  }

  __device__ Products<T> products(const Packed& packed, int half) const {
    const float scale = packed.scale[half];
    return Products<T>(g.absmax ? scale : decode_absmax(map, packed.index[half], scale, offset));
  }

  // A quarter of the 64 weights: four calls, a matrix instruction's depth of work between them.
  __device__ void unpack(const Packed& packed, const Products<T>& products, int quarter, T* tile) const {
    const uint4 codes = packed.codes[quarter / 2];
    const unsigned words[2] = {quarter % 2 ? codes.z : codes.x, quarter % 2 ? codes.w : codes.y};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = own_column() + (2 * quarter + i) * kChunk;
      *reinterpret_cast<uint4*>(tile + weight_at(own_row(), column)) = products.look_up(words[i]);
    }
  }

  // sums += tokens[:, 16 of the summed index] times those of W. Rows 8 apart have their chunks in the same places.
  __device__ void multiply(const T* token_tile, const T* weight_tile, int step_of_16) {
    unsigned A[Shape::kRowTiles][4];
    const T* const token_row = token_tile + chunk_at(warp_token + lane % 16, 2 * step_of_16 + lane / 16);
#pragma unroll
    for (int i = 0; i < Shape::kRowTiles; ++i) load_matrices(A[i], token_row + i * 16 * kTileColumns);
#pragma unroll
    for (int j = 0; j < Shape::kColumnTiles; j += 2) {
      unsigned B[4];  // lower and upper half of the 16 for one tile of eight outputs, then for the next
      if constexpr (kBackward) {
        const T* const row = weight_tile + weight_at(lane % 16, warp_output + j * 8 + lane / 16 * 8);
        load_matrices_transposed(B, row + step_of_16 * 16 * kTileColumns);
      } else {
        const int row = warp_output + lane / 16 * 8 + lane % 8, column = step_of_16 * 16 + lane / 8 % 2 * 8;
        load_matrices(B, weight_tile + weight_at(row, column) + j * 8 * kTileColumns);
      }
#pragma unroll
      for (int i = 0; i < Shape::kRowTiles; ++i) {
        multiply_add<T>(sums[i][j], A[i], B[0], B[1]);
        multiply_add<T>(sums[i][j + 1], A[i], B[2], B[3]);
      }
    }
  }

  // visit(two neighbouring sums of this lane, their token, the first's output): places within the block, the latter even.
  template <class Visit>
  __device__ void each_pair(Visit&& visit) {
#pragma unroll
    for (int i = 0; i < Shape::kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::kColumnTiles; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          visit(sums[i][j][2 * half], sums[i][j][2 * half + 1], warp_token + i * 16 + lane / 4 + half * 8,
                warp_output + j * 8 + lane % 4 * 2);
        }
      }
    }
  }

  // sums = scaling * low_rank times factor, 64 ranks at a time, in the stage and the tile of W that the first step does
  // not use.
  __device__ void start_with_low_rank() {
    T* const token_tile = stage_of(kStages - 1);
    T* const weight_tile = weights_of(1);
    for (int64_t r = 0; r < g.R; r += kStep) {
      const int ranks = static_cast<int>(min(g.R - r, static_cast<int64_t>(kStep))), padded = (ranks + 15) / 16 * 16;
      for (int i = thread; i < kTokens * padded; i += kThreads) {
        const int row = i / padded, rank = i % padded;
        const int64_t m = first_token + row;
        const bool exists = m < g.M && rank < ranks;
        token_tile[chunk_at(row, rank / kChunk) + rank % kChunk] =
            exists ? static_cast<const T*>(g.low_rank)[m * g.R + r + rank] : narrow<T>(0.0f);
      }
      for (int i = thread; i < kOutputs * padded; i += kThreads) {
        const int output = kBackward ? i % kOutputs : i / padded, rank = kBackward ? i / kOutputs : i % padded;
        const int64_t o = first_output + output;
        const int64_t at = kBackward ? (r + rank) * g.K + o : o * g.R + r + rank;
        const bool exists = o < outputs() && rank < ranks;
        weight_tile[kBackward ? weight_at(rank, output) : weight_at(output, rank)] =
            narrow<T>(exists ? load_factor<T>(g.factor, g.dtype_of_factor, at) : 0.0f);
      }
      __syncthreads();
      for (int step = 0; step < padded / 16; ++step) multiply(token_tile, weight_tile, step);
      __syncthreads();
    }
    each_pair([&](float& first, float& second, int, int) {
      first = __fmul_rn(first, g.scaling);
      second = __fmul_rn(second, g.scaling);
    });
  }

  // Drops what dropout left out of x. A block of four Philox words makes four neighbours of a row; a thread makes the
  // bits of 32, so that none is made twice.
  __device__ void drop() {
    auto* const kept = reinterpret_cast<unsigned*>(weights_of(1));  // [kTokens][kMaskWords]
    for (int i = thread; i < kTokens * kMaskWords; i += kThreads) {
      const int64_t m = first_token + i / kMaskWords, k = first_output + i % kMaskWords * 32;
      unsigned bits = 0;
      if (m < g.M && k < g.K) {
        const uint64_t block = static_cast<uint64_t>(m * g.K + k) / 4;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const Words words = philox(*g.seed, block + j);
#pragma unroll
          for (int w = 0; w < 4; ++w) bits |= static_cast<unsigned>(words.value[w] >= g.threshold) << (4 * j + w);
        }
      }
      kept[i] = bits;
    }
    __syncthreads();
    each_pair([&](float& first, float& second, int token, int output) {
      const unsigned bits = kept[token * kMaskWords + output / 32] >> output % 32;
      if (!(bits & 1)) first = 0.0f;
      if (!(bits & 2)) second = 0.0f;
    });
    __syncthreads();
  }
};

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
  const int64_t blocks = (g.N * g.K) >> log2_blocksize;
  const float offset = g.absmax ? 0.0f : g.nested[(blocks + kNestedBlocksize - 1) / kNestedBlocksize];
  Block<T, kBackward, kTokens> block{g,
                                     map,
                                     tokens,
                                     tokens + kStages * kTokens * kStep,
                                     static_cast<int64_t>(blockIdx.x) * kTokens,
                                     static_cast<int64_t>(blockIdx.y) * kOutputs,
                                     log2_blocksize,
                                     offset};
  const int steps = static_cast<int>((block.depth() + kStep - 1) / kStep);
  const int begin = blockIdx.z * steps_of_split, end = min(steps, begin + steps_of_split);

  // The stages are numbered from the split's first step, so that the last is free for the low-rank term.
  const auto copy = [&](int step) {
    if (step < end) block.copy_tokens(step, block.stage_of(step - begin));
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy(begin + i);
  Packed packed = block.fetch(begin);
  __syncthreads();  // the map
  if (g.R > 0 && blockIdx.z == 0) {
    block.start_with_low_rank();
    if (kBackward && g.seed) block.drop();
  }
  {
    const Products<T> first = block.products(packed, 0), second = block.products(packed, 1);
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      block.unpack(packed, quarter < 2 ? first : second, quarter, block.weights_of(0));
    }
  }
  packed = block.fetch(begin + 1);

  for (int step = begin; step < end; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // this step's tiles are there, and nobody reads those of the last one any more
    copy(step + kStages - 1);
    const T* const token_tile = block.stage_of(step - begin);
    const T* const weight_tile = block.weights_of(step - begin);
    T* const next_tile = block.weights_of(step - begin + 1);
    Products<T> products = block.products(packed, 0);
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      block.multiply(token_tile, weight_tile, quarter);
      if (quarter == 2 && log2_blocksize == 5) products = block.products(packed, 1);
      block.unpack(packed, products, quarter, next_tile);
    }
    packed = block.fetch(step + 2);
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

// Blocks come in rounds of as many as the card holds. Splitting the summed index fills the last round, at the price of
// partial sums, which take about as long as six steps of a block to be written and read.
Plan plan_of(const LoraGemm& g) {
  constexpr int64_t kStepsOfAPartial = 6, kMostSplits = 8;
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  int shared = 0;  // of a multiprocessor
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  const int tokens = g.M <= 32 ? 32 : g.M <= 64 ? 64 : 128;
  const auto resident_of = [&](auto warps) {  // the map of scales, and what the system reserves, are a KB each
    return std::clamp(shared / (decltype(warps)::kSharedBytes + 2048), 1, decltype(warps)::kResident);
  };
  const int resident = tokens == 128  ? resident_of(Warps<128>{})
                       : tokens == 64 ? resident_of(Warps<64>{})
                                      : resident_of(Warps<32>{});
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t steps = up(g.backward ? g.N : g.K, kStep), slots = resident * multiprocessors;
  const int64_t tiles = up(g.M, tokens) * up(g.backward ? g.K : g.N, kOutputs);
  Plan best{tokens, 1, static_cast<int>(steps)};
  int64_t least = up(tiles, slots) * steps;
  for (int64_t splits = 2; splits <= std::min(kMostSplits, steps); ++splits) {
    const int64_t each = up(steps, splits), used = up(steps, each);
    const int64_t cost = up(tiles * used, slots) * (each + kStepsOfAPartial);
    if (cost < least) least = cost, best = {tokens, static_cast<int>(used), static_cast<int>(each)};
  }
  return best;
}

template <typename T, bool kBackward, int kTokens>
void launch_gemm(const LoraGemm& g, const Plan& plan, cudaStream_t stream) {
  const auto kernel = lora_gemm_kernel<T, kBackward, kTokens>;
  constexpr int kBytes = Warps<kTokens>::kSharedBytes;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const dim3 grid(static_cast<unsigned>((g.M + kTokens - 1) / kTokens),
                  static_cast<unsigned>(((kBackward ? g.K : g.N) + kOutputs - 1) / kOutputs), plan.splits);
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
  const auto blocks = static_cast<unsigned>((count + kSumThreads - 1) / kSumThreads);
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
  if (!is_aligned(g.rows) || !is_aligned(g.qweight)) return "rows or qweight off a multiple of 16 bytes";
  if (g.backward && g.N % kChunk) return "out features that are no multiple of 8, backwards";
  if ((g.backward ? g.K : g.N) > kMostOutputs) return "more outputs than a grid has rows of blocks";
  if (g.M == 0 || g.N == 0) return nullptr;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const bool is_bf16 = g.dtype == Dtype::bf16;
  (g.backward ? is_bf16 ? launch<__nv_bfloat16, true> : launch<__half, true>
   : is_bf16  ? launch<__nv_bfloat16, false>
              : launch<__half, false>)(g, cuda_stream);
  return launched();
}

}  // namespace nf4lora::cuda
