// Double quantisation of the scales: one in 64 of the weights, so what counts is to keep it off the critical path.
#pragma once

#include "simd.h"

namespace nf4lora::NF4LORA_ISA {

alignas(64) inline constexpr NestedCode kNestedTable = kNestedCode;

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

#if defined(__AVX512VBMI__)

// The bytes of the map's floats, each byte of them for itself: a permutation looks 64 of 128 bytes up.
struct NestedBytes {
  uint8_t value[4][256];
};
constexpr NestedBytes nested_bytes() {
  NestedBytes bytes{};
  for (int i = 0; i < 256; ++i) {
    const auto bits = __builtin_bit_cast(uint32_t, kNestedCode.value[i]);
    for (int b = 0; b < 4; ++b) bytes.value[b][i] = static_cast<uint8_t>(bits >> (8 * b));
  }
  return bytes;
}
alignas(64) inline constexpr NestedBytes kNestedBytes = nested_bytes();

inline constexpr int kLookedUp = 64;

// The map's values of 64 codes, without a load for each.
NF4LORA_INLINE void look_up_nested(const uint8_t* codes, float* out) {
  // Codes change places by fours, so that what the lanes of 128 bits make of them is in order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i code = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
  const __mmask64 upper = _mm512_movepi8_mask(code);
  __m512i byte[4];
  NF4LORA_UNROLL
  for (int b = 0; b < 4; ++b) {
    const uint8_t* table = kNestedBytes.value[b];
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(table), code, _mm512_load_si512(table + 64));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), code, _mm512_load_si512(table + 192));
    byte[b] = _mm512_mask_blend_epi8(upper, low, high);
  }
  NF4LORA_UNROLL
  for (int half = 0; half < 2; ++half) {
    const __m512i low = half ? _mm512_unpackhi_epi8(byte[0], byte[1]) : _mm512_unpacklo_epi8(byte[0], byte[1]);
    const __m512i high = half ? _mm512_unpackhi_epi8(byte[2], byte[3]) : _mm512_unpacklo_epi8(byte[2], byte[3]);
    _mm512_storeu_si512(out + 32 * half, _mm512_unpacklo_epi16(low, high));
    _mm512_storeu_si512(out + 32 * half + 16, _mm512_unpackhi_epi16(low, high));
  }
}

#elif defined(__AVX512BW__)

// The halves of the map's floats, each half for itself: a permutation looks 32 of 64 words up.
struct NestedHalves {
  uint16_t value[2][256];
};
constexpr NestedHalves nested_halves() {
  NestedHalves halves{};
  for (int i = 0; i < 256; ++i) {
    const auto bits = __builtin_bit_cast(uint32_t, kNestedCode.value[i]);
    for (int h = 0; h < 2; ++h) halves.value[h][i] = static_cast<uint16_t>(bits >> (16 * h));
  }
  return halves;
}
alignas(64) inline constexpr NestedHalves kNestedHalves = nested_halves();

inline constexpr int kLookedUp = 32;

// The map's values of 32 codes, without a load for each.
NF4LORA_INLINE void look_up_nested(const uint8_t* codes, float* out) {
  // Codes change places by fours, so that what the lanes of 128 bits make of them is in order.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i code = _mm512_permutexvar_epi64(
      order, _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))));
  const __mmask32 bit6 = _mm512_movepi16_mask(_mm512_slli_epi16(code, 9));
  const __mmask32 bit7 = _mm512_movepi16_mask(_mm512_slli_epi16(code, 8));
  __m512i half[2];
  NF4LORA_UNROLL
  for (int h = 0; h < 2; ++h) {
    __m512i quarter[4];
    NF4LORA_UNROLL
    for (int q = 0; q < 4; ++q) {
      const uint16_t* table = kNestedHalves.value[h] + 64 * q;
      quarter[q] = _mm512_permutex2var_epi16(_mm512_load_si512(table), code, _mm512_load_si512(table + 32));
    }
    half[h] = _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, quarter[0], quarter[1]),
                                      _mm512_mask_blend_epi16(bit6, quarter[2], quarter[3]));
  }
  _mm512_storeu_si512(out, _mm512_unpacklo_epi16(half[0], half[1]));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi16(half[0], half[1]));
}

#else

inline constexpr int kLookedUp = 1;

NF4LORA_INLINE void look_up_nested(const uint8_t* codes, float* out) {
  uint32_t code = *codes;
  asm("" : "+r"(code));  // or g++ would take vectors apart to look their lanes up, which is slower
  *out = kNestedTable.value[code];
}

#endif

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
