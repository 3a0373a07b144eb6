// The tall and skinny products of LoRA: S and T, which have R columns, and the gradients of A and B.
//
// One pass over Z makes either product or both. Blocks leave partial sums in a work space, which a second kernel adds in
// order: the results repeat bit for bit, without atomics and without state between launches. The work space stays small
// for any number of rows: the strips whose sums are kept for Z^T L grow with M, and the sums of Z F are added after every
// few strips, which then leave theirs in the same place.
#include <algorithm>

#include "../ceil_div.h"
#include "dtype.cuh"
#include "factor.cuh"
#include "launch.h"
#include "matrix.cuh"
#include "philox.cuh"
#include "tile.cuh"
#include "vector.cuh"
#include "warp.cuh"

namespace nf4lora::cuda {
namespace {

constexpr int kWarps = 4;  // four stages of eight warps would not fit in the 48 KB of static shared memory
constexpr int kThreads = kWarps * kWarp;
constexpr int kColumns = kWarps * kTileColumns;
constexpr int kRows = 16;  // tokens of a tile
constexpr int kStages = 4;
constexpr int kLeastStrip = 256;  // tokens of a block, a multiple of kRows
constexpr int kMostStrips = 32;   // of all tokens: at least four rounds of blocks, where D is that of a model
constexpr int kTile = kRows * kTileColumns;
constexpr int kDeep = kTileColumns / 16;  // matrix instructions across a tile

int64_t strip_of(int64_t M) { return std::max<int64_t>(kLeastStrip, round_up(ceil_div(M, kMostStrips), kRows)); }

// Rows of a launch: whole strips, and all where P is not wanted.
int64_t rows_of_a_launch(const TallSkinny& t) {
  if (!t.P) return t.M;
  const int64_t bytes_of_a_row = std::max<int64_t>(1, ceil_div(t.D, kColumns) * t.R * 4), strip = strip_of(t.M);
  return std::max<int64_t>(1, t.most_inner / bytes_of_a_row / strip) * strip;
}

int64_t floats_of_inner(const TallSkinny& t) {
  return t.P ? ceil_div(t.D, kColumns) * std::min(t.M, rows_of_a_launch(t)) * t.R : 0;
}

// Formula   inner[part, m, r] = sum over the part's d of drop(Z)[m, d] F(d, r)
//           outer[part, d, r] = sum over the part's m of drop(Z)[m, d] L[m, r]
// Threads   a block for 256 d, a strip of m and 8 * kRankTiles r; a warp for 64 d, 16 m at a time through its own stages
// Assumes   D a multiple of 8, strip one of 16, Z aligned to 16 bytes
// Bound     reading Z; with dropout the words of Philox
template <typename T, int kRankTiles, bool kInner, bool kOuter>
__global__ void __launch_bounds__(kThreads, kRankTiles == 2 ? 4 : 3)
    tall_skinny_kernel(const T* __restrict__ Z,            // [M, D]
                       const void* __restrict__ F,         // [D, R], or [R, D]
                       const T* __restrict__ L,            // [M, R]
                       const uint64_t* __restrict__ seed,  // [1], null without dropout
                       float* __restrict__ inner,          // [parts of D, M - begin, R]
                       float* __restrict__ outer,          // [strips from begin to M, D, R], or [strips, R, D]
                       int64_t begin, int64_t M, int64_t D, int64_t R, int64_t strip, Dtype dtype_of_F,
                       uint32_t threshold, bool F_is_transposed, bool G_is_transposed) {
  __shared__ alignas(128) T tiles[kWarps][kStages][kTile];
  __shared__ float sums_of[kInner ? 2 : 1][kInner ? kWarps : 1][kInner ? kRows * 8 * kRankTiles : 1];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, quad = lane / 4, pair = lane % 4 * 2;
  const int64_t first_d = blockIdx.x * static_cast<int64_t>(kColumns) + warp * kTileColumns;
  const int64_t first_m = begin + blockIdx.y * strip;
  const int64_t first_r = blockIdx.z * static_cast<int64_t>(8 * kRankTiles);
  const int steps = static_cast<int>(ceil_div(min(strip, M - first_m), kRows));

  const auto copy = [&](int step) {
    if (step < steps) {
#pragma unroll
      for (int i = 0; i < kTile / kChunk / kWarp; ++i) {
        const int row = i * 4 + lane / kChunks, chunk = lane % kChunks;
        const int64_t m = first_m + step * kRows + row, d = first_d + chunk * kChunk;
        const bool exists = m < M && d < D;
        copy_async(tiles[warp][step % kStages] + chunk_at(row, chunk), exists ? Z + m * D + d : Z, exists);
      }
    }
    commit_copies();  // an empty group too, so that the count of open ones stays the same
  };
  for (int step = 0; step < kStages - 1; ++step) copy(step);

  unsigned factor[kInner ? kDeep : 1][kRankTiles][2];
  if constexpr (kInner) {
#pragma unroll
    for (int t = 0; t < kDeep; ++t) {
#pragma unroll
      for (int n = 0; n < kRankTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          T values[2];
          const int64_t r = first_r + n * 8 + quad;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int64_t d = first_d + t * 16 + half * 8 + pair + i;
            const float value =
                d < D && r < R ? load_factor<T>(F, dtype_of_F, F_is_transposed ? r * D + d : d * R + r) : 0.0f;
            values[i] = narrow<T>(value);
          }
          factor[t][n][half] = as_word(values);
        }
      }
    }
  }
  float gradient[kOuter ? kDeep : 1][kRankTiles][4] = {};

  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    T* tile = tiles[warp][step % kStages];
    if (seed) {  // each lane on the chunks that it copied
#pragma unroll 1
      for (int i = 0; i < kTile / kChunk / kWarp; ++i) {
        const int row = i * 4 + lane / kChunks, chunk = lane % kChunks;
        T* values = tile + chunk_at(row, chunk);
        const int64_t at = (first_m + step * kRows + row) * D + first_d + chunk * kChunk;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Words words = philox(*seed, static_cast<uint64_t>(at) / 4 + half);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (words.value[j] < threshold) values[half * 4 + j] = narrow<T>(0.0f);
          }
        }
      }
    }
    __syncwarp();  // the tile is whole, and no lane reads the one before, whose place the next copies take
    copy(step + kStages - 1);
    if constexpr (kInner) {
      float sums[kRankTiles][4] = {};
#pragma unroll
      for (int t = 0; t < kDeep; ++t) {
        unsigned z[4];
        load_matrices(z, tile + chunk_at(lane % 16, 2 * t + lane / 16));
#pragma unroll
        for (int n = 0; n < kRankTiles; ++n) mma<T>(sums[n], z, factor[t][n][0], factor[t][n][1]);
      }
      float* own = sums_of[step % 2][warp];
#pragma unroll
      for (int n = 0; n < kRankTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) own[(quad + i / 2 * 8) * 8 * kRankTiles + n * 8 + pair + i % 2] = sums[n][i];
      }
      __syncthreads();  // one is enough: the next step writes the other half
      for (int i = threadIdx.x; i < kRows * 8 * kRankTiles; i += kThreads) {
        const int64_t m = first_m + step * kRows + i / (8 * kRankTiles), r = first_r + i % (8 * kRankTiles);
        if (m >= M || r >= R) continue;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) total += sums_of[step % 2][w][i];
        inner[(blockIdx.x * (M - begin) + m - begin) * R + r] = total;
      }
    }
    if constexpr (kOuter) {
      unsigned low_rank[kRankTiles][2];
#pragma unroll
      for (int n = 0; n < kRankTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          T values[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int64_t m = first_m + step * kRows + half * 8 + pair + i, r = first_r + n * 8 + quad;
            values[i] = m < M && r < R ? L[m * R + r] : narrow<T>(0.0f);
          }
          low_rank[n][half] = as_word(values);
        }
      }
