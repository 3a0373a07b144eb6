// The optimizer's moments in 8 bits: codes to floats and back. format.h says what the bytes mean.
//
// All here works on kMomentGroup values: an array of kMomentGroup / kLanes vectors, and as many codes in memory.
#pragma once

#include "../../moment.h"
#include "simd.h"

namespace nf4lora::NF4LORA_ISA {

alignas(64) inline constexpr Magnitudes kSigned = signed_magnitudes();
alignas(64) inline constexpr Magnitudes kUnsigned = unsigned_magnitudes();

// The bits of a magnitude, as near as the buckets of Magnitudes reach.
inline constexpr int32_t kFirst = kFirstBucket;
NF4LORA_INLINE int32_t in_buckets(float x) {
  constexpr int32_t kLeast = kFirst << 16, kMost = __builtin_bit_cast(int32_t, 1.0f);
  const auto bits = static_cast<int32_t>(bits_of(x));
  return bits < kLeast ? kLeast : bits > kMost ? kMost : bits;  // NaN, of a state that was damaged, is above
}

#if defined(__AVX512F__)

inline constexpr int kMomentGroup = 64;  // codes of one vector
inline constexpr int kMomentVectors = kMomentGroup / kLanes;

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

NF4LORA_INLINE Int of_32(const int32_t* table, Int index) {
  return _mm512_permutex2var_epi32(_mm512_load_si512(table), index, _mm512_load_si512(table + 16));
}
NF4LORA_INLINE Float of_32(const float* table, Int index) {
  return _mm512_permutex2var_ps(load(table), index, load(table + 16));
}

// x: |value| / absmax -> position of the nearest; of a value that is zero, 0.
NF4LORA_INLINE void nearest(const Magnitudes& table, const Lines& line, const Float* x, const Float* value, Int* k) {
  __mmask16 doubtful[kMomentVectors], any = 0;
  for (int i = 0; i < kMomentVectors; ++i) {
    Int at = _mm512_srli_epi32(_mm512_castps_si512(larger(x[i], broadcast(0x1p-31f))), 23);  // its lower 5 bits count
    const __mmask16 above = _mm512_cmp_ps_mask(x[i], of_32(line.border, at), _CMP_GT_OQ);
    at = _mm512_mask_add_epi32(at, above, at, _mm512_set1_epi32(1));
    Int position = _mm512_cvttps_epi32(fma(x[i], of_32(line.slope, at), of_32(line.start, at)));
    position = _mm512_min_epi32(position, of_32(line.last, at));
    const __mmask16 some = _mm512_test_epi32_mask(_mm512_castps_si512(value[i]), _mm512_set1_epi32(0x7FFFFFFF));
    k[i] = _mm512_maskz_srli_epi32(some, position, kFraction);
    // A line begins one too high, so that beside a whole number the fraction is 0 or 1: rounding may have decided there.
    doubtful[i] = _mm512_testn_epi32_mask(position, _mm512_set1_epi32((1 << kFraction) - 2));
    any |= doubtful[i];
  }
  if (__builtin_expect(any == 0, 1)) return;
  for (int i = 0; i < kMomentVectors; ++i) {
    alignas(64) int32_t lanes[kLanes];
    float magnitude[kLanes];
    _mm512_store_si512(lanes, k[i]);
    store(magnitude, x[i]);
    for (__mmask16 left = doubtful[i]; left; left &= static_cast<__mmask16>(left - 1)) {
      const int lane = __builtin_ctz(left);
      const int32_t bits = in_buckets(magnitude[lane]);
      lanes[lane] = (bits + static_cast<int32_t>(table.bucket[(bits >> 16) - kFirst])) >> 16;
    }
    k[i] = _mm512_load_si512(lanes);
  }
}

// Bytes: four times sixteen become sixteen times four, and those four times sixteen again.
NF4LORA_INLINE Int transposed(Int v) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
}

