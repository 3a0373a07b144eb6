// The optimizer's moments in 8 bits: blocks of 256 values to floats and back. format.h says what the bytes mean.
#pragma once

#include "../../moment.h"
#include "simd.h"

namespace nf4lora::NF4LORA_ISA {

alignas(64) inline constexpr Magnitudes kSigned = magnitudes(kNestedCode, kNestedZero);
alignas(64) inline constexpr Magnitudes kUnsigned = magnitudes(kSquareCode, 0);

NF4LORA_INLINE int nearest(const Magnitudes& table, float x) {
  const uint32_t least = kFirstBucket << 16, bits = bits_of(x) > least ? bits_of(x) : least;
  return static_cast<int>((table.bucket[(bits >> 16) - kFirstBucket] + bits) >> 16);
}

#if defined(__AVX512F__)

// The position of the nearest value in closed form. Between two powers of two lies at most one border of levels; with
// the vector's exponent, one more above such a border, come a level's line (position = slope * x + start, rounded down)
// and its last position. Where a position is so near a whole number that rounding may have decided, `nearest` does.
struct Lines {
  float border[32];  // by exponent + 31: above it the next entry holds
  float slope[32];
  float start[32];
  int32_t last[32];
};
constexpr Lines lines(const Magnitudes& table, int parts_of_first) {
  Lines line{};
  float border[8] = {};  // border[i]: the threshold between levels i and i + 1; the last, between level 6 and one
  int first[8] = {};     // position of a level's first value
  for (int level = 0, k = 1; level < 7; ++level) {
    first[level] = k;
    k += parts_of_first << level;
    border[level] = table.threshold[k - 1];
  }
  first[7] = table.top;
  int level = 0;
  for (int i = 0; i < 32; ++i) {
    float bottom = 1.0f;
    for (int exponent = i; exponent < 31; ++exponent) bottom /= 2;
    while (level < 7 && border[level] < bottom) ++level;  // the level of magnitudes just above `bottom`
    const float top = 2 * bottom;
    line.border[i] = level < 7 && border[level] < top ? border[level] : 4.0f;
    float power = 1.0f;
    for (int l = level; l < 6; ++l) power *= 10.0f;
    const auto parts = static_cast<float>(parts_of_first << level);
    line.slope[i] = level < 7 ? power * parts / 0.9f : 0.0f;
    line.start[i] = level < 7 ? static_cast<float>(first[level]) - parts / 9.0f : static_cast<float>(first[7]) + 0.5f;
    line.last[i] = level < 7 ? first[level + 1] - 1 : table.top;
  }
  return line;
}
alignas(64) inline constexpr Lines kSignedLines = lines(kSigned, 1);
alignas(64) inline constexpr Lines kUnsignedLines = lines(kUnsigned, 2);

NF4LORA_INLINE Float of_32(const float* table, Int index) {
  return _mm512_permutex2var_ps(load(table), index, load(table + 16));
}
NF4LORA_INLINE Float of_64(const float* table, Int index) {
  const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
  return _mm512_mask_blend_ps(upper, of_32(table, index), of_32(table + 32, index));
}
NF4LORA_INLINE Float of_128(const float* table, Int index) {
  const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
  return _mm512_mask_blend_ps(upper, of_64(table, index), of_64(table + 64, index));
}

// Positions of magnitudes in [0, 1].
NF4LORA_INLINE Int nearest(const Magnitudes& table, const Lines& line, Float x) {
  Int at = _mm512_srli_epi32(_mm512_castps_si512(x), 23);
  at = _mm512_max_epi32(_mm512_sub_epi32(at, _mm512_set1_epi32(127 - 31)), _mm512_setzero_si512());
  const __mmask16 above = _mm512_cmp_ps_mask(x, of_32(line.border, at), _CMP_GT_OQ);
  at = _mm512_mask_add_epi32(at, above, at, _mm512_set1_epi32(1));
  const Float position = fma(x, of_32(line.slope, at), of_32(line.start, at));
  const Int last = _mm512_permutex2var_epi32(_mm512_load_si512(line.last), at, _mm512_load_si512(line.last + 16));
  Int k = _mm512_min_epi32(_mm512_max_epi32(_mm512_cvttps_epi32(position), _mm512_set1_epi32(1)), last);
  const Float distance = magnitude(_mm512_sub_ps(position, _mm512_roundscale_ps(position, 0)));
  __mmask16 doubtful = _mm512_cmp_ps_mask(distance, broadcast(0x1p-11f), _CMP_LT_OQ);
  doubtful &= _mm512_cmplt_epi32_mask(_mm512_setzero_si512(), at);  // the first line is flat
  if (__builtin_expect(doubtful != 0, 0)) {
    alignas(64) int32_t lanes[kLanes];
    float values[kLanes];
    _mm512_store_si512(lanes, k);
    store(values, x);
    for (; doubtful; doubtful &= static_cast<__mmask16>(doubtful - 1)) {
      const int lane = __builtin_ctz(doubtful);
      lanes[lane] = nearest(table, values[lane]);
    }
    k = _mm512_load_si512(lanes);
  }
  return k;
}

NF4LORA_INLINE Int load_codes(const uint8_t* codes) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}
NF4LORA_INLINE void store_codes(uint8_t* codes, Int code) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(code));
}

