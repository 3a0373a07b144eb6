// Products with few rows of x, a generated token's above all: each row of W is read once, in order, and every block is
// multiplied where it is decoded, k along the lanes. Bound by memory for one row of x, by the multiply-add rate for
// many; the packed weight is what is read.
#pragma once

#include "few_row.h"

namespace nf4lora::NF4LORA_ISA {

inline constexpr int64_t kFetch = 4096;     // bytes of W to prefetch before they are needed
inline constexpr int64_t kNear = 16 << 10;  // bytes of x that stay in the first cache level beside everything else
inline constexpr int kTogether = 16;        // rows of W

// out[i] = the sum of v[i]'s lanes, for i < count.
NF4LORA_INLINE void sum_lanes(const Float* v, int count, float* out) {
#if defined(__AVX512F__)
  int i = 0;
  for (; i + 4 <= count; i += 4) {
    const __m512 a =
        _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 1], 0x44), _mm512_shuffle_f32x4(v[i], v[i + 1], 0xEE));
    const __m512 b =
        _mm512_add_ps(_mm512_shuffle_f32x4(v[i + 2], v[i + 3], 0x44), _mm512_shuffle_f32x4(v[i + 2], v[i + 3], 0xEE));
    __m512 sum = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xB1));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4E));
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    _mm_storeu_ps(out + i, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, sum)));
  }
  for (; i < count; ++i) {
    __m512 sum = _mm512_add_ps(v[i], _mm512_shuffle_f32x4(v[i], v[i], 0x4E));
    sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0xB1));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xB1));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4E));
    out[i] = _mm512_cvtss_f32(sum);
  }
#else
  for (int i = 0; i < count; ++i) {
    float lanes[kLanes];
    store(lanes, v[i]);
    for (int width = kLanes / 2; width; width /= 2) {
      for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    out[i] = lanes[0];
  }
#endif
}

// S times a row of B: what the first sum of each row of x begins with.
template <class T, int M>
NF4LORA_INLINE void begin_sums(const LowRank& low, int64_t n, Sums<M>& sums) {
  with_dtype(low.B.dtype, [&](auto tag) __attribute__((always_inline)) {
    using From = decltype(tag);
    const auto* row = static_cast<const typename From::Element*>(low.B.data) + n * low.B.stride;
    for (int64_t r = 0; r < low.R; r += kLanes) {
      typename From::Element padded[kLanes] = {};
      const bool whole = r + kLanes <= low.R;
      if (!whole) std::memcpy(padded, row + r, static_cast<size_t>(low.R - r) * sizeof padded[0]);
      const Float value = T::round(From::load(whole ? row + r : padded));
      NF4LORA_UNROLL
      for (int m = 0; m < M; ++m) sums[m][0] = fma(load(low.S + m * low.stride + r), value, sums[m][0]);
    }
  });
}

// Columns of x that stay near: a power of two, so that a piece begins with a block or lies within one.
constexpr int64_t span_for(int64_t bytes) {
  int64_t span = 128;
  while (2 * span * bytes <= kNear) span *= 2;
  return span;
}

// Blocks that columns lie in, from the first column of a block on.
NF4LORA_INLINE int64_t scales_in(int64_t columns, int64_t blocksize) { return (columns + blocksize - 1) / blocksize; }

// Rows of W are taken in groups, so that their sums are added up side by side, and each part of x is used for all of
// them while it is near.
template <class Math, int M>
static __attribute__((noinline)) void multiply_few(const Packed& W, int64_t begin, int64_t end, const void* x, int rows,
                                                   const LowRank& low, const float* bias, void* y, int64_t stride) {
  using T = typename Math::Tag;
  constexpr int kSums = sums_for(M);
  constexpr int64_t kMostRows = M > 8 ? kTogether / 2 : kTogether;  // their sums must stay near as well
  constexpr int64_t kSpan = span_for(M * Math::kBytes);
  const int64_t blocks = W.K / W.blocksize;
  const bool nested = W.scales.absmax == nullptr;
  const int64_t far = kFetch / (smaller(kSpan, W.K) / 2 + 1) + 1;  // pieces
  float room[2][kSpan / kMinBlocksize];                            // scales in use, and those that follow
  int turn = 0;
  if (nested && begin < end)
    read_scales(W.scales, begin * blocks, scales_in(smaller(kSpan, W.K), W.blocksize), room[0]);
  Float sums_of[M][kMostRows];
  for (int64_t first = begin; first < end; first += kMostRows) {
    const int64_t count = smaller(kMostRows, end - first);
    for (int64_t k = 0; k == 0 || k < W.K; k += kSpan) {
      for (int64_t i = 0; i < count; ++i) {
        // After this piece of a row: the same piece of the next, the next piece of the first, or the next group.
        int64_t next = first + i + 1, next_k = k;
        if (i + 1 == count) {
          next_k = k + kSpan < W.K ? k + kSpan : 0;
          next = next_k ? first : first + count;
        }
        const int64_t own = (first + i) * blocks + k / W.blocksize, its = next * blocks + next_k / W.blocksize;
        const int64_t its_count = nested && next < end ? scales_in(smaller(kSpan, W.K - next_k), W.blocksize) : 0;
        // Pieces are read in this order: what is `far` of them ahead lies in this group, or at the start of the next.
        const int64_t later = i + far, later_k = k + later / count * kSpan;
        const bool within = later_k < W.K;
        const uint8_t* bytes =
            W.qweight + ((first + (within ? later % count : later)) * W.K + (within ? later_k : 0)) / 2;
        Ahead ahead{bytes, W.scales.absmax_q + its, room[1 - turn], its_count, 0};
        Sums<M> sums;
        NF4LORA_UNROLL
        for (int m = 0; m < M; ++m) {
          NF4LORA_UNROLL
          for (int j = 0; j < kSums; ++j) sums[m][j] = broadcast(0.0f);
          if (k) sums[m][0] = sums_of[m][i];
        }
        if (k == 0 && low.R) begin_sums<T, M>(low, first + i, sums);
        Math::template multiply_row<M>(W, first + i, x, k, smaller(kSpan, W.K - k),
                                       nested ? room[turn] : W.scales.absmax + own, ahead, sums);
        NF4LORA_UNROLL
        for (int m = 0; m < M; ++m) {
          Float total = sums[m][0];
          for (int j = 1; j < kSums; ++j) total = add(total, sums[m][j]);
          sums_of[m][i] = total;
        }
        if (!nested) continue;
        while (ahead.done < its_count) ahead.look_up(1);
        apply_nested(W.scales, its, its_count, room[1 - turn]);
        turn = 1 - turn;
      }
    }
    for (int m = 0; m < rows; ++m) {
      float values[kMostRows];
      sum_lanes(sums_of[m], static_cast<int>(count), values);
      for (int64_t i = 0; bias && i < count; ++i) values[i] += bias[first + i];
      narrow<T>(values, broadcast(1.0f), count, static_cast<typename T::Element*>(y) + m * stride + first);
    }
  }
}