NF4LORA_INLINE void encode_signed(uint8_t* codes, const Float* value, const Float* x) {
  Int k[kMomentVectors];
  nearest(kSigned, kSignedLines, x, value, k);
  for (int i = 0; i < kMomentVectors; ++i) {
    const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(value[i]));
    k[i] = _mm512_mask_sub_epi32(k[i], negative, _mm512_setzero_si512(), k[i]);
  }
  const Int zero = _mm512_set1_epi16(kNestedZero);
  const Int low = _mm512_add_epi16(_mm512_packs_epi32(k[0], k[1]), zero);
  const Int high = _mm512_add_epi16(_mm512_packs_epi32(k[2], k[3]), zero);
  // The map has one value less below zero than above; saturation makes the last of what would be the one before.
  _mm512_storeu_si512(codes, transposed(_mm512_packus_epi16(low, high)));
}
NF4LORA_INLINE void encode_unsigned(uint8_t* codes, const Float* value, const Float* x) {
  Int k[kMomentVectors];
  nearest(kUnsigned, kUnsignedLines, x, value, k);
  const Int low = _mm512_packus_epi32(k[0], k[1]), high = _mm512_packus_epi32(k[2], k[3]);
  _mm512_storeu_si512(codes, transposed(_mm512_packus_epi16(low, high)));
}

#else  // loop by loop, so that the compiler makes vectors of all but the look-ups

inline constexpr int kMomentGroup = 128;  // 64 and 256 are slower
inline constexpr int kMomentVectors = kMomentGroup / kLanes;

NF4LORA_INLINE void nearest(const Magnitudes& table, const Float* x, const float* values, int32_t* k) {
  const auto* const magnitudes = reinterpret_cast<const float*>(x);
  int32_t bits[kMomentGroup], to_add[kMomentGroup];
  for (int i = 0; i < kMomentGroup; ++i) {
    bits[i] = in_buckets(magnitudes[i]);
    k[i] = (bits[i] >> 16) - kFirst;
  }
  for (int i = 0; i < kMomentGroup; ++i) to_add[i] = static_cast<int32_t>(table.bucket[k[i]]);
  for (int i = 0; i < kMomentGroup; ++i) k[i] = values[i] == 0.0f ? 0 : (to_add[i] + bits[i]) >> 16;
}
NF4LORA_INLINE void encode_signed(uint8_t* codes, const Float* value, const Float* x) {
  const auto* const values = reinterpret_cast<const float*>(value);
  int32_t k[kMomentGroup];
  nearest(kSigned, x, values, k);
  for (int i = 0; i < kMomentGroup; ++i) {
    const int32_t sign = static_cast<int32_t>(bits_of(values[i])) >> 31, moved = (k[i] ^ sign) - sign;
    codes[i] = static_cast<uint8_t>(kNestedZero + (moved > -kNestedZero ? moved : -kNestedZero));
  }
}
NF4LORA_INLINE void encode_unsigned(uint8_t* codes, const Float* value, const Float* x) {
  int32_t k[kMomentGroup];
  nearest(kUnsigned, x, reinterpret_cast<const float*>(value), k);
  for (int i = 0; i < kMomentGroup; ++i) codes[i] = static_cast<uint8_t>(k[i]);
}

#endif

#if defined(__AVX512VBMI__)

// The bytes of a map's values, by significance.
struct Planes {
  uint8_t byte[4][256];
};
constexpr Planes planes(const float* values) {
  Planes map{};
  for (int i = 0; i < 256; ++i) {
    const auto bits = __builtin_bit_cast(uint32_t, values[i]);
    for (int j = 0; j < 4; ++j) map.byte[j][i] = static_cast<uint8_t>(bits >> 8 * j);
  }
  return map;
}
alignas(64) inline constexpr Planes kSignedPlanes = planes(kNestedCode.value);
alignas(64) inline constexpr Planes kUnsignedPlanes = planes(kSquareCode.value);
alignas(64) inline constexpr Planes kDropPlanes = planes(kMomentDrop.value);

