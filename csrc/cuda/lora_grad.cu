// The tall and skinny products of LoRA: S and T, which have R columns, and the gradients of A and B.
//
// One pass over Z makes either product or both, and copies Z where that is wanted. Blocks leave partial sums in a work
// space, which a second kernel adds in order (lora_parts.cu): the results repeat bit for bit, without atomics and without
// state between launches. A block covers as much of Z as leaves about two blocks to a multiprocessor, in the shape that
// makes the fewest bytes of sums. The work space stays small for any number of rows: where the sums of Z F would outgrow
// it they are added after as many rows as it takes, and the next launch leaves its own in the same place; it goes on with
// the sums of Z^T L of the one before.
#include <algorithm>

#include "../ceil_div.h"
#include "card.h"
#include "dtype.cuh"
#include "factor.cuh"
#include "launch.h"
#include "lora_parts.h"
#include "matrix.cuh"
#include "philox.cuh"
#include "tile.cuh"
#include "vector.cuh"
#include "warp.cuh"

namespace nf4lora::cuda {
namespace {

constexpr int kWarps = 4;  // four stages of eight warps would not fit in the 48 KB of static shared memory
constexpr int kThreads = kWarps * kWarp;
constexpr int kColumns = kWarps * kTileColumns;  // of a group
constexpr int kRows = 16;                        // tokens of a tile
constexpr int kStages = 4;
constexpr int kTile = kRows * kTileColumns;
constexpr int kDeep = kTileColumns / 16;  // matrix instructions across a tile

// Groups of columns that a block can take: a lane holds the factor of all of them for Z F, 8 kRankTiles registers a group,
// and their sums for Z^T L, 16 kRankTiles a group. Z^T L alone gains nothing from a second group.
constexpr int most_groups(int rank_tiles, bool inner, bool outer) { return !outer ? 4 : inner ? 2 : 1; }
// Blocks on a multiprocessor that the registers of these are enough for.
NF4LORA_HOST_DEVICE constexpr int resident(int rank_tiles, int groups, bool inner, bool outer) {
  const int values = rank_tiles * groups * (inner + 2 * outer);  // eights of a lane
  return values <= 8 ? 4 : values <= 12 ? 3 : 2;
}

// What a launch is told besides the product.
struct Pass {
  float* inner;          // [parts of D, end - begin, R]
  float* outer;          // [strips, D, R], or [strips, R, D]
  int64_t begin, end;    // rows
  int64_t strip;         // rows of a block
  unsigned rank_groups;  // of 8 kRankTiles ranks
};

// Formula   inner[part, m, r] = sum over the part's d of drop(Z)[m, d] F(d, r)
//           outer[strip, d, r] (+)= sum over the strip's m of drop(Z)[m, d] L[m, r], added from the second launch on
//           copy[m, d] = Z[m, d]
// Threads   a block for 256 kGroups d, a strip of m and 8 kRankTiles r; a warp for 64 d of each group, 16 m at a time
//           through its own stages. Blocks of the same Z and other ranks run together: only one of them reads memory
// Assumes   D a multiple of 8, strip one of 16, Z and copy aligned to 16 bytes
// Bound     reading Z, writing its copy; with dropout the words of Philox
template <typename T, int kRankTiles, int kGroups, bool kInner, bool kOuter>
__global__ void __launch_bounds__(kThreads, resident(kRankTiles, kGroups, kInner, kOuter))
    tall_skinny_kernel(const __grid_constant__ TallSkinny t, const __grid_constant__ Pass pass) {
  constexpr bool kRegistersLeft = resident(kRankTiles, kGroups, kInner, kOuter) > 2;  // for copies side by side
  __shared__ alignas(128) T tiles[kWarps][kStages][kTile];
  __shared__ float sums_of[kInner ? 2 : 1][kInner ? kWarps : 1][kInner ? kRows * 8 * kRankTiles : 1];
  const T* const __restrict__ Z = static_cast<const T*>(t.Z);
  const T* const __restrict__ L = static_cast<const T*>(t.L);
  const int64_t D = t.D, R = t.R;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, quad = lane / 4, pair = lane % 4 * 2;
  const unsigned part = blockIdx.x / pass.rank_groups, rank_group = blockIdx.x % pass.rank_groups;
  const int64_t first_d = part * static_cast<int64_t>(kGroups * kColumns) + warp * kTileColumns;
  const int64_t first_m = pass.begin + blockIdx.y * pass.strip, end = pass.end;
  const int64_t first_r = rank_group * static_cast<int64_t>(8 * kRankTiles);
  const int steps = static_cast<int>(ceil_div(min(pass.strip, end - first_m), kRows));

  // Tile i is of group i % kGroups of step i / kGroups.
  const auto copy = [&](int i) {
    if (i < steps * kGroups) {
      const int64_t m_of_tile = first_m + i / kGroups * kRows, d_of_tile = first_d + i % kGroups * kColumns;
#pragma unroll(kRegistersLeft ? kTile / kChunk / kWarp : 1)
      for (int j = 0; j < kTile / kChunk / kWarp; ++j) {
        const int row = j * 4 + lane / kChunks, chunk = lane % kChunks;
        const int64_t m = m_of_tile + row, d = d_of_tile + chunk * kChunk;
        const bool exists = m < end && d < D;
        copy_async(tiles[warp][i % kStages] + chunk_at(row, chunk), exists ? Z + m * D + d : Z, exists);
      }
    }
    commit_copies();  // an empty group too, so that the count of open ones stays the same
  };
  for (int i = 0; i < kStages - 1; ++i) copy(i);

  unsigned factor[kInner ? kGroups : 1][kInner ? kDeep : 1][kRankTiles][2];
  if constexpr (kInner) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int k = 0; k < kDeep; ++k) {
#pragma unroll
        for (int n = 0; n < kRankTiles; ++n) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            T values[2];
            const int64_t r = first_r + n * 8 + quad;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int64_t d = first_d + g * kColumns + k * 16 + half * 8 + pair + i;
              const void* F = t.F[0];
              int64_t own = r;
              if constexpr (!kOuter) {  // with G there is one adapter, and no register for more
                const auto found = of_rank(t.F, t.first_rank, r, R);
                F = found.matrix, own = found.rank;
              }
              const int64_t at = t.F_is_transposed ? own * D + d : d * R + r;
              const float value = d < D && r < R ? load_factor<T>(F, t.dtype_of_F, at) : 0.0f;
              values[i] = narrow<T>(value);
            }
            factor[g][k][n][half] = as_word(values);
          }
        }
      }
    }
  }

  float gradient[kOuter ? kGroups : 1][kOuter ? kDeep : 1][kRankTiles][4] = {};
  const auto each_gradient = [&](auto&& visit) {  // with its place in outer
    if constexpr (kOuter) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int k = 0; k < kDeep; ++k) {
#pragma unroll
          for (int n = 0; n < kRankTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int64_t d = first_d + g * kColumns + k * 16 + quad + i / 2 * 8;
              const int64_t r = first_r + n * 8 + pair + i % 2;
              if (d >= D || r >= R) continue;
              visit(gradient[g][k][n][i], blockIdx.y * D * R + (t.G_is_transposed ? r * D + d : d * R + r));
            }
          }
        }
      }
    }
  };
  if (pass.begin > 0) each_gradient([&](float& sum, int64_t at) { sum = pass.outer[at]; });

  const uint64_t seed = t.seed ? *t.seed : 0;
  for (int step = 0; step < steps; ++step) {
    const int64_t m_of_step = first_m + step * kRows;
    unsigned low_rank[kRankTiles][2];
    if constexpr (kOuter) {  // on its way while the tile still is
#pragma unroll
      for (int n = 0; n < kRankTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          T values[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int64_t m = m_of_step + half * 8 + pair + i, r = first_r + n * 8 + quad;
            values[i] = m < end && r < R ? L[m * R + r] : narrow<T>(0.0f);
          }
          low_rank[n][half] = as_word(values);
        }
      }
    }
    float sums[kRankTiles][4] = {};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      wait_for_copies<kStages - 2>();
      T* tile = tiles[warp][(step * kGroups + g) % kStages];
      const int64_t d_of_tile = first_d + g * kColumns;
      if (t.seed || (t.copy && rank_group == 0)) {  // each lane the chunks that it copied
#pragma unroll 1
        for (int i = 0; i < kTile / kChunk / kWarp; ++i) {
          const int row = i * 4 + lane / kChunks, chunk = lane % kChunks;
          const int64_t m = m_of_step + row, d = d_of_tile + chunk * kChunk;
          T* values = tile + chunk_at(row, chunk);
          if (t.copy && rank_group == 0 && m < end && d < D) {
            *reinterpret_cast<uint4*>(static_cast<T*>(t.copy) + m * t.copy_stride + d) =
                *reinterpret_cast<const uint4*>(values);
          }
          if (!t.seed) continue;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Words words = philox(seed, static_cast<uint64_t>(m * D + d) / 4 + half);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              if (words.value[j] < t.threshold) values[half * 4 + j] = narrow<T>(0.0f);
            }
          }
        }
      }
      __syncwarp();  // the tile is whole, and no lane reads the one before, whose place the next copies take
      copy(step * kGroups + g + kStages - 1);
      if constexpr (kInner) {
#pragma unroll
        for (int k = 0; k < kDeep; ++k) {
          unsigned z[4];
          load_matrices(z, tile + chunk_at(lane % 16, 2 * k + lane / 16));
#pragma unroll
          for (int n = 0; n < kRankTiles; ++n) mma<T>(sums[n], z, factor[g][k][n][0], factor[g][k][n][1]);
        }
      }
      if constexpr (kOuter) {
#pragma unroll
        for (int k = 0; k < kDeep; ++k) {
          unsigned z[4];
          load_matrices_transposed(z, tile + chunk_at(lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
          for (int n = 0; n < kRankTiles; ++n) mma<T>(gradient[g][k][n], z, low_rank[n][0], low_rank[n][1]);
        }
      }
    }
    if constexpr (kInner) {
      float* own = sums_of[step % 2][warp];
#pragma unroll
      for (int n = 0; n < kRankTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) own[(quad + i / 2 * 8) * 8 * kRankTiles + n * 8 + pair + i % 2] = sums[n][i];
      }
      __syncthreads();  // one is enough: the next step writes the other half
      for (int i = threadIdx.x; i < kRows * 8 * kRankTiles; i += kThreads) {
        const int64_t m = m_of_step + i / (8 * kRankTiles), r = first_r + i % (8 * kRankTiles);
        if (m >= end || r >= R) continue;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) total += sums_of[step % 2][w][i];
        pass.inner[(part * (end - pass.begin) + m - pass.begin) * R + r] = total;
      }
    }
  }
  each_gradient([&](float& sum, int64_t at) { pass.outer[at] = sum; });
}