NF4LORA_INLINE Float decode_signed(const uint8_t* codes) {
  const Int distance = _mm512_sub_epi32(load_codes(codes), _mm512_set1_epi32(kNestedZero));
  const Int k = _mm512_abs_epi32(distance);
  // Of 128 and more only the one is left; it wraps to entry 0.
  const Float value = _mm512_mask_blend_ps(_mm512_test_epi32_mask(k, _mm512_set1_epi32(128)), of_128(kSigned.value, k),
                                           broadcast(1.0f));
  const Int sign = _mm512_and_epi32(distance, _mm512_set1_epi32(static_cast<int>(0x80000000)));
  return _mm512_castsi512_ps(_mm512_or_epi32(_mm512_castps_si512(value), sign));
}
NF4LORA_INLINE Float decode_unsigned(const uint8_t* codes) {
  const Int k = load_codes(codes);
  return _mm512_mask_blend_ps(_mm512_test_epi32_mask(k, _mm512_set1_epi32(128)), of_128(kUnsigned.value, k),
                              of_128(kUnsigned.value + 128, k));
}
// value: what x = |value| / absmax came from.
NF4LORA_INLINE void encode_signed(uint8_t* codes, Float value, Float x) {
  const Int k = nearest(kSigned, kSignedLines, x), zero = _mm512_set1_epi32(kNestedZero);
  const __mmask16 negative = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_LT_OQ);
  const __mmask16 some = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NEQ_OQ);
  const Int moved = _mm512_mask_sub_epi32(_mm512_add_epi32(zero, k), negative, zero, _mm512_min_epi32(k, zero));
  store_codes(codes, _mm512_mask_blend_epi32(some, zero, moved));
}
NF4LORA_INLINE void encode_unsigned(uint8_t* codes, Float value, Float x) {
  const __mmask16 some = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NEQ_OQ);
  store_codes(codes, _mm512_maskz_mov_epi32(some, nearest(kUnsigned, kUnsignedLines, x)));
}

#else  // value by value

NF4LORA_INLINE Float decode_signed(const uint8_t* codes) {
  float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = kNestedTable.value[codes[i]];
  return load(values);
}
NF4LORA_INLINE Float decode_unsigned(const uint8_t* codes) {
  float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = kUnsigned.value[codes[i]];
  return load(values);
}
NF4LORA_INLINE void encode_signed(uint8_t* codes, Float value, Float x) {
  float values[kLanes], magnitudes[kLanes];
  store(values, value);
  store(magnitudes, x);
  for (int i = 0; i < kLanes; ++i) {
    const int k = nearest(kSigned, magnitudes[i]), down = k < kNestedZero ? k : kNestedZero;
    codes[i] = static_cast<uint8_t>(kNestedZero + (values[i] > 0.0f ? k : values[i] < 0.0f ? -down : 0));
  }
}
NF4LORA_INLINE void encode_unsigned(uint8_t* codes, Float value, Float x) {
  float values[kLanes], magnitudes[kLanes];
  store(values, value);
  store(magnitudes, x);
  for (int i = 0; i < kLanes; ++i) {
    codes[i] = static_cast<uint8_t>(values[i] != 0.0f ? nearest(kUnsigned, magnitudes[i]) : 0);
  }
}

#endif

// |value| / absmax, correctly rounded: by the inverse and what its product leaves (Markstein), where absmax allows it.
struct Quotient {
  Float absmax, inverse;
  bool divides;  // a subnormal inverse, an infinite one, or the mantissa for which the method is off by one

  NF4LORA_INLINE Quotient of(float absmax) {
    const uint32_t bits = bits_of(absmax);
    const bool divides = absmax < 0x1p-100f || absmax > 0x1p100f || (bits & 0x7FFFFF) == 0x7FFFFF;
    return {broadcast(absmax), broadcast(1.0f / absmax), divides};
  }
  __attribute__((always_inline)) Float operator()(Float value) const {
    const Float size = magnitude(value);
    if (__builtin_expect(divides, 0)) return divide(size, absmax);
    const Float q = multiply(size, inverse);
    return fused(fused(multiply(q, broadcast(-1.0f)), absmax, size), inverse, q);
  }
};

}  // namespace nf4lora::NF4LORA_ISA
