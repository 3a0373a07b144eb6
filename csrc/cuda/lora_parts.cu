// The partial sums of LoRA's low-rank products, added in order, and what is made of them in the same launch.
//
// Where the product with W is added to the low-rank term (beta = 1), the term is written here, out = bias + scale * P E:
// a block adds the parts of P for its rows, rounds them into shared memory, and multiplies them with E for as many columns
// as make reading the parts cheap beside writing out.
#include "lora_parts.h"

#include <algorithm>

#include "../ceil_div.h"
#include "card.h"
#include "dtype.cuh"
#include "factor.cuh"
#include "matrix.cuh"
#include "philox.cuh"
#include "tile.cuh"
#include "vector.cuh"
#include "warp.cuh"

namespace nf4lora::cuda {
namespace {

constexpr int kThreads = 256;

// The sum of one value over all parts, `apart` values from one to the next. Loads are in flight together, additions are
// in order.
__device__ __forceinline__ float sum_of(const float* part, int64_t apart, int64_t parts) {
  float total = 0.0f;
#pragma unroll 8
  for (int64_t i = 0; i < parts; ++i) total += part[i * apart];
  return total;
}

// Formula   G[at] = outer_scale * sum over parts of outer; no parts make a sum of zero
__device__ __forceinline__ void add_gradient(const TallSkinny& t, const Parts& parts, int64_t at) {
  const int64_t count = t.D * t.R;
  if (at >= count) return;
  const float value = sum_of(parts.outer + at, count, parts.outer_parts) * t.outer_scale;
  void* G = t.G[0];
  int64_t own = at;
  if (t.first_rank[1] < t.R) {  // then G is [R, D]
    const int64_t r = at / t.D;
    const auto [matrix, rank, ranks] = of_rank(t.G, t.first_rank, r, t.R);
    G = matrix, own = at - (r - rank) * t.D;
  }
  with_dtype(t.dtype_of_G, [&]<typename F>(std::type_identity<F>) { static_cast<F*>(G)[own] = narrow<F>(value); });
}

// Formula   P = round_to_T(inner_scale * sum over parts of inner), where there is a copy also in its columns from D on,
//           zeros from D + R on; G as above
// Threads   one for each value of P and of what continues it in the copy, then one for each of G
// Assumes   nothing
// Bound     reading the parts
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const __grid_constant__ TallSkinny t, const __grid_constant__ Parts parts, int64_t P_count) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= P_count) {
    if (parts.completes_G) add_gradient(t, parts, at - P_count);
    return;
  }
  const int64_t width = t.copy ? t.copy_stride - t.D : t.R, row = at / width, r = at % width;
  const int64_t from = row * t.R + r;
  const bool exists = !t.copy || r < t.R;
  const float total = exists ? sum_of(parts.inner + from, parts.rows * t.R, parts.inner_parts) * t.inner_scale : 0.0f;
  const T value = narrow<T>(total);
  if (exists) {
    const auto [P, rank, ranks] = of_rank(t.P, t.first_rank, r, t.R);
    static_cast<T*>(P)[(parts.begin + row) * (t.P_stride ? t.P_stride : ranks) + rank] = value;
  }
  if (t.copy) static_cast<T*>(t.copy)[(parts.begin + row) * t.copy_stride + t.D + r] = value;
}

constexpr int kRows = 64;              // of out, of a block
constexpr int kRowTiles = kRows / 16;  // of the matrix instruction
constexpr int kColumnTiles = 4;        // of eight columns, of a warp
constexpr int kOwn = 8;                // columns of a lane
constexpr int kColumns = kThreads / kWarp * kColumnTiles * 8;
constexpr int kPanel = kRows * kTileColumns;  // 64 ranks of P in shared memory
constexpr int kMostRanks = 256;               // of P in shared memory

// The operand E of four matrix instructions: of ranks r, r + 1, r + 8 and r + 9, columns [column, column + 4), one for
// each instruction. So a lane reads neighbours here, and its sums are eight neighbours of a row of out.
template <typename T>
__device__ __forceinline__ void load_expanding(const Expansion& e, const int64_t (&first_rank)[kMostSiblings],
                                               int64_t R, int64_t r, int64_t column, bool vectors,
                                               unsigned (&factor)[kColumnTiles][2]) {
  with_dtype(e.dtype_of_E, [&]<typename F>(std::type_identity<F>) {
    F values[4][kColumnTiles];  // by rank: r, r + 1, r + 8, r + 9
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto [factor, rank, ranks] = of_rank(e.E, first_rank, r + i / 2 * 8 + i % 2, R);
      const F* const E = static_cast<const F*>(factor);
      const bool is_rank = rank < ranks;
      if (!e.E_is_transposed && vectors) {
        Vector<F, kColumnTiles> loaded{};
        if (is_rank && column < e.columns) loaded = load<kColumnTiles>(E + rank * e.columns + column, true);
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) values[i][j] = loaded.value[j];
        continue;
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        const bool exists = is_rank && column + j < e.columns;
        const int64_t at = e.E_is_transposed ? (column + j) * R + rank : rank * e.columns + column + j;
        values[i][j] = exists ? E[at] : narrow<F>(0.0f);
      }
    }
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T pair[2];
        round_pair(to_float(values[2 * half][j]), to_float(values[2 * half + 1][j]), pair);
        factor[j][half] = as_word(pair);
      }
    }
  });
}

