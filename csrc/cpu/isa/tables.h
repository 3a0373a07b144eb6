// The maps of format.h and moment.h in the forms in which instruction sets look them up.
#pragma once

#include "../../moment.h"
#include "bits.h"

namespace nf4lora::NF4LORA_ISA {

// ---- the NF4 code

alignas(64) inline constexpr Code kCodeTable = kCode;
alignas(64) inline constexpr Code kTree = kThresholdTree;

// [-1, 1] in 32 equal parts, of which each holds one threshold between neighbouring codes or none: the codes below a
// part and one comparison give the nearest code.
struct Parts {
  uint32_t below[32];
  float threshold[32];
};
constexpr Parts parts() {
  Parts table{};
  for (int part = 0; part < 32; ++part) {
    const float low = (static_cast<float>(part) - 16) / 16, high = low + 0.0625f;
    table.threshold[part] = 2.0f;
    for (int code = 0; code < 15; ++code) {
      const float threshold = (kCode.value[code] + kCode.value[code + 1]) / 2;
      if (threshold < low) ++table.below[part];
      if (threshold >= low && threshold < high) table.threshold[part] = threshold;
    }
  }
  return table;
}
alignas(64) inline constexpr Parts kParts = parts();

// No part holds two thresholds, and none is so near to an end of its part that rounding could pick the wrong one.
constexpr bool parts_hold() {
  int found = 0;
  for (int part = 0; part < 32; ++part) {
    const float threshold = kParts.threshold[part];
    if (threshold == 2.0f) continue;
    ++found;
    const float above = threshold * 16 + 16 - static_cast<float>(part);
    if (above < 1e-3f || above > 1 - 1e-3f) return false;
  }
  return found == 15;
}
static_assert(parts_hold());

// ---- the maps of 8 bits: of scales and exp_avg, of exp_avg_sq, and what a code's exp_avg loses at least

alignas(64) inline constexpr NestedCode kNestedTable = kNestedCode;
alignas(64) inline constexpr NestedCode kDropTable = kMomentDrop;
alignas(64) inline constexpr Magnitudes kSigned = signed_magnitudes();
alignas(64) inline constexpr Magnitudes kUnsigned = unsigned_magnitudes();

// The floats of a map, cut into bytes or words that each have a table: out of 128 bytes a permutation of AVX512-VBMI looks
// up 64, out of 64 words one of AVX512-BW 32.
template <class Part>
struct Planes {
  Part part[4 / sizeof(Part)][256];
};
template <class Part>
constexpr Planes<Part> planes(const float* values) {
  Planes<Part> map{};
  for (int i = 0; i < 256; ++i) {
    const auto bits = __builtin_bit_cast(uint32_t, values[i]);
    for (size_t j = 0; j < 4 / sizeof(Part); ++j) map.part[j][i] = static_cast<Part>(bits >> 8 * sizeof(Part) * j);
  }
  return map;
}
alignas(64) inline constexpr auto kSignedBytes = planes<uint8_t>(kNestedCode.value);
alignas(64) inline constexpr auto kUnsignedBytes = planes<uint8_t>(kSquareCode.value);
alignas(64) inline constexpr auto kDropBytes = planes<uint8_t>(kMomentDrop.value);
alignas(64) inline constexpr auto kSignedWords = planes<uint16_t>(kNestedCode.value);

// ---- the nearest position in a map of moments

// The bits of a magnitude, as near as the buckets of Magnitudes reach.
inline constexpr int32_t kFirst = kFirstBucket;
NF4LORA_INLINE int32_t in_buckets(float x) {
  constexpr int32_t kLeast = kFirst << 16, kMost = __builtin_bit_cast(int32_t, 1.0f);
  const auto bits = static_cast<int32_t>(bits_of(x));
  return bits < kLeast ? kLeast : bits > kMost ? kMost : bits;  // NaN, of a state that was damaged, is above
}

// The position of the nearest value in closed form, and kFraction bits of what lies between positions. Between two
// powers of two lies at most one border of levels; with the vector's exponent, one more above such a border, come a
// level's line (slope * x + start, rounded down) and the middle of its last position.
inline constexpr int kFraction = 11;
struct Lines {
  float border[32];  // by exponent + 31: above it the next entry holds
  float slope[32];
  float start[32];
  int32_t last[32];
};
constexpr Lines lines(const Magnitudes& table, int parts_of_first) {
  Lines line{};
  float border[8] = {};  // border[i]: the threshold between levels i and i + 1. Level 0 is zero, 8 one.
  int first[9] = {};     // position of a level's first value
  border[0] = table.first == 0 ? table.threshold[0] : 0.0f;
  for (int level = 1, k = 1; level < 8; ++level) {
    first[level] = k;
    k += parts_of_first << (level - 1);
    border[level] = table.threshold[k - 1];
  }
  first[8] = table.top;
  constexpr float kOne = 1 << kFraction;
  int level = 0;
  for (int i = 0; i < 32; ++i) {
    float bottom = 1.0f;
    for (int exponent = i; exponent < 31; ++exponent) bottom /= 2;
    while (level < 8 && border[level] < bottom) ++level;  // the level of magnitudes just above `bottom`
    const float top = 2 * bottom;
    line.border[i] = level < 8 && border[level] < top ? border[level] : 4.0f;
    float power = 1.0f;
    for (int l = level; l < 7; ++l) power *= 10.0f;
    const auto parts = static_cast<float>(level ? parts_of_first << (level - 1) : 0);
    const bool flat = level == 0 || level == 8 || bottom < 0x1p-22f;  // one value is nearest to all
    line.slope[i] = flat ? 0.0f : power * parts / 0.9f * kOne;
    line.start[i] = (static_cast<float>(first[level]) + (flat ? 0.5f : -parts / 9.0f)) * kOne + 1.0f;
    line.last[i] = ((level < 8 ? first[level + 1] - 1 : table.top) << kFraction) + (1 << (kFraction - 1));
  }
  return line;
}
alignas(64) inline constexpr Lines kSignedLines = lines(kSigned, 1);
alignas(64) inline constexpr Lines kUnsignedLines = lines(kUnsigned, 2);

}  // namespace nf4lora::NF4LORA_ISA
