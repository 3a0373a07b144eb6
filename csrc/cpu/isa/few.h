// Products with few rows of x, a generated token's above all: every block of W is read once, and multiplied as it is
// decoded, k along the lanes. Bound by memory for one row of x, by the multiply-add rate for
// many; the packed weight is what is read.
#pragma once

#include "few_row.h"

namespace nf4lora::NF4LORA_ISA {

inline constexpr int64_t kFetch = 2048;     // bytes of W to prefetch before they are needed
inline constexpr int64_t kNear = 32 << 10;  // bytes of x that are used again while they are near: a first cache level
inline constexpr int kTogether = 16;        // rows of W
inline constexpr int kWidest = kLanes == 16 ? 8 : 4;  // rows of x whose sums registers hold

// out[i] = the sum of the lanes of v[i * stride], for i < count.
NF4LORA_INLINE void sum_lanes(const Float* v, int64_t stride, int count, float* out) {
#if defined(__AVX512F__)
  int i = 0;
  for (; i + 4 <= count; i += 4, v += 4 * stride) {
    const __m512 v0 = v[0], v1 = v[stride], v2 = v[2 * stride], v3 = v[3 * stride];
    const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(v0, v1, 0x44), _mm512_shuffle_f32x4(v0, v1, 0xEE));
    const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(v2, v3, 0x44), _mm512_shuffle_f32x4(v2, v3, 0xEE));
    __m512 sum = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xB1));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4E));
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    _mm_storeu_ps(out + i, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, sum)));
  }
  for (; i < count; ++i, v += stride) {
    __m512 sum = _mm512_add_ps(*v, _mm512_shuffle_f32x4(*v, *v, 0x4E));
    sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0xB1));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xB1));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4E));
    out[i] = _mm512_cvtss_f32(sum);
  }
#else
  for (int i = 0; i < count; ++i, v += stride) {
    float lanes[kLanes];
    store(lanes, *v);
    for (int width = kLanes / 2; width; width /= 2) {
      for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    out[i] = lanes[0];
  }
#endif
}

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

// Columns of x that stay near: a power of two, so that a piece begins with a block or lies within one.
constexpr int64_t span_for(int64_t bytes) {
  int64_t span = 128;
  while (2 * span * bytes <= kNear) span *= 2;
  return span;
}

// Blocks that columns lie in, from the first column of a block on.
NF4LORA_INLINE int64_t scales_in(int64_t columns, int64_t blocksize) { return (columns + blocksize - 1) / blocksize; }

