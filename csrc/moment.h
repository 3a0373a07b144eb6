// How the optimizer's 8-bit moments are searched: the maps of format.h by magnitude, with what lies between their values.
// No torch and no CUDA headers.
#pragma once

#include "format.h"

namespace nf4lora {

// What a map holds above zero, by position: value[k] for k = 1 ... top, and what lies half way to the next.
// Nearest is the number of thresholds below a magnitude, plus one. A bucket holds at most two of them (at the upper end
// of the finest level), so that `below` and two comparisons find it.
struct Magnitudes {
  int top;
  float value[257];
  float threshold[257];    // between k and k + 1; beyond the top nothing is reached
  uint8_t below[23 << 7];  // the least nearest among magnitudes of one exponent and 7 bits of mantissa, from 2^-22 on
};
inline constexpr uint32_t kFirstBucket = (127 - 22) << 7;  // upper 16 bits of 2^-22
inline constexpr int kBuckets = 23 << 7;

constexpr Magnitudes magnitudes(const NestedCode& code, int zero) {
  Magnitudes table{};
  table.top = 255 - zero;
  for (int k = 1; k <= table.top; ++k) table.value[k] = code.value[zero + k];
  for (int k = 1; k < table.top; ++k) table.threshold[k] = (table.value[k] + table.value[k + 1]) / 2;
  table.threshold[table.top] = 2.0f;
  int k = 1;
  for (int i = 0; i < 23 << 7; ++i) {
    double low = 1.0 + (i % 128) / 128.0;
    for (int exponent = i / 128; exponent < 22; ++exponent) low /= 2;
    if (i == 0) low = 0.0;  // smaller magnitudes belong to the first bucket
    while (table.threshold[k] < low && k < table.top) ++k;
    table.below[i] = static_cast<uint8_t>(k);
  }
  return table;
}

}  // namespace nf4lora
