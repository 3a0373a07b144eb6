// The tile of lora_gemm_kernel: how a block of threads fetches, unpacks and multiplies, one step of the summed index at a
// time, in either direction.
#pragma once

#include "codes.cuh"
#include "factor.cuh"
#include "launch.h"
#include "matrix.cuh"
#include "philox.cuh"
#include "products.cuh"
#include "scales.cuh"
#include "tile.cuh"
#include "warp.cuh"

namespace nf4lora::cuda {

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
struct Fetched {
  uint4 codes[2];
  Scales::Stored scale[2];
};

template <typename T, bool kBackward, int kTokens>
struct Block {
  using Shape = Warps<kTokens>;
  const LoraGemm& g;
  const Scales scales;
  T *tokens, *weights;  // [kStages] tiles and [2] tiles, in shared memory
  const int64_t first_token, first_output;
  const int log2_blocksize;
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

  __device__ Fetched fetch(int step) const {
    const int64_t n = (kBackward ? int64_t{step} * kStep : first_output) + own_row();
    const int64_t k = kBackward ? first_output + own_column() : int64_t{step} * kStep;
    Fetched fetched{};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t column = k + half * 32;
      if (n >= g.N || column >= g.K) continue;
      fetched.codes[half] = *reinterpret_cast<const uint4*>(g.W.qweight + (n * g.K + column) / 2);
      fetched.scale[half] = scales.stored((n * g.K + column) >> log2_blocksize);
    }
    return fetched;
  }

  __device__ Products<T> products(const Fetched& fetched, int half) const {
    return Products<T>(scales.decoded(fetched.scale[half]));
  }

  // A quarter of the 64 weights: four calls, a matrix instruction's depth of work between them.
  __device__ void unpack(const Fetched& fetched, const Products<T>& products, int quarter, T* tile) const {
    const uint4 codes = fetched.codes[quarter / 2];
    const unsigned words[2] = {quarter % 2 ? codes.z : codes.x, quarter % 2 ? codes.w : codes.y};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = own_column() + (2 * quarter + i) * kChunk;
      *reinterpret_cast<uint4*>(tile + weight_at(own_row(), column)) = products.look_up(words[i]);
    }
  }

  // sums += tokens[:, 16 of the summed index] times those of W. Rows 8 apart have their chunks in the same places.
  __device__ void accumulate(const T* token_tile, const T* weight_tile, int step_of_16) {
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
        mma<T>(sums[i][j], A[i], B[0], B[1]);
        mma<T>(sums[i][j + 1], A[i], B[2], B[3]);
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
      for (int step = 0; step < padded / 16; ++step) accumulate(token_tile, weight_tile, step);
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

}  // namespace nf4lora::cuda
