// The product of an A tile and a B panel (panel.h), with what comes before and after it while the sums are in registers.
// Bound by the multiply-add rate once A has a few dozen rows.
#pragma once

#include "panel.h"

namespace nf4lora::NF4LORA_ISA {

template <int kNumber>
struct Width {
  static constexpr int value = kNumber;
};

// BLIS' micro-kernel: kRows rows by kWidth vectors of sums, in registers from the first step to the last.
template <class Math, int kWidth>
NF4LORA_INLINE void micro_kernel(Float (&sum)[kRows][kWidth], const uint32_t* A, const float* B, int64_t steps) {
  for (int64_t s = 0; s < steps; ++s, A += kRows, B += kWidth * kLanes) {
    Float b[kWidth];
    NF4LORA_UNROLL
    for (int j = 0; j < kWidth; ++j) b[j] = load(B + j * kLanes);
    NF4LORA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      NF4LORA_UNROLL
      for (int j = 0; j < kWidth; ++j) sum[r][j] = Math::multiply_add(sum[r][j], A[r], b[j]);
    }
  }
}

// Not inlined: g++ 12 spills an accumulator inside the loop when it is.
template <class Math, int kWidth>
static __attribute__((noinline)) void begin_tile(const Start& start, const void* A, const void* B, int64_t steps,
                                                 float* sums) {
  Float sum[kRows][kWidth];
  NF4LORA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    NF4LORA_UNROLL
    for (int j = 0; j < kWidth; ++j) sum[r][j] = broadcast(0.0f);
  }
  if (start.steps) {
    micro_kernel<Math, kWidth>(sum, static_cast<const uint32_t*>(start.A), static_cast<const float*>(start.B),
                               start.steps);
    const Float scale = broadcast(start.scale);
    NF4LORA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      NF4LORA_UNROLL
      for (int j = 0; j < kWidth; ++j) sum[r][j] = multiply(sum[r][j], scale);
    }
    if (start.keep) {
      NF4LORA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        NF4LORA_UNROLL
        for (int j = 0; j < kWidth; ++j) sum[r][j] = keep_bits(sum[r][j], start.keep + (r * kWidth + j) * kLanes);
      }
    }
  }
  if (start.offset) {
    NF4LORA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      NF4LORA_UNROLL
      for (int j = 0; j < kWidth; ++j) sum[r][j] = add(sum[r][j], load(start.offset + j * kLanes));
    }
  }
  micro_kernel<Math, kWidth>(sum, static_cast<const uint32_t*>(A), static_cast<const float*>(B), steps);
  NF4LORA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    NF4LORA_UNROLL
    for (int j = 0; j < kWidth; ++j) store(sums + (r * kWidth + j) * kLanes, sum[r][j]);
  }
}

template <class Math, int kWidth>
static __attribute__((noinline)) void add_tile(const void* A, const void* B, int64_t steps, float* sums) {
  Float sum[kRows][kWidth];
  NF4LORA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    NF4LORA_UNROLL
    for (int j = 0; j < kWidth; ++j) sum[r][j] = load(sums + (r * kWidth + j) * kLanes);
  }
  micro_kernel<Math, kWidth>(sum, static_cast<const uint32_t*>(A), static_cast<const float*>(B), steps);
  NF4LORA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    NF4LORA_UNROLL
    for (int j = 0; j < kWidth; ++j) store(sums + (r * kWidth + j) * kLanes, sum[r][j]);
  }
}

// fn(number) for lanes / kLanes, as a constant.
template <class Fn>
NF4LORA_INLINE void with_width(int lanes, Fn&& fn) {
  switch (lanes / kLanes) {
    case 1: return fn(Width<1>{});
    case 2: return fn(Width<2>{});
    case 3:
      if constexpr (kVectors > 2) return fn(Width<3>{});
      break;
    case 4:
      if constexpr (kVectors > 2) return fn(Width<4>{});
      break;
  }
}

template <class Math>
static void begin_product(const Start& start, const void* A, const void* B, int64_t steps, int lanes, float* sums) {
  with_width(lanes, [&](auto width) { begin_tile<Math, width.value>(start, A, B, steps, sums); });
}

template <class Math>
static void add_product(const void* A, const void* B, int64_t steps, int lanes, float* sums) {
  with_width(lanes, [&](auto width) { add_tile<Math, width.value>(A, B, steps, sums); });
}

template <class Math>
static void finish(const Finish& finish, int lanes, const float* sums) {
  using T = typename Math::Tag;
  auto* out = static_cast<typename T::Element*>(finish.out);
  for (int64_t r = 0; r < finish.rows; ++r) {
    narrow<T>(sums + r * lanes, broadcast(finish.scale), finish.lanes, out + r * finish.stride);
  }
}

template <class Math>
inline constexpr Gemm kGemm = {
    Math::kStep,
    kRows,
    kLanes < kGroup ? kGroup : kLanes,  // panels are transposed in whole groups of rows
    kMaxLanes,
    pack_rows<Math>,
    pack_columns<Math>,
    panel_rows<Math>,
    panel_columns<Math>,
    panel_nf4_rows<Math>,
    panel_nf4_columns<Math>,
    begin_product<Math>,
    add_product<Math>,
    finish<Math>,
};

}  // namespace nf4lora::NF4LORA_ISA
