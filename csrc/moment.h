// How the optimizer's 8-bit moments are searched: the maps of format.h by magnitude, with what lies between their values.
// No torch and no CUDA headers.
#pragma once

#include "format.h"

namespace nf4lora {

inline constexpr uint32_t kFirstBucket = (127 - 22) << 7;  // upper 16 bits of 2^-22
inline constexpr int kBuckets = 23 << 7;

// What a map holds from zero on, by position: value[k] for k = 0 ... top, and what lies half way to the next.
// The nearest position is `first` plus the number of thresholds below a magnitude. Magnitudes of the same exponent and 7
// bits of mantissa, from 2^-22 on, are a bucket. No bucket holds two thresholds, so one look-up and one addition find the
// nearest position.
struct Magnitudes {
  int first;  // of the smallest magnitudes: 0, or 1 where only zero itself is stored as zero
  int top;
  float value[257];
  float threshold[257];  // between k and k + 1; beyond the top nothing is reached
  // By the upper 16 bits of a magnitude, less kFirstBucket: what to add to its bits for the upper 16 of the sum to be the
  // position of the nearest. The lower 16 carry over where they are beyond those of the bucket's threshold.
  uint32_t bucket[kBuckets];
};

constexpr Magnitudes magnitudes(const NestedCode& code, int zero, int first) {
  Magnitudes table{};
  table.first = first;
  table.top = 255 - zero;
  for (int k = 1; k <= table.top; ++k) table.value[k] = code.value[zero + k];
  for (int k = first; k < table.top; ++k) table.threshold[k] = (table.value[k] + table.value[k + 1]) / 2;
  table.threshold[table.top] = 2.0f;
  int k = first;
  for (uint32_t i = 0; i < kBuckets; ++i) {  // smaller magnitudes belong to the first, which has no threshold
    const uint32_t threshold = __builtin_bit_cast(uint32_t, table.threshold[k]);
    const bool here = k < table.top && threshold >> 16 == kFirstBucket + i;
    const uint32_t to_carry = 0xFFFF - (here ? threshold & 0xFFFF : 0xFFFF);
    table.bucket[i] = (static_cast<uint32_t>(k) << 16) + to_carry - ((kFirstBucket + i) << 16);
    k += here;
    const bool second = k < table.top && __builtin_bit_cast(uint32_t, table.threshold[k]) >> 16 <= kFirstBucket + i;
    if (second) throw "a bucket with two thresholds";  // never compiled into anything: the tables are constants
  }
  return table;
}
constexpr Magnitudes signed_magnitudes() { return magnitudes(kNestedCode, kNestedZero, 0); }  // of exp_avg
constexpr Magnitudes unsigned_magnitudes() { return magnitudes(kSquareCode, 0, 1); }          // of exp_avg_sq

}  // namespace nf4lora