// Formula   P as above; out[m, d] = round_to_T(bias[d] + scale * drop(sum over r of P[m, r] round_to_T(E[r, d]))); G as
//           above
// Threads   a block for 64 rows and columns_of_block of out, P of these rows in shared memory; a warp for 32 columns at a
//           time, eight neighbours of 8 rows a lane; after them blocks with a thread for each value of G
// Assumes   with dropout, columns a multiple of 8
// Bound     writing out; with dropout the words of Philox
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    expand_parts_kernel(const __grid_constant__ TallSkinny t, const __grid_constant__ Parts parts, unsigned row_tiles,
                        unsigned blocks, int64_t columns_of_block, bool vectors_of_E, bool vectors_of_out) {
  if (blockIdx.x >= blocks) {
    return add_gradient(t, parts, static_cast<int64_t>(blockIdx.x - blocks) * kThreads + threadIdx.x);
  }
  extern __shared__ __align__(128) unsigned char memory[];
  T* const low_rank = reinterpret_cast<T*>(memory);  // [panels of 64 ranks][64 rows][64 ranks]
  const Expansion& e = t.expansion;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, quad = lane / 4, pair = lane % 4 * 2;
  const int64_t first_m = static_cast<int64_t>(blockIdx.x % row_tiles) * kRows;
  const int64_t first_d = static_cast<int64_t>(blockIdx.x / row_tiles) * columns_of_block;
  const int64_t stride = t.P_stride ? t.P_stride : t.R;
  T* const P = static_cast<T*>(t.P[0]) + parts.begin * stride;

  const bool in_turns = t.R > kMostRanks, is_there = in_turns || !parts.inner;  // a previous launch has written P

  const auto fill = [&](int64_t first_r) {  // returns the ranks that are there, a multiple of 16
    const int ranks = static_cast<int>(min(t.R - first_r, static_cast<int64_t>(kMostRanks)));
    const int padded = round_up(ranks, 16);
    for (int i = threadIdx.x; i < kRows * padded; i += kThreads) {
      const int row = i / padded, r = i % padded;
      const int64_t m = first_m + row;
      T value = narrow<T>(0.0f);
      if (m < parts.rows && r < ranks) {
        T* const own = P + m * stride + first_r + r;
        if (!is_there) {
          const float* const part = parts.inner + m * t.R + first_r + r;
          value = narrow<T>(sum_of(part, parts.rows * t.R, parts.inner_parts) * t.inner_scale);
          if (first_d == 0) *own = value;
        } else {
          value = *own;
        }
      }
      low_rank[r / kTileColumns * kPanel + chunk_at(row, r % kTileColumns / kChunk) + r % kChunk] = value;
    }
    return padded;
  };
  int padded = in_turns ? 0 : fill(0);
  __syncthreads();

  const uint64_t seed = e.seed ? *e.seed : 0;
  const int64_t end = min(first_d + columns_of_block, e.columns);
  for (int64_t block_d = first_d; block_d < end; block_d += kColumns) {
    const int64_t warp_d = block_d + warp * (kColumnTiles * 8);
    float sums[kRowTiles][kColumnTiles][4] = {};
    for (int64_t first_r = 0; first_r < t.R; first_r += kMostRanks) {
      if (in_turns) {
        __syncthreads();  // nobody reads the last ranks any more
        padded = fill(first_r);
        __syncthreads();
      }
      for (int r = 0; r < padded; r += 16) {
        unsigned factor[kColumnTiles][2];
        load_expanding<T>(e, t.first_rank, t.R, first_r + r + pair, warp_d + 4 * quad, vectors_of_E, factor);
        const T* const panel = low_rank + r / kTileColumns * kPanel;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          unsigned A[4];
          load_matrices(A, panel + chunk_at(i * 16 + lane % 16, r % kTileColumns / kChunk + lane / 16));
#pragma unroll
          for (int j = 0; j < kColumnTiles; ++j) mma<T>(sums[i][j], A, factor[j][0], factor[j][1]);
        }
      }
    }

    // Sums i % 2 = 0 and 1 of instruction j are columns 4 pair + j and 4 pair + 4 + j of the warp's.
    const int64_t d = warp_d + 4 * pair;
    const int own = static_cast<int>(max(int64_t{0}, min(e.columns - d, static_cast<int64_t>(kOwn))));
    if (own == 0) continue;
    float bias[kOwn] = {};
    if (e.bias) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (i < own) bias[i] = e.bias[d + i];
      }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t m = first_m + i * 16 + half * 8 + quad;
        if (m >= parts.rows) continue;
        const int64_t at = (parts.begin + m) * e.columns + d;
        Vector<T, kOwn> values;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          float term[kColumnTiles];
