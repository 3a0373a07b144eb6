// The part of avx512.h about the optimizer's 8-bit moments: 64 codes at a time, four vectors of floats.
//
// The instructions that pack dwords into words and words into bytes work within 128 bits, so that groups of four codes
// come out transposed; one permutation of dwords puts them in order. A letter is a group, | stands between 128 bits:
//
//   four vectors of dwords   a | b | c | d    e | f | g | h    i | j | k | l    m | n | o | p
//   packed twice, bytes      a e i m | b f j n | c g k o | d h l p
//   transposed, in memory    a b c d | e f g h | i j k l | m n o p
//
// The instructions that unpack work within 128 bits as well: the same permutation first, and what they make of it is
// four vectors in order (decode_map in avx512bf16.h).
#pragma once

namespace nf4lora::NF4LORA_ISA::avx512 {

inline constexpr int kMomentGroup = 64;
inline constexpr int kMomentVectors = kMomentGroup / kLanes;

NF4LORA_INLINE Int of_32(const int32_t* table, Int index) {
  return _mm512_permutex2var_epi32(_mm512_load_si512(table), index, _mm512_load_si512(table + 16));
}
NF4LORA_INLINE Float of_32(const float* table, Int index) {
  return _mm512_permutex2var_ps(load(table), index, load(table + 16));
}

// x: |value| / absmax -> position of the nearest; of a value that is zero, 0.
NF4LORA_INLINE void nearest_positions(const Magnitudes& table, const Lines& line, const Float* x, const Float* value,
                                      Int* k) {
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
NF4LORA_INLINE Int transpose_groups(Int v) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
}

NF4LORA_INLINE void encode_signed(uint8_t* codes, const Float* value, const Float* x) {
  Int k[kMomentVectors];
  nearest_positions(kSigned, kSignedLines, x, value, k);
  for (int i = 0; i < kMomentVectors; ++i) {
    const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(value[i]));
    k[i] = _mm512_mask_sub_epi32(k[i], negative, _mm512_setzero_si512(), k[i]);
  }
  const Int zero = _mm512_set1_epi16(kNestedZero);
  const Int low = _mm512_add_epi16(_mm512_packs_epi32(k[0], k[1]), zero);
  const Int high = _mm512_add_epi16(_mm512_packs_epi32(k[2], k[3]), zero);
  // The map has one value less below zero than above; saturation makes the last of what would be the one before.
  _mm512_storeu_si512(codes, transpose_groups(_mm512_packus_epi16(low, high)));
}
NF4LORA_INLINE void encode_unsigned(uint8_t* codes, const Float* value, const Float* x) {
  Int k[kMomentVectors];
  nearest_positions(kUnsigned, kUnsignedLines, x, value, k);
  const Int low = _mm512_packus_epi32(k[0], k[1]), high = _mm512_packus_epi32(k[2], k[3]);
  _mm512_storeu_si512(codes, transpose_groups(_mm512_packus_epi16(low, high)));
}

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

}  // namespace nf4lora::NF4LORA_ISA::avx512