// ---- what is launched

struct Plan {
  int groups = 1;     // of columns, of a block
  int64_t parts = 0;  // of D
  int64_t rank_groups = 0;
  int64_t rows = 0;       // of a launch
  int64_t strip = kRows;  // rows of a block
  int64_t strips = 0;     // of a launch
};

// Rows of a launch, so that the sums of Z F fit in the work space.
int64_t rows_of_a_launch(const TallSkinny& t, int64_t parts) {
  constexpr int64_t kLeast = 256;
  if (!t.P[0]) return t.M;
  const int64_t fitting = t.most_inner / (parts * t.R * 4) / kRows * kRows, most = std::max(kLeast, fitting);
  return t.M <= most ? t.M : round_up(ceil_div(t.M, ceil_div(t.M, most)), kRows);
}

// A block covers 256, 512 or 1024 columns and a strip of rows; which, is a matter of bytes. Wide blocks leave few sums of
// Z F (R for each row), long ones few of Z^T L (R for each column), and both read the factor less often. A card whose
// blocks are fewer than two a multiprocessor does not reach the bandwidth of its memory. Bytes of the sums, written and
// read again, with R = 16 and 64 on a card of 132 multiprocessors, before (blocks of 256 x 256, with more than 8192 rows
// of 256 x M / 32) and as planned here:
//
//                         R = 16                                       R = 64
//      M      D    2 M D  P alone      P and G      G alone           P alone      P and G      G alone
//   4096   4096    34 MB   8.4   8.4   16.8  16.8   8.4  8.4 MB        34   17      67   50      34   17 MB
//   4096  14336   117 MB  29.4  14.7   58.7  31.2  29.4  7.3 MB       117   29     235   88     117   15 MB
//  32768   4096   268 MB  67.1  16.8   83.9  50.9  16.8  8.4 MB       268   67     336  168      67   17 MB
//  32768  14336   940 MB 234.9  58.7  293.6 134.0  58.7  7.3 MB       940  235    1174  675     235   15 MB
Plan plan_of(const TallSkinny& t) {
  Plan best;
  if (t.M == 0 || t.D == 0 || t.R == 0) return best;
  const int64_t rounds = 2 * current_card().multiprocessors;
  const int rank_tiles = t.R <= 16 ? 2 : 4;
  const bool with_G = t.G[0] || t.adds_as_both;
  best.rank_groups = ceil_div(t.R, 8 * rank_tiles);
  int64_t least = INT64_MAX;
  for (int groups = 1; groups <= most_groups(rank_tiles, t.P[0], with_G); groups *= 2) {
    const int64_t columns = groups * kColumns, parts = ceil_div(t.D, columns), rows = rows_of_a_launch(t, parts);
    if (groups > 1 && columns >= 2 * t.D) break;
    for (int fewer = 1; fewer <= 8; fewer *= 2) {
      const int64_t wanted = std::max<int64_t>(1, rounds / fewer / (parts * best.rank_groups));
      const int64_t strip = round_up(ceil_div(rows, wanted), kRows), strips = ceil_div(rows, strip);
      const int64_t reading = 2 * std::max(rows * t.D * best.rank_groups, rounds * columns * strip);
      const int64_t of_P = t.P[0] ? 8 * rows * parts + 4 * t.D * strips : 0, of_G = with_G ? 8 * t.D * strips : 0;
      const int64_t cost = ceil_div(t.M, rows) * (reading + t.R * (of_P + of_G));
      if (cost < least) least = cost, best = {groups, parts, best.rank_groups, rows, strip, strips};
    }
  }
  return best;
}