// The rows of W are halved, and a pair has one of each half: either half is read line after line, which the processor's
// own prefetching follows; two neighbours it does not. They are taken in groups, so that their sums are added up side by
// side, and each part of x, M rows of it, is used for all of them while it is near.
template <class Math, int M>
static void multiply_parts(const Packed& W, int64_t begin, int64_t end, const void* x, int rows, const LowRank& low,
                           const float* bias, void* y, int64_t stride) {
  using T = typename Math::Tag;
  constexpr int64_t kSpan = span_for(M * Math::kBytes);
  const int parts = (rows + M - 1) / M, sums = parts * M;
  const int64_t part_bytes = M * (W.K + 128) * Math::kBytes;
  constexpr int64_t kPairs = kTogether / 2;
  const int64_t blocks = W.K / W.blocksize, half = (end - begin + 1) / kPair;
  const bool nested = W.scales.absmax == nullptr;
  float room[2][kPair][kSpan / kMinBlocksize];  // scales in use, and those that follow
  Float sums_of[kTogether * kMostFewRows];
  int turn = 0;
  // Row n of either half; past the end, the last one stands in, and its sums are not used.
  const auto row_of = [&](int64_t n, int r) { return smaller(begin + n + r * half, end - 1); };
  for (int r = 0; r < kPair && nested && begin < end; ++r) {
    read_scales(W.scales, row_of(0, r) * blocks, scales_in(smaller(kSpan, W.K), W.blocksize), room[0][r]);
  }
  for (int64_t first = 0; first < half; first += kPairs) {
    const int64_t count = smaller(kPairs, half - first);
    for (int r = 0; r < kPair; ++r) {
      for (int64_t i = 0; i < count; ++i)
        begin_sums<T>(low, row_of(first + i, r), sums, sums_of + (r * kPairs + i) * sums);
    }
    for (int64_t k = 0; k < W.K; k += kSpan) {
      for (int64_t i = 0; i < count; ++i) {
        // After this piece of a pair: the same piece of the next, the next piece of the first, or the next group.
        int64_t next = first + i + 1, next_k = k;
        if (i + 1 == count && k + kSpan < W.K) next = first, next_k = k + kSpan;
        if (i + 1 == count && k + kSpan >= W.K) next_k = 0;
        // Pieces are read in this order: what is some of them ahead lies in this group, or at the start of the next.
        int64_t later = i + kFetch / (smaller(kSpan, W.K) / 2) + 1, later_k = k;
        for (; later >= count && later_k + kSpan < W.K; later_k += kSpan) later -= count;
        if (later >= count) later_k = 0;
        Piece piece;
        piece.count = smaller(kSpan, W.K - k);
        piece.blocksize = W.blocksize;
        piece.soon = nested && next < half ? scales_in(smaller(kSpan, W.K - next_k), W.blocksize) : 0;
        piece.done = 0;
        for (int r = 0; r < kPair; ++r) {
          const int64_t n = row_of(first + i, r), its_first = row_of(next, r) * blocks + next_k / W.blocksize;
          piece.bytes[r] = W.qweight + (n * W.K + k) / 2;
          piece.scales[r] = nested ? room[turn][r] : W.scales.absmax + n * blocks + k / W.blocksize;
          piece.later[r] = W.qweight + ((begin + first + later + r * half) * W.K + later_k) / 2;
          piece.codes[r] = W.scales.absmax_q + its_first;
          piece.values[r] = room[1 - turn][r];
        }
        Float* out = sums_of + i * sums;
        for (int part = 0; part < parts; ++part) {
          const void* rows_of_x = static_cast<const uint8_t*>(x) + part * part_bytes;
          Math::template multiply_piece<M>(piece, rows_of_x, k, W.K, out + part * M, kPairs * sums);
        }
        if (!piece.soon) continue;
        while (piece.done < piece.soon) piece.look_up(1);
        for (int r = 0; r < kPair; ++r) {
          apply_nested(W.scales, row_of(next, r) * blocks + next_k / W.blocksize, piece.soon, room[1 - turn][r]);
        }
        turn = 1 - turn;
      }
    }
    for (int r = 0; r < kPair; ++r) {
      const int64_t n = begin + first + r * half, columns = smaller(count, end - n);
      for (int m = 0; m < rows && columns > 0; ++m) {
        float values[kTogether];
        sum_lanes(sums_of + r * kPairs * sums + m, sums, static_cast<int>(columns), values);
        for (int64_t i = 0; bias && i < columns; ++i) values[i] += bias[n + i];
        narrow<T>(values, broadcast(1.0f), columns, static_cast<typename T::Element*>(y) + m * stride + n);
      }
    }
  }
}

// Rows of x in a part: as few parts as possible, of equal size; 5, 7 are padded with zeros.
constexpr int part_for(int rows) {
  const int parts = (rows + kWidest - 1) / kWidest, part = (rows + parts - 1) / parts;
  return part <= 4 ? part : part <= 6 ? 6 : 8;
}

template <class Math>
static int64_t size_few(int rows, int64_t K) {
  const int part = part_for(rows);
  return (rows + part - 1) / part * part * (K + 128) * Math::kBytes;
}

template <class Math>
static void prepare_few(const Dense& x, int rows, int64_t K, void* out) {
  const int part = part_for(rows);
  if (rows % part) std::memset(out, 0, static_cast<size_t>(size_few<Math>(rows, K)));
  auto* to = static_cast<uint8_t*>(out);
  for (int first = 0; first < rows; first += part, to += part * (K + 128) * Math::kBytes) {
    Math::prepare(x, first, static_cast<int>(smaller(rows - first, part)), part, K, to);
  }
}

