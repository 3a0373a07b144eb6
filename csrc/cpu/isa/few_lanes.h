// Nine to sixteen rows of x times W, the rows of x in the lanes: W is decoded into the first cache level, once for all
// of them, and each of its elements multiplied with a vector that has that column of every row of x. No sum is spread
// over lanes. Bound by the multiply-add rate.
#pragma once

#include "few_along.h"

namespace nf4lora::NF4LORA_ISA {

inline constexpr int kAcross = kMostFewRows / kLanes;  // vectors of rows of x
inline constexpr int kSpanChunks = 2;                  // of x and W at a time
inline constexpr int kSpanSteps = kSpanChunks * kSteps;

// out[step][row] = in[row][step]: a chunk of x into the lanes.
static void put_in_lanes(const uint32_t (&in)[kMostFewRows][kSteps], uint32_t* out) {
  for (int step = 0; step < kSteps; step += kTransposed) {
    for (int row = 0; row < kMostFewRows; row += 8) {
      const uint8_t* rows[8];
      NF4LORA_UNROLL
      for (int i = 0; i < 8; ++i) rows[i] = reinterpret_cast<const uint8_t*>(in[row + i]);
      transpose_words(rows, 8, step, out + row, kMostFewRows);
    }
  }
}

// sums = S times row n of B.
template <class T>
NF4LORA_INLINE void begin_lanes(const LowRank& low, int64_t n, float* sums) {
  Float sum[kAcross];
  NF4LORA_UNROLL
  for (int v = 0; v < kAcross; ++v) sum[v] = broadcast(0.0f);
  if (low.R) {
    with_dtype(low.B.dtype, [&](auto tag) __attribute__((always_inline)) {
      using From = decltype(tag);
      const auto* row = static_cast<const typename From::Element*>(low.B.data) + n * low.B.stride;
      for (int64_t r = 0; r < low.R; r += kLanes) {
        const int64_t count = smaller(kLanes, low.R - r);
        typename From::Element padded[kLanes] = {};
        std::memcpy(padded, row + r, static_cast<size_t>(count) * sizeof padded[0]);
        float values[kLanes];
        store(values, load_as<T, From>(padded));
        for (int64_t i = 0; i < count; ++i) {
          NF4LORA_UNROLL
          for (int v = 0; v < kAcross; ++v) {
            sum[v] = fma(broadcast(values[i]), load(low.S_lanes + (r + i) * kMostFewRows + v * kLanes), sum[v]);
          }
        }
      }
    });
  }
  NF4LORA_UNROLL
  for (int v = 0; v < kAcross; ++v) store(sums + v * kLanes, sum[v]);
}

// Columns of a row of W, whole chunks or the last, as elements.
template <class Math, bool kSmall>
static __attribute__((noinline)) void decode_span(const uint8_t* bytes, const float* scales, int64_t columns,
                                                  const uint8_t* later, uint32_t* out) {
  constexpr int64_t kColumns = Math::kColumns, kUnit = kSmall ? 32 : 64;
  const auto put = [&](int part, typename Math::Vector w)
                       __attribute__((always_inline)) { Math::put(out + part * kLanes, w); };
  for (; columns > 0; columns -= kColumns) {
    __builtin_prefetch(later);
    if (columns >= kColumns) {
      Math::template decode<kSmall>(bytes, scales, put);
    } else {
      const LastChunk<Math> last(bytes, scales, columns, kUnit);
      Math::template decode<kSmall>(last.bytes, last.scales, put);
    }
    bytes += kColumns / 2, later += kColumns / 2, scales += kColumns / kUnit, out += kSteps;
  }
}

// sums[row of W][row of x] += a tile of W times x.
template <class Math>
static __attribute__((noinline)) void multiply_tile(const uint32_t* W, const uint8_t* x, int64_t steps, float* sums) {
  Float sum[kFewTileRows][kAcross];
  NF4LORA_UNROLL
  for (int r = 0; r < kFewTileRows; ++r) {
    NF4LORA_UNROLL
    for (int v = 0; v < kAcross; ++v) sum[r][v] = load(sums + r * kMostFewRows + v * kLanes);
  }
  const auto* of_x = reinterpret_cast<const float*>(x);
  for (int64_t s = 0; s < steps; ++s, of_x += kMostFewRows) {
    Float column[kAcross];
    NF4LORA_UNROLL
    for (int v = 0; v < kAcross; ++v) column[v] = load(of_x + v * kLanes);
    NF4LORA_UNROLL
    for (int r = 0; r < kFewTileRows; ++r) {
      NF4LORA_UNROLL
      for (int v = 0; v < kAcross; ++v) sum[r][v] = Math::multiply_add(sum[r][v], W[r * kSpanSteps + s], column[v]);
    }
  }
  NF4LORA_UNROLL
  for (int r = 0; r < kFewTileRows; ++r) {
    NF4LORA_UNROLL
    for (int v = 0; v < kAcross; ++v) store(sums + r * kMostFewRows + v * kLanes, sum[r][v]);
  }
}

template <class Math>
static void multiply_lanes(const Packed& W, int64_t begin, int64_t end, const uint8_t* x, int rows, const LowRank& low,
                           const float* bias, void* y, int64_t stride) {
  using T = typename Math::Tag;
  constexpr int kGroup = kFewTileRows * kFewTiles;
  constexpr int64_t kColumns = Math::kColumns, kSpan = kSpanChunks * kColumns;
  constexpr int64_t kStepBytes = kMostFewRows * 4;
  const int64_t unit = smaller(W.blocksize, 64);
  float room[kGroup * kMostColumns / kMinBlocksize];
  const float* scales[kGroup];
  alignas(64) uint32_t tile[kFewTileRows * kSpanSteps];
  alignas(64) float sums[kGroup * kMostFewRows];
  for (int64_t first = begin; first < end; first += kGroup) {
    // Past the end, the last row stands in, and its sums are not used.
    const auto row_of = [&](int64_t i) { return smaller(first + i, end - 1); };
    const int64_t count = smaller(kGroup, end - first), used = (count + kFewTileRows - 1) / kFewTileRows * kFewTileRows;
    for (int64_t i = 0; i < used; ++i) begin_lanes<T>(low, row_of(i), sums + i * kMostFewRows);
    prefetch_scales(W, first + kGroup, kGroup);
    for (int64_t k = 0; k < W.K; k += kSpan) {
      const int64_t columns = smaller(kSpan, W.K - k), steps = (columns + kColumns - 1) / kColumns * kSteps;
      if (k % kMostColumns == 0) {
        find_scales(W, first, count, k, smaller(kMostColumns, W.K - k), room, scales);
        for (int64_t i = count; i < used; ++i) scales[i] = scales[count - 1];
      }
      const bool is_last = k + kSpan >= W.K;
      for (int64_t i = 0; i < used; i += kFewTileRows) {
        for (int r = 0; r < kFewTileRows; ++r) {
          const uint8_t* bytes = W.qweight + (row_of(i + r) * W.K + k) / 2;
          const uint8_t* later = is_last ? W.qweight + (row_of(kGroup + i + r) * W.K) / 2 : bytes + kSpan / 2;
          const float* scale = scales[i + r] + k % kMostColumns / unit;
          if (W.blocksize == kMinBlocksize) {
            decode_span<Math, true>(bytes, scale, columns, later, tile + r * kSpanSteps);
          } else {
            decode_span<Math, false>(bytes, scale, columns, later, tile + r * kSpanSteps);
          }
        }
        multiply_tile<Math>(tile, x + k / kColumns * kSteps * kStepBytes, steps, sums + i * kMostFewRows);
      }
    }
    for (int m = 0; m < rows; ++m) {
      float values[kGroup];
      for (int64_t i = 0; i < count; ++i) values[i] = sums[i * kMostFewRows + m] + (bias ? bias[first + i] : 0.0f);
      narrow<T>(values, broadcast(1.0f), count, static_cast<typename T::Element*>(y) + m * stride + first);
    }
  }
}

}  // namespace nf4lora::NF4LORA_ISA