#pragma unroll
      for (int t = 0; t < kDeep; ++t) {
        unsigned z[4];
        load_matrices_transposed(z, tile + chunk_at(lane / 16 * 8 + lane % 8, 2 * t + lane / 8 % 2));
#pragma unroll
        for (int n = 0; n < kRankTiles; ++n) mma<T>(gradient[t][n], z, low_rank[n][0], low_rank[n][1]);
      }
    }
  }
  if constexpr (kOuter) {
#pragma unroll
    for (int t = 0; t < kDeep; ++t) {
#pragma unroll
      for (int n = 0; n < kRankTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t d = first_d + t * 16 + quad + i / 2 * 8, r = first_r + n * 8 + pair + i % 2;
          if (d >= D || r >= R) continue;
          outer[blockIdx.y * D * R + (G_is_transposed ? r * D + d : d * R + r)] = gradient[t][n][i];
        }
      }
    }
  }
}

__device__ __forceinline__ void store_as(void* to, Dtype dtype, int64_t at, float value) {
  with_dtype(dtype, [&]<typename T>(std::type_identity<T>) { static_cast<T*>(to)[at] = narrow<T>(value); });
}

// Formula   P = inner_scale * sum over parts of inner; G = outer_scale * sum over parts of outer; none is a sum of zero
// Threads   one for each value, P's before G's
// Assumes   nothing
// Bound     reading the parts
__global__ void __launch_bounds__(256)
    sum_parts_kernel(const float* __restrict__ inner,  // [inner_parts, P_count]
                     const float* __restrict__ outer,  // [outer_parts, G_count]
                     void* __restrict__ P, void* __restrict__ G, Dtype dtype_of_P, Dtype dtype_of_G, int64_t P_count,
                     int64_t G_count, int64_t inner_parts, int64_t outer_parts, float inner_scale, float outer_scale) {
  int64_t at = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (at >= P_count + G_count) return;
  const bool is_P = at < P_count;
  if (!is_P) at -= P_count;
  const float* from = is_P ? inner : outer;
  const int64_t count = is_P ? P_count : G_count, of = is_P ? inner_parts : outer_parts;
  float total = 0.0f;
  for (int64_t part = 0; part < of; ++part) total += from[part * count + at];
  store_as(is_P ? P : G, is_P ? dtype_of_P : dtype_of_G, at, total * (is_P ? inner_scale : outer_scale));
}