template <class Math>
static void multiply_few(const Packed& W, int64_t begin, int64_t end, const void* x, int rows, const LowRank& low,
                         const float* bias, void* y, int64_t stride) {
  switch (part_for(rows)) {
    case 1: return multiply_parts<Math, 1>(W, begin, end, x, rows, low, bias, y, stride);
    case 2: return multiply_parts<Math, 2>(W, begin, end, x, rows, low, bias, y, stride);
    case 3: return multiply_parts<Math, 3>(W, begin, end, x, rows, low, bias, y, stride);
    case 4: return multiply_parts<Math, 4>(W, begin, end, x, rows, low, bias, y, stride);
  }
  if constexpr (kWidest > 4) {
    if (part_for(rows) == 6) return multiply_parts<Math, 6>(W, begin, end, x, rows, low, bias, y, stride);
    return multiply_parts<Math, 8>(W, begin, end, x, rows, low, bias, y, stride);
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
          const Float value = load_as<T, From>(a + k);
          NF4LORA_UNROLL
          for (int i = 0; i < kRowsOfX; ++i) sums[i] = fma(T::load(source[i] + k), value, sums[i]);
        }
        float values[kRowsOfX];
        sum_lanes(sums, 1, kRowsOfX, values);
        for (int64_t i = 0; i < smaller(kRowsOfX, rows - m); ++i) {
          narrow<T>(values + i, broadcast(scale), 1, static_cast<typename T::Element*>(S) + (m + i) * stride + r);
        }
      }
    }
  });
}

template <class T, class From, class To, int kVectors>
NF4LORA_INLINE void combine_columns(const float* A, int64_t along, const typename From::Element* B, int64_t stride,
                                    int64_t depth, Float scale, typename To::Element* out) {
  Float sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = broadcast(0.0f);
  for (int64_t i = 0; i < depth; ++i, B += stride) {
    const Float a = broadcast(A[i * along]);
    for (int v = 0; v < kVectors; ++v) sums[v] = fma(a, load_as<T, From>(B + v * kLanes), sums[v]);
  }
  for (int v = 0; v < kVectors; ++v) To::store(out + v * kLanes, multiply(sums[v], scale));
}

// out[p, q] = scale * sum over i of A[i * along + p * across] B[i, q] for rows [begin, end), q along the lanes.
template <class T>
static void combine(const float* A, int64_t along, int64_t across, const Dense& B, int64_t begin, int64_t end,
                    int64_t depth, int64_t columns, float scale, const Dense& out) {
  constexpr int kWide = 4;
  const Float factor = broadcast(scale);
  with_dtype(B.dtype, [&](auto from) __attribute__((always_inline)) {
    with_dtype(out.dtype, [&](auto to) __attribute__((always_inline)) {
      using From = decltype(from);
      using To = decltype(to);
      const auto* source = static_cast<const typename From::Element*>(B.data);
      for (int64_t p = begin; p < end; ++p) {
        auto* row = static_cast<typename To::Element*>(const_cast<void*>(out.data)) + p * out.stride;
        const float* a = A + p * across;
        int64_t q = 0;
        for (; q + kWide * kLanes <= columns; q += kWide * kLanes)
          combine_columns<T, From, To, kWide>(a, along, source + q, B.stride, depth, factor, row + q);
        for (; q + kLanes <= columns; q += kLanes)
          combine_columns<T, From, To, 1>(a, along, source + q, B.stride, depth, factor, row + q);
        for (; q < columns; ++q) {
          float sum = 0.0f, value;
          for (int64_t i = 0; i < depth; ++i) {
            widen<From>(source + i * B.stride + q, 1, &value);
            sum += a[i * along] * rounded<T>(value);
          }
          narrow<To>(&sum, factor, 1, row + q);
        }
      }
    });
  });
}

template <class Math>
inline constexpr Few kFew = {Math::kMost,
                             size_few<Math>,
                             prepare_few<Math>,
                             multiply_few<Math>,
                             low_rank<typename Math::Tag>,
                             combine<typename Math::Tag>};

}  // namespace nf4lora::NF4LORA_ISA