NF4LORA_INLINE Int byte_of(const uint8_t* table, Int code) {
  const Int low = _mm512_permutex2var_epi8(_mm512_load_si512(table), code, _mm512_load_si512(table + 64));
  const Int high = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), code, _mm512_load_si512(table + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high);
}
NF4LORA_INLINE void decode(const Planes& map, const uint8_t* codes, Float* value) {
  const Int code = transposed(_mm512_loadu_si512(codes));
  Int byte[4];
  for (int i = 0; i < 4; ++i) byte[i] = byte_of(map.byte[i], code);
  const Int low01 = _mm512_unpacklo_epi8(byte[0], byte[1]), high01 = _mm512_unpackhi_epi8(byte[0], byte[1]);
  const Int low23 = _mm512_unpacklo_epi8(byte[2], byte[3]), high23 = _mm512_unpackhi_epi8(byte[2], byte[3]);
  value[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low01, low23));
  value[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low01, low23));
  value[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high01, high23));
  value[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high01, high23));
}
NF4LORA_INLINE void decode_signed(const uint8_t* codes, Float* value) { decode(kSignedPlanes, codes, value); }
NF4LORA_INLINE void decode_drop(const uint8_t* codes, Float* drop) {  // of its bytes, two are zero
  const Int code = transposed(_mm512_loadu_si512(codes)), none = _mm512_setzero_si512();
  const Int low = _mm512_unpacklo_epi8(byte_of(kDropPlanes.byte[2], code), byte_of(kDropPlanes.byte[3], code));
  const Int high = _mm512_unpackhi_epi8(byte_of(kDropPlanes.byte[2], code), byte_of(kDropPlanes.byte[3], code));
  drop[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(none, low));
  drop[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(none, low));
  drop[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(none, high));
  drop[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(none, high));
}
NF4LORA_INLINE void decode_unsigned(const uint8_t* codes, Float* value) { decode(kUnsignedPlanes, codes, value); }

#elif defined(__AVX512F__)

alignas(64) inline constexpr NestedCode kDropTable = kMomentDrop;

NF4LORA_INLINE Float of_64(const float* table, Int index) {
  const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
  return _mm512_mask_blend_ps(upper, of_32(table, index), of_32(table + 32, index));
}
NF4LORA_INLINE Float of_128(const float* table, Int index) {
  const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
  return _mm512_mask_blend_ps(upper, of_64(table, index), of_64(table + 64, index));
}
NF4LORA_INLINE Int load_codes(const uint8_t* codes) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}
// magnitudes [129], of which the last is beyond of_128: it wraps to entry 0.
NF4LORA_INLINE void decode_with_sign(const float* magnitudes, const uint8_t* codes, Float* value) {
  for (int i = 0; i < kMomentVectors; ++i) {
    const Int distance = _mm512_sub_epi32(load_codes(codes + i * kLanes), _mm512_set1_epi32(kNestedZero));
    const Int k = _mm512_abs_epi32(distance);
    const __mmask16 one = _mm512_test_epi32_mask(k, _mm512_set1_epi32(128));
    const Float size = _mm512_mask_blend_ps(one, of_128(magnitudes, k), broadcast(magnitudes[128]));
    const Int sign = _mm512_and_epi32(distance, _mm512_set1_epi32(static_cast<int>(0x80000000)));
    value[i] = _mm512_castsi512_ps(_mm512_or_epi32(_mm512_castps_si512(size), sign));
  }
}
NF4LORA_INLINE void decode_signed(const uint8_t* codes, Float* value) { decode_with_sign(kSigned.value, codes, value); }
NF4LORA_INLINE void decode_drop(const uint8_t* codes, Float* drop) {
  decode_with_sign(kDropTable.value + kNestedZero, codes, drop);
}
NF4LORA_INLINE void decode_unsigned(const uint8_t* codes, Float* value) {
  for (int i = 0; i < kMomentVectors; ++i) {
    const Int k = load_codes(codes + i * kLanes);
    const __mmask16 upper = _mm512_test_epi32_mask(k, _mm512_set1_epi32(128));
    value[i] = _mm512_mask_blend_ps(upper, of_128(kUnsigned.value, k), of_128(kUnsigned.value + 128, k));
  }
}

#else

NF4LORA_INLINE void decode(const float* map, const uint8_t* codes, Float* value) {
  auto* const values = reinterpret_cast<float*>(value);
  for (int i = 0; i < kMomentGroup; ++i) values[i] = map[codes[i]];
}
alignas(64) inline constexpr NestedCode kDropTable = kMomentDrop;
NF4LORA_INLINE void decode_signed(const uint8_t* codes, Float* value) { decode(kNestedTable.value, codes, value); }
NF4LORA_INLINE void decode_drop(const uint8_t* codes, Float* drop) { decode(kDropTable.value, codes, drop); }
NF4LORA_INLINE void decode_unsigned(const uint8_t* codes, Float* value) { decode(kUnsigned.value, codes, value); }

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