// The rows from begin to end.
template <typename T, int kRankTiles>
void launch_tall_skinny(const TallSkinny& t, float* inner, float* outer, int64_t begin, int64_t end,
                        cudaStream_t stream) {
  const auto kernel = !t.G   ? tall_skinny_kernel<T, kRankTiles, true, false>
                      : !t.P ? tall_skinny_kernel<T, kRankTiles, false, true>
                             : tall_skinny_kernel<T, kRankTiles, true, true>;
  const int64_t strip = strip_of(t.M);
  const dim3 grid(static_cast<unsigned>(ceil_div(t.D, kColumns)), static_cast<unsigned>(ceil_div(end - begin, strip)),
                  static_cast<unsigned>(ceil_div(t.R, 8 * kRankTiles)));
  kernel<<<grid, kThreads, 0, stream>>>(static_cast<const T*>(t.Z), t.F, static_cast<const T*>(t.L), t.seed, inner,
                                        outer, begin, end, t.D, t.R, strip, t.dtype_of_F, t.threshold,
                                        t.F_is_transposed, t.G_is_transposed);
}

}  // namespace

int64_t tall_skinny_workspace(const TallSkinny& t) {
  return floats_of_inner(t) + (t.G ? ceil_div(t.M, strip_of(t.M)) * t.D * t.R : 0);
}

Error tall_skinny(const TallSkinny& t, void* stream) {
  if (t.dtype == Dtype::f32) return "float32, which the kernel for tall and skinny products does not take";
  if (t.D % kChunk != 0) return "a number of columns that is no multiple of 8";
  if (!is_aligned(t.Z)) return "Z off a multiple of 16 bytes";
  const int64_t G_count = t.G ? t.D * t.R : 0;
  if ((t.P ? t.M * t.R : 0) + G_count == 0) return nullptr;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto launch = with_16_bits(t.dtype, [&]<typename T>(std::type_identity<T>) {
    return t.R <= 16 ? launch_tall_skinny<T, 2> : launch_tall_skinny<T, 4>;
  });
  const int64_t rows = rows_of_a_launch(t), strip = strip_of(t.M);
  float* const outer = t.workspace + floats_of_inner(t);
  int64_t begin = 0;
  do {  // once without rows too: G is then a sum of nothing
    const int64_t end = std::min(t.M, begin + rows), P_count = t.P ? (end - begin) * t.R : 0;
    const int64_t added = P_count + (end == t.M ? G_count : 0);
    if (end > begin && t.D > 0) launch(t, t.workspace, outer + begin / strip * t.D * t.R, begin, end, cuda_stream);
    void* const P = t.P ? static_cast<char*>(t.P) + begin * t.R * 2 : nullptr;  // values of 16 bits
    if (added > 0) {
      sum_parts_kernel<<<static_cast<unsigned>(ceil_div(added, 256)), 256, 0, cuda_stream>>>(
          t.workspace, outer, P, t.G, t.dtype, t.dtype_of_G, P_count, added - P_count, ceil_div(t.D, kColumns),
          ceil_div(t.M, strip), t.inner_scale, t.outer_scale);
    }
    begin = end;
  } while (begin < t.M);
  return launched();
}

}  // namespace nf4lora::cuda
