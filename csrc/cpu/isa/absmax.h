// Double quantisation of the scales: one in 64 of the weights, so what counts is to keep it off the critical path.
#pragma once

#include "simd.h"

namespace nf4lora::NF4LORA_ISA {

// The index of the nearest value of the map is the number of midpoints below a value. Values with the same sign,
// exponent and upper seven bits of mantissa share a bucket; none holds two midpoints, so the count at its lower end and
// one comparison give the index, where a search would take eight dependent steps.
struct NestedBuckets {
  static constexpr uint32_t kFirst = (127 - 22) << 7;  // 2^-22 is below the smallest midpoint, 2.75e-7
  static constexpr int kCount = 22 * 128 + 1;          // the last holds 1 alone
  uint8_t below[2][kCount];                            // by sign
  float midpoint[256];                                 // the last is never reached
};
constexpr NestedBuckets nested_buckets() {
  NestedBuckets table{};
  for (int i = 0; i < 255; ++i) table.midpoint[i] = (kNestedCode.value[i] + kNestedCode.value[i + 1]) / 2;
  table.midpoint[255] = 2.0f;
  int above = kNestedZero, under = kNestedZero;  // midpoints below a positive value, and below a negative one
  for (int i = 0; i < NestedBuckets::kCount; ++i) {
    const int exponent = i / 128 - 22;
    double low = 1.0 + (i % 128) / 128.0, high = 1.0 + (i % 128 + 1) / 128.0;
    for (int e = exponent; e < 0; ++e) low /= 2, high /= 2;
    if (i == 0) low = 0.0;  // smaller magnitudes belong to the first bucket
    while (above < 255 && table.midpoint[above] < low) ++above;
    while (under > 0 && table.midpoint[under - 1] > -high) --under;
    table.below[0][i] = static_cast<uint8_t>(above);
    table.below[1][i] = static_cast<uint8_t>(under);
  }
  return table;
}
alignas(64) inline constexpr NestedBuckets kNestedBuckets = nested_buckets();

NF4LORA_INLINE uint8_t nearest_nested(float value) {
  const uint32_t bits = bits_of(value), magnitude = (bits & 0x7FFFFFFF) >> 16;
  const uint32_t bucket = magnitude > NestedBuckets::kFirst ? magnitude - NestedBuckets::kFirst : 0;
  const uint8_t below = kNestedBuckets.below[bits >> 31][bucket];
  return static_cast<uint8_t>(below + (value > kNestedBuckets.midpoint[below]));
}

// Blocks [begin, end) of `count` scales: the largest distance from the offset, then the nearest values of the map.
static void absmax_quantize(const float* absmax, float offset, int64_t begin, int64_t end, int64_t count, float* nested,
                            uint8_t* absmax_q) {
  const KeepDenormals keep;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kNestedBlocksize, size = smaller(kNestedBlocksize, count - first);
    float values[kNestedBlocksize] = {};
    for (int64_t i = 0; i < size; ++i) values[i] = absmax[first + i] - offset;
    uint32_t largest = 0;
    for (int i = 0; i < kNestedBlocksize; ++i) {  // magnitudes compare as integers
      const uint32_t magnitude = bits_of(values[i]) & 0x7FFFFFFF;
      largest = magnitude > largest ? magnitude : largest;
    }
    const float scale = float_of(largest);
    nested[block] = scale;
    if (scale == 0.0f || !(scale <= __FLT_MAX__)) {  // what is not finite has no nearest value; the caller refuses it
      std::memset(absmax_q + first, kNestedZero, static_cast<size_t>(size));
      continue;
    }
    for (int i = 0; i < kNestedBlocksize; ++i) values[i] /= scale;
    for (int64_t i = 0; i < size; ++i) absmax_q[first + i] = nearest_nested(values[i]);
  }
}

// values = RN(RN(values * nested) + offset), for scales [begin, begin + count) of the flat weight. Two roundings each:
// this directory is compiled with -ffp-contract=off, so that no compiler fuses them into one.
static __attribute__((noinline)) void apply_nested(const Scales& scales, int64_t begin, int64_t count, float* values) {
  const int64_t end = begin + count;
  while (begin < end) {
    const int64_t block = begin / kNestedBlocksize, stop = smaller(end, (block + 1) * kNestedBlocksize);
    const Float scale = broadcast(scales.nested[block]), offset = broadcast(scales.offset);
    int64_t i = 0;
    for (; i + kLanes <= stop - begin; i += kLanes) store(values + i, add(multiply(load(values + i), scale), offset));
    for (; i < stop - begin; ++i) values[i] = values[i] * scales.nested[block] + scales.offset;
    values += stop - begin;
    begin = stop;
  }
}

// Scales [begin, begin + count) of the flat weight.
static __attribute__((noinline)) void read_scales(const Scales& scales, int64_t begin, int64_t count, float* out) {
  if (scales.absmax) {
    std::memcpy(out, scales.absmax + begin, static_cast<size_t>(count) * sizeof *out);
    return;
  }
  const uint8_t* codes = scales.absmax_q + begin;
  int64_t i = 0;
  for (; i + kLookedUp <= count; i += kLookedUp) look_up_nested(codes + i, out + i);
  if (i < count) {
    uint8_t last[kLookedUp] = {};
    float values[kLookedUp];
    std::memcpy(last, codes + i, static_cast<size_t>(count - i));
    look_up_nested(last, values);
    std::memcpy(out + i, values, static_cast<size_t>(count - i) * sizeof *out);
  }
  apply_nested(scales, begin, count, out);
}
NF4LORA_INLINE float read_scale(const Scales& scales, int64_t index) {
  if (scales.absmax) return scales.absmax[index];
  const auto block = static_cast<uint64_t>(index) / kNestedBlocksize;
  return kNestedTable.value[scales.absmax_q[index]] * scales.nested[block] + scales.offset;
}

static void absmax_dequantize(const Scales& scales, int64_t begin, int64_t end, float* absmax) {
  read_scales(scales, begin, end - begin, absmax + begin);
}

}  // namespace nf4lora::NF4LORA_ISA
