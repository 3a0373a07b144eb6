// Products with few rows of x, a generated token's above all: every weight is read and decoded once, and multiplied
// while it is near. And what a backward pass of few rows multiplies besides.
#pragma once

#include "few_along.h"
#include "few_lanes.h"

namespace nf4lora::NF4LORA_ISA {

template <class Math>
NF4LORA_INLINE int64_t chunks_of(int64_t K) {
  return (K + Math::kColumns - 1) / Math::kColumns;
}

template <class Math>
static int64_t size_few(int rows, int64_t K) {
  return chunks_of<Math>(K) * (rows <= kMostAlong ? rows : kMostFewRows) * kChunkBytes;
}

// [chunk][row] for rows along k, [chunk][step][row] for rows in the lanes.
template <class Math>
static void prepare_few(const Dense& x, int rows, int64_t K, void* out) {
  using Element = typename Math::Tag::Element;
  auto* to = static_cast<uint8_t*>(out);
  for (int64_t k = 0; k < K; k += Math::kColumns) {
    alignas(64) uint32_t room[kMostFewRows][kSteps];
    for (int m = 0; m < rows; ++m) {
      const Element* source = static_cast<const Element*>(x.data) + m * x.stride + k;
      void* target = rows <= kMostAlong ? static_cast<void*>(to + m * kChunkBytes) : room[m];
      Math::prepare(source, smaller(K - k, Math::kColumns), target);
    }
    if (rows > kMostAlong) {
      std::memset(room[rows], 0, static_cast<size_t>(kMostFewRows - rows) * kChunkBytes);
      put_in_lanes(room, reinterpret_cast<uint32_t*>(to));
    }
    to += (rows <= kMostAlong ? rows : kMostFewRows) * kChunkBytes;
  }
}

template <class Math>
static void multiply_few(const Packed& W, int64_t begin, int64_t end, const void* prepared, int rows,
                         const LowRank& low, const float* bias, void* y, int64_t stride) {
  const auto* x = static_cast<const uint8_t*>(prepared);
  switch (rows) {
    case 1: return multiply_along<Math, 1>(W, begin, end, x, low, bias, y, stride);
    case 2: return multiply_along<Math, 2>(W, begin, end, x, low, bias, y, stride);
    case 3: return multiply_along<Math, 3>(W, begin, end, x, low, bias, y, stride);
    case 4: return multiply_along<Math, 4>(W, begin, end, x, low, bias, y, stride);
    case 5: return multiply_along<Math, 5>(W, begin, end, x, low, bias, y, stride);
    case 6: return multiply_along<Math, 6>(W, begin, end, x, low, bias, y, stride);
    case 7: return multiply_along<Math, 7>(W, begin, end, x, low, bias, y, stride);
    case 8: return multiply_along<Math, 8>(W, begin, end, x, low, bias, y, stride);
  }
  multiply_lanes<Math>(W, begin, end, x, rows, low, bias, y, stride);
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

template <class T>
static void round_values(const float* values, float scale, int64_t count, void* out) {
  narrow<T>(values, broadcast(scale), count, static_cast<typename T::Element*>(out));
}

template <class Math>
inline constexpr Few kFew = {kMostFewRows,
                             size_few<Math>,
                             prepare_few<Math>,
                             multiply_few<Math>,
                             low_rank<typename Math::Tag>,
                             combine<typename Math::Tag>,
                             round_values<typename Math::Tag>};

}  // namespace nf4lora::NF4LORA_ISA