// How many rows a product is compiled for that is asked for `rows`: the rest are zeros.
constexpr int padded_rows(int rows) { return rows <= 4 ? rows : rows <= 6 ? 6 : rows <= 8 ? 8 : rows <= 12 ? 12 : 16; }

template <class Math>
static int64_t size_few(int rows, int64_t K) {
  return padded_rows(rows) * (K + 128) * Math::kBytes;
}

template <class Math>
static void prepare_few(const Dense& x, int64_t row, int rows, int64_t K, void* out) {
  const int M = padded_rows(rows);
  if (M > rows) std::memset(out, 0, static_cast<size_t>(size_few<Math>(rows, K)));
  Math::prepare(x, row, rows, M, K, out);
}

template <class Math>
static void multiply_few_rows(const Packed& W, int64_t begin, int64_t end, const void* x, int rows, const LowRank& low,
                              const float* bias, void* y, int64_t stride) {
  switch (padded_rows(rows)) {
    case 1: return multiply_few<Math, 1>(W, begin, end, x, rows, low, bias, y, stride);
    case 2: return multiply_few<Math, 2>(W, begin, end, x, rows, low, bias, y, stride);
    case 3: return multiply_few<Math, 3>(W, begin, end, x, rows, low, bias, y, stride);
    case 4: return multiply_few<Math, 4>(W, begin, end, x, rows, low, bias, y, stride);
  }
  if constexpr (Math::kMost > 4) {
    switch (padded_rows(rows)) {
      case 6: return multiply_few<Math, 6>(W, begin, end, x, rows, low, bias, y, stride);
      case 8: return multiply_few<Math, 8>(W, begin, end, x, rows, low, bias, y, stride);
      case 12: return multiply_few<Math, 12>(W, begin, end, x, rows, low, bias, y, stride);
      case 16: return multiply_few<Math, 16>(W, begin, end, x, rows, low, bias, y, stride);
    }
  }
}

// S[m, r] = round(scale * sum over k of x[m, k] A[r, k]), k along the lanes.
template <class T>
static void low_rank(const Dense& x, int64_t rows, const Dense& A, int64_t begin, int64_t end, int64_t K, float scale,
                     void* S, int64_t stride) {
  constexpr int kRowsOfX = 4;
  with_dtype(A.dtype, [&](auto tag) __attribute__((always_inline)) {
    using From = decltype(tag);
    for (int64_t r = begin; r < end; ++r) {
      const auto* a = static_cast<const typename From::Element*>(A.data) + r * A.stride;
      for (int64_t m = 0; m < rows; m += kRowsOfX) {
        const typename T::Element* source[kRowsOfX];
        Float sums[kRowsOfX];
        for (int i = 0; i < kRowsOfX; ++i) {
          const int64_t row = smaller(m + i, rows - 1);
          source[i] = static_cast<const typename T::Element*>(x.data) + row * x.stride;
          sums[i] = broadcast(0.0f);
        }
        for (int64_t k = 0; k < K; k += kLanes) {  // K is a multiple of 32
          const Float value = T::round(From::load(a + k));
          NF4LORA_UNROLL
          for (int i = 0; i < kRowsOfX; ++i) sums[i] = fma(T::load(source[i] + k), value, sums[i]);
        }
        float values[kRowsOfX];
        sum_lanes(sums, kRowsOfX, values);
        for (int64_t i = 0; i < smaller(kRowsOfX, rows - m); ++i) {
          narrow<T>(values + i, broadcast(scale), 1, static_cast<typename T::Element*>(S) + (m + i) * stride + r);
        }
      }
    }
  });
}

template <class Math>
inline constexpr Few kFew = {Math::kMost, size_few<Math>, prepare_few<Math>, multiply_few_rows<Math>,
                             low_rank<typename Math::Tag>};

}  // namespace nf4lora::NF4LORA_ISA