#pragma unroll
          for (int j = 0; j < kColumnTiles; ++j) term[j] = __fmul_rn(sums[i][j][2 * half + part], e.scale);
          if (e.seed) {
            const Words words = philox(seed, static_cast<uint64_t>(at) / 4 + part);
#pragma unroll
            for (int j = 0; j < kColumnTiles; ++j) {
              if (words.value[j] < e.threshold) term[j] = 0.0f;
            }
          }
#pragma unroll
          for (int j = 0; j < kColumnTiles; j += 2) {
            round_pair(__fadd_rn(term[j], bias[4 * part + j]), __fadd_rn(term[j + 1], bias[4 * part + j + 1]),
                       &values.value[4 * part + j]);
          }
        }
        T* const to = static_cast<T*>(e.out) + at;
        if (own == kOwn) {
          store(to, values, vectors_of_out);
        } else {
#pragma unroll
          for (int j = 0; j < kOwn; ++j) {
            if (j < own) to[j] = values.value[j];
          }
        }
      }
    }
  }
}

// ---- what is launched

template <typename T>
void sum(const TallSkinny& t, const Parts& parts, cudaStream_t stream) {
  const int64_t P_count = t.P[0] ? parts.rows * (t.copy ? t.copy_stride - t.D : t.R) : 0;
  const int64_t blocks = ceil_div(P_count + (parts.completes_G ? t.D * t.R : 0), kThreads);
  if (blocks == 0) return;  // a grid of zero blocks is an error
  sum_parts_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(t, parts, P_count);
}

// Columns of a block: as many as fill the card twice, unless blocks would then read more bytes of parts than they write.
int64_t columns_of_block(const TallSkinny& t, const Parts& parts, int64_t row_tiles) {
  const int64_t columns = t.expansion.columns, wanted = ceil_div(2 * current_card().multiprocessors, row_tiles);
  const int64_t cheap = columns / (2 * t.R * std::max<int64_t>(1, parts.inner_parts));
  return round_up(ceil_div(columns, std::max<int64_t>(1, std::min(wanted, cheap))), kColumns);
}

template <typename T>
void expand(const TallSkinny& t, Parts parts, cudaStream_t stream) {
  const Expansion& e = t.expansion;
  if (t.R > kMostRanks &&
      parts.inner) {  // more than shared memory takes at a time: added once, then read again by each block
    sum<T>(t, parts, stream);
    parts.completes_G = false;
  }
  const int64_t row_tiles = ceil_div(parts.rows, kRows),
                columns = row_tiles ? columns_of_block(t, parts, row_tiles) : 1;
  const int64_t blocks = row_tiles * ceil_div(e.columns, columns);
  const int64_t all = blocks + (parts.completes_G ? ceil_div(t.D * t.R, kThreads) : 0);
  if (all == 0) return;
  const bool vectors_of_E = std::all_of(e.E, e.E + kMostSiblings, is_aligned) && e.columns % kColumnTiles == 0;
  const bool vectors_of_out = is_aligned(e.out) && e.columns % kOwn == 0;
  const int64_t panels = ceil_div(std::min<int64_t>(t.R, kMostRanks), kTileColumns);
  expand_parts_kernel<T><<<static_cast<unsigned>(all), kThreads, panels * kPanel * sizeof(T), stream>>>(
      t, parts, static_cast<unsigned>(row_tiles), static_cast<unsigned>(blocks), columns, vectors_of_E, vectors_of_out);
}

}  // namespace

void add_parts(const TallSkinny& t, const Parts& parts, cudaStream_t stream) {
  with_16_bits(t.dtype, [&]<typename T>(std::type_identity<T>) {
    t.expansion.out ? expand<T>(t, parts, stream) : sum<T>(t, parts, stream);
  });
}

}  // namespace nf4lora::cuda