int64_t floats_of_inner(const TallSkinny& t, const Plan& plan) { return t.P[0] ? plan.parts * plan.rows * t.R : 0; }

template <typename T, int kRankTiles, int kGroups, bool kInner, bool kOuter>
void launch_as(const TallSkinny& t, const Plan& plan, const Pass& pass, cudaStream_t stream) {
  if constexpr (kGroups <= most_groups(kRankTiles, kInner, kOuter)) {
    const dim3 grid(static_cast<unsigned>(plan.parts * plan.rank_groups),
                    static_cast<unsigned>(ceil_div(pass.end - pass.begin, pass.strip)));
    tall_skinny_kernel<T, kRankTiles, kGroups, kInner, kOuter><<<grid, kThreads, 0, stream>>>(t, pass);
  }
}

template <typename T, int kRankTiles, int kGroups>
void launch_groups(const TallSkinny& t, const Plan& plan, const Pass& pass, cudaStream_t stream) {
  (!t.G[0]   ? launch_as<T, kRankTiles, kGroups, true, false>
   : !t.P[0] ? launch_as<T, kRankTiles, kGroups, false, true>
             : launch_as<T, kRankTiles, kGroups, true, true>)(t, plan, pass, stream);
}

template <typename T, int kRankTiles>
void launch(const TallSkinny& t, const Plan& plan, const Pass& pass, cudaStream_t stream) {
  (plan.groups == 1   ? launch_groups<T, kRankTiles, 1>
   : plan.groups == 2 ? launch_groups<T, kRankTiles, 2>
                      : launch_groups<T, kRankTiles, 4>)(t, plan, pass, stream);
}

