// Up to eight rows of x times W, k along the lanes: a row of W after the other is read, decoded and multiplied. Bound by
// memory for one row of x, by the multiply-add rate for eight.
#pragma once

#include "few_row.h"

namespace nf4lora::NF4LORA_ISA {

inline constexpr int64_t kFetch = 4096;  // bytes of W to prefetch before they are needed
inline constexpr int64_t kNear =
    16 << 10;                         // bytes of x that are used again while they are near: half a first cache level
inline constexpr int kTogether = 16;  // rows of W whose sums are added up side by side
inline constexpr int64_t kMostColumns = 8192;  // whose scales are decoded at a time
inline constexpr int kMostAlong = 8;           // rows of x that are multiplied with k along the lanes

// sums[m] = S times row n of B, for m < M.
template <class T>
NF4LORA_INLINE void begin_sums(const LowRank& low, int64_t n, int M, Float* sums) {
  for (int m = 0; m < M; ++m) sums[m] = broadcast(0.0f);
  if (!low.R) return;
  with_dtype(low.B.dtype, [&](auto tag) __attribute__((always_inline)) {
    using From = decltype(tag);
    const auto* row = static_cast<const typename From::Element*>(low.B.data) + n * low.B.stride;
    for (int64_t r = 0; r < low.R; r += kLanes) {
      typename From::Element padded[kLanes] = {};
      const bool whole = r + kLanes <= low.R;
      if (!whole) std::memcpy(padded, row + r, static_cast<size_t>(low.R - r) * sizeof padded[0]);
      const Float value = load_as<T, From>(whole ? row + r : padded);
      for (int m = 0; m < M; ++m) sums[m] = fma(load(low.S + m * low.stride + r), value, sums[m]);
    }
  });
}

// Sums of a row of x, so that additions that follow each other do not wait for each other.
constexpr int sums_for(int M) {
  int sums = 1;
  while (2 * sums * M <= kRegisters / 2 && sums < 8) sums *= 2;
  return sums;
}

// The scales of columns [k, k + columns) of `count` rows from `first` on, one for each 64 columns, or each 32 where
// blocks are that small: `of[i]` points to those of row first + i. They stay where they are, or are put into `room`:
// many at a time, or each look-up would wait for the one before.
NF4LORA_INLINE void find_scales(const Packed& W, int64_t first, int64_t count, int64_t k, int64_t columns, float* room,
                                const float** of) {
  const int64_t blocks = W.K / W.blocksize, unit = smaller(W.blocksize, 64), at = k / W.blocksize;
  if (W.blocksize == unit && W.scales.absmax) {
    for (int64_t i = 0; i < count; ++i) of[i] = W.scales.absmax + (first + i) * blocks + at;
    return;
  }
  const int64_t each = columns / unit;
  for (int64_t i = 0; i < count; ++i) of[i] = room + i * each;
  if (W.blocksize == unit && columns == W.K) return read_scales(W.scales, first * blocks, count * blocks, room);
  for (int64_t i = 0; i < count; ++i, room += each) {
    const int64_t row = (first + i) * blocks + at, offset = k % W.blocksize;
    if (W.blocksize == unit) {
      read_scales(W.scales, row, each, room);
      continue;
    }
    for (int64_t done = 0; done < columns;) {
      const int64_t block = (offset + done) / W.blocksize, stop = smaller(columns, (block + 1) * W.blocksize - offset);
      const float scale = read_scale(W.scales, row + block);
      for (; done < stop; done += unit) room[done / unit] = scale;
    }
  }
}

// Asks for the scales of rows that come next.
NF4LORA_INLINE void prefetch_scales(const Packed& W, int64_t first, int64_t count) {
  const int64_t blocks = W.K / W.blocksize, size = W.scales.absmax ? 4 : 1;
  const auto* from = W.scales.absmax ? reinterpret_cast<const uint8_t*>(W.scales.absmax) : W.scales.absmax_q;
  from += first * blocks * size;
  for (int64_t at = 0; at < smaller(count * blocks * size, 4096); at += 64) __builtin_prefetch(from + at);
}

// The last chunk of a row, of which less than all exists: its bytes with zeros behind them, its scales repeated, since
// x has zeros there.
template <class Math>
struct LastChunk {
  static constexpr int kScales = Math::kColumns / kMinBlocksize;
  uint8_t bytes[Math::kColumns / 2] = {};
  float scales[kScales];
  LastChunk(const uint8_t* from, const float* scale, int64_t columns, int64_t unit) {
    std::memcpy(bytes, from, static_cast<size_t>(columns / 2));
    for (int i = 0; i < kScales; ++i) scales[i] = scale[smaller(i, (columns - 1) / unit)];
  }
};

// A piece of a row of W.
struct Piece {
  const uint8_t* bytes;
  const float* scales;
  int64_t columns;
  const uint8_t* later;  // to prefetch
};

// out[m] += the piece times row m of x.
template <class Math, int M, bool kSmall>
static __attribute__((noinline)) void multiply_piece(const Piece& piece, const uint8_t* x, Float* out) {
  constexpr int kSums = sums_for(M), kUnit = kSmall ? 32 : 64;
  constexpr int kUnrolled = kSums > kChunkVectors ? kSums / kChunkVectors : 1;
  Float sums[M][kSums];
  NF4LORA_UNROLL
  for (int m = 0; m < M; ++m) {
    NF4LORA_UNROLL
    for (int j = 0; j < kSums; ++j) sums[m][j] = j ? broadcast(0.0f) : out[m];
  }
  const uint8_t *bytes = piece.bytes, *later = piece.later;
  const float* scales = piece.scales;
  const auto multiply_chunk = [&](int turn, const uint8_t* packed, const float* scale,
                                  const uint8_t* of_x) __attribute__((always_inline)) {
    Math::template decode<kSmall>(packed, scale, [&](int part, typename Math::Vector w) __attribute__((always_inline)) {
      NF4LORA_UNROLL
      for (int m = 0; m < M; ++m) {
        Float& sum = sums[m][(turn * kChunkVectors + part) % kSums];
        sum = Math::multiply_add(sum, w, of_x + m * kChunkBytes + part * kLanes * 4);
      }
    });
  };
  constexpr int64_t kColumns = Math::kColumns;
  int64_t left = piece.columns;
  for (; left >= kUnrolled * kColumns; left -= kUnrolled * kColumns) {
    NF4LORA_UNROLL
    for (int turn = 0; turn < kUnrolled; ++turn) {
      if (kColumns == 128 || turn % 2 == 0) __builtin_prefetch(later + turn * kColumns / 2);
      multiply_chunk(turn, bytes + turn * kColumns / 2, scales + turn * kColumns / kUnit, x + turn * M * kChunkBytes);
    }
    bytes += kUnrolled * kColumns / 2, later += kUnrolled * kColumns / 2;
    scales += kUnrolled * kColumns / kUnit, x += kUnrolled * M * kChunkBytes;
  }
  for (; left > 0; left -= kColumns) {
    if (left >= kColumns) {
      multiply_chunk(0, bytes, scales, x);
    } else {
      const LastChunk<Math> last(bytes, scales, left, kUnit);
      multiply_chunk(0, last.bytes, last.scales, x);
    }
    bytes += kColumns / 2, scales += kColumns / kUnit, x += M * kChunkBytes;
  }
  NF4LORA_UNROLL
  for (int m = 0; m < M; ++m) {
    Float total = sums[m][0];
    for (int j = 1; j < kSums; ++j) total = add(total, sums[m][j]);
    out[m] = total;
  }
}

// One row of W after the other, so that each thread reads one stream. They are taken in groups, so that their sums are
// added up side by side, and so that each span of x, M rows of it, is used for all of them while it is near.
template <class Math, int M>
static void multiply_along(const Packed& W, int64_t begin, int64_t end, const uint8_t* x, const LowRank& low,
                           const float* bias, void* y, int64_t stride) {
  using T = typename Math::Tag;
  constexpr int64_t kMost = smaller(kNear / (M * kChunkBytes) * Math::kColumns, kMostColumns);
  float room[kTogether * kMostColumns / kMinBlocksize];
  const float* scales[kTogether];
  Float sums[kTogether * M];
  for (int64_t first = begin; first < end; first += kTogether) {
    const int64_t count = smaller(kTogether, end - first), unit = smaller(W.blocksize, 64);
    for (int64_t i = 0; i < count; ++i) begin_sums<T>(low, first + i, M, sums + i * M);
    prefetch_scales(W, first + kTogether, kTogether);
    for (int64_t wide = 0; wide < W.K; wide += kMostColumns) {
      const int64_t width = smaller(kMostColumns, W.K - wide);
      // Memory goes on reading meanwhile: what the first pieces would ask for.
      const uint8_t* soon = W.qweight + (first * W.K + wide) / 2 + kFetch;
      for (int64_t at = 0; at < kFetch; at += 64) __builtin_prefetch(soon + at);
      find_scales(W, first, count, wide, width, room, scales);
      // Spans of equal size, but for what chunks ask.
      const int64_t spans = (width + kMost - 1) / kMost, chunks = (width + Math::kColumns - 1) / Math::kColumns;
      const int64_t span = (chunks + spans - 1) / spans * Math::kColumns;
      for (int64_t k = wide; k < wide + width; k += span) {
        for (int64_t i = 0; i < count; ++i) {
          // Pieces are read in this order: what is some of them ahead lies in this group, or at the start of the next.
          int64_t later = i + 2 * kFetch / span, later_k = k;
          if (later >= count && k + span < W.K) later -= count, later_k = k + span;
          if (later >= count && k + span >= W.K) later_k = 0;
          Piece piece;
          piece.bytes = W.qweight + ((first + i) * W.K + k) / 2;
          piece.scales = scales[i] + (k - wide) / unit;
          piece.columns = smaller(span, wide + width - k);
          piece.later = W.qweight + ((first + later) * W.K + later_k) / 2;
          const uint8_t* of_x = x + k / Math::kColumns * M * kChunkBytes;
          if (W.blocksize == kMinBlocksize) {
            multiply_piece<Math, M, true>(piece, of_x, sums + i * M);
          } else {
            multiply_piece<Math, M, false>(piece, of_x, sums + i * M);
          }
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      float values[kTogether];
      sum_lanes(sums + m, M, static_cast<int>(count), values);
      for (int64_t i = 0; bias && i < count; ++i) values[i] += bias[first + i];
      narrow<T>(values, broadcast(1.0f), count, static_cast<typename T::Element*>(y) + m * stride + first);
    }
  }
}

}  // namespace nf4lora::NF4LORA_ISA