Error refusal(const TallSkinny& t) {
  if (t.dtype == Dtype::f32) return "float32, which the kernel for tall and skinny products does not take";
  if (t.D % kChunk != 0) return "a number of columns that is no multiple of 8";
  if (!is_aligned(t.Z)) return "Z off a multiple of 16 bytes";
  const Expansion& e = t.expansion;
  if ((t.copy || e.out) && (!t.P[0] || t.R < 1)) return "a copy or an expansion of no product";
  if (t.copy && e.out) return "a copy and an expansion at a time";
  if (t.copy && !is_aligned(t.copy)) return "copy off a multiple of 16 bytes";
  if (t.copy && (t.copy_stride < t.D + t.R || t.copy_stride % kChunk != 0)) {
    return "rows of copy that are too short, or no multiple of 8";
  }
  if (e.out && e.seed && e.columns % kChunk != 0) return "dropout of a number of columns that is no multiple of 8";
  const bool is_of_more = t.first_rank[1] < t.R;
  if (is_of_more && ((t.P[0] && !t.F_is_transposed) || (t.G[0] && !t.G_is_transposed))) {
    return "factors of more adapters than one, and not transposed";
  }
  if (is_of_more && t.P[0] && t.G[0]) return "either product of more adapters than one, in one pass";
  if (is_of_more && t.P[0] && e.out) return "an expansion of a P of more adapters than one, before it is there";
  return nullptr;
}

}  // namespace

int64_t tall_skinny_workspace(const TallSkinny& t) {
  const Plan plan = plan_of(t);
  return floats_of_inner(t, plan) + (t.G[0] ? plan.strips * t.D * t.R : 0);
}

Error tall_skinny(const TallSkinny& t, void* stream) {
  if (const Error why = refusal(t)) return why;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto pass_over =
      with_16_bits(t.dtype, [&]<typename T>(std::type_identity<T>) { return t.R <= 16 ? launch<T, 2> : launch<T, 4>; });
  const Plan plan = plan_of(t);
  float* const outer = t.workspace + floats_of_inner(t, plan);
  const int64_t rows = plan.parts > 0 ? plan.rows : t.M;
  int64_t begin = 0;
  do {  // once without rows too: G is then a sum of nothing
    const int64_t end = std::min(t.M, begin + rows);
    if (plan.parts > 0) {
      pass_over(t, plan, {t.workspace, outer, begin, end, plan.strip, static_cast<unsigned>(plan.rank_groups)},
                cuda_stream);
    }
    add_parts(t, {t.workspace, outer, plan.parts, plan.strips, begin, end - begin, t.G[0] && end == t.M}, cuda_stream);
    begin = end;
  } while (begin < t.M);
  return launched();
}

Error expand(const TallSkinny& t, void* stream) {
  if (t.dtype == Dtype::f32) return "float32, which the kernel for tall and skinny products does not take";
  const Expansion& e = t.expansion;
  if (!e.out || !t.P[0] || t.R < 1) return "no expansion, or one of no product";
  if (e.seed && e.columns % kChunk != 0) return "dropout of a number of columns that is no multiple of 8";
  if (t.first_rank[1] < t.R && e.E_is_transposed) return "factors of more adapters than one, and transposed";
  add_parts(t, {.rows = t.M}, static_cast<cudaStream_t>(stream));
  return launched();
}

}  // namespace nf4lora::cuda
