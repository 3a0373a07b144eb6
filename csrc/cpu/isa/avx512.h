// AVX-512 with F, BW, VL and DQ: sixteen lanes, 32 registers, masks, and look-ups in tables of two registers.
#pragma once

#include "avx2.h"

namespace nf4lora::NF4LORA_ISA::avx512 {

using namespace avx2;

inline constexpr int kLanes = 16;
inline constexpr int kRegisters = 32;

// ---- floats

using Float = __m512;
using Mask = __mmask16;

NF4LORA_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
NF4LORA_INLINE void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
NF4LORA_INLINE void store_streamed(float* p, Float v) { _mm512_stream_ps(p, v); }
NF4LORA_INLINE Float broadcast(float v) { return _mm512_set1_ps(v); }
NF4LORA_INLINE Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
NF4LORA_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
NF4LORA_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
NF4LORA_INLINE Float fused(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
NF4LORA_INLINE Float divide(Float a, Float b) { return _mm512_div_ps(a, b); }
NF4LORA_INLINE Float square_root(Float v) { return _mm512_sqrt_ps(v); }
NF4LORA_INLINE Float magnitude(Float v) { return _mm512_abs_ps(v); }
NF4LORA_INLINE Mask below(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
NF4LORA_INLINE Float select(Mask mask, Float yes, Float no) { return _mm512_mask_blend_ps(mask, no, yes); }
NF4LORA_INLINE int count(Mask mask) { return __builtin_popcount(mask); }
NF4LORA_INLINE Float keep_bits(Float v, const uint32_t* bits) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_loadu_si512(bits)));
}
NF4LORA_INLINE Float larger(Float a, Float b) { return _mm512_max_ps(a, b); }
NF4LORA_INLINE Float lesser(Float a, Float b) { return _mm512_min_ps(a, b); }
NF4LORA_INLINE float largest_lane(Float v) { return _mm512_reduce_max_ps(v); }
NF4LORA_INLINE void sum_lanes(const Float* v, int64_t stride, int count, float* out) {
  int i = 0;
  for (; i + 4 <= count; i += 4, v += 4 * stride) {
    const __m512 v0 = v[0], v1 = v[stride], v2 = v[2 * stride], v3 = v[3 * stride];
    const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(v0, v1, 0x44), _mm512_shuffle_f32x4(v0, v1, 0xEE));
    const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(v2, v3, 0x44), _mm512_shuffle_f32x4(v2, v3, 0xEE));
    __m512 sum = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xB1));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4E));
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    _mm_storeu_ps(out + i, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, sum)));
  }
  for (; i < count; ++i, v += stride) {
    __m512 sum = _mm512_add_ps(*v, _mm512_shuffle_f32x4(*v, *v, 0x4E));
    sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0xB1));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xB1));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4E));
    out[i] = _mm512_cvtss_f32(sum);
  }
}

// ---- floats of 16 bits

NF4LORA_INLINE Float load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
NF4LORA_INLINE Float load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
NF4LORA_INLINE Float round_bf16(Float v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x00400000));
  return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
}
NF4LORA_INLINE Float round_f16(Float v) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
NF4LORA_INLINE __m256i to_words_bf16(Float v) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(round_bf16(v)), 16));
}
NF4LORA_INLINE __m256i to_words_f16(Float v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
NF4LORA_INLINE void store_bf16(uint16_t* p, Float v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_words_bf16(v));
}
NF4LORA_INLINE void store_f16(uint16_t* p, Float v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_words_f16(v));
}

NF4LORA_INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
NF4LORA_INLINE Float load_part(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
NF4LORA_INLINE void store_part(float* p, Float v, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), v); }
NF4LORA_INLINE void store_part_bf16(uint16_t* p, Float v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), to_words_bf16(v));
}
NF4LORA_INLINE void store_part_f16(uint16_t* p, Float v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), to_words_f16(v));
}

// ---- bits in lanes

using Int = __m512i;

NF4LORA_INLINE Int no_bits() { return _mm512_setzero_si512(); }
NF4LORA_INLINE Int load_bits(const uint8_t* p) { return _mm512_loadu_si512(p); }
NF4LORA_INLINE Int load_bits(const uint8_t* p, int64_t lanes) {
  return _mm512_maskz_loadu_epi32(first_lanes(lanes), p);
}
NF4LORA_INLINE Int shift_right(Int v, int bits) { return _mm512_srli_epi32(v, static_cast<unsigned>(bits)); }
NF4LORA_INLINE void transpose(Int v[kLanes]) {
  Int t[kLanes];
  NF4LORA_UNROLL
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  NF4LORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  NF4LORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xDD);
  }
  NF4LORA_UNROLL
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
  }
}

// ---- encoding NF4, 32 weights in two vectors: those of even k and those of odd k

inline constexpr int kEncoded = 2 * kLanes;

template <class T>
NF4LORA_INLINE void load_pairs(const typename T::Element* p, Float& even, Float& odd) {
  if constexpr (__is_same(T, Bf16)) {
    const __m512i words = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
  } else {
    const Float first = T::load(p), second = T::load(p + kLanes);
    const __m512i twos = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even = _mm512_permutex2var_ps(first, twos, second);
    odd = _mm512_permutex2var_ps(first, _mm512_add_epi32(twos, _mm512_set1_epi32(1)), second);
  }
}
NF4LORA_INLINE Int larger_magnitude(Float v, Int largest) {
  return _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF)), largest);
}
template <class T>
NF4LORA_INLINE Int larger_magnitudes(const typename T::Element* weight, Int largest) {
  Float even, odd;
  load_pairs<T>(weight, even, odd);
  return larger_magnitude(odd, larger_magnitude(even, largest));
}
NF4LORA_INLINE uint32_t largest_lane(Int v) { return _mm512_reduce_max_epu32(v); }
NF4LORA_INLINE Int nearest_code(Float scaled) {
  const __m512 place = _mm512_fmadd_ps(scaled, _mm512_set1_ps(16.0f), _mm512_set1_ps(16.0f));
  const __m512i part = _mm512_min_epi32(_mm512_cvttps_epi32(place), _mm512_set1_epi32(31));
  const __m512i below =
      _mm512_permutex2var_epi32(_mm512_load_si512(kParts.below), part, _mm512_load_si512(kParts.below + 16));
  const __m512 threshold = _mm512_permutex2var_ps(load(kParts.threshold), part, load(kParts.threshold + 16));
  return _mm512_mask_add_epi32(below, _mm512_cmp_ps_mask(scaled, threshold, _CMP_GT_OQ), below, _mm512_set1_epi32(1));
}
template <class T>
NF4LORA_INLINE void encode_weights(const typename T::Element* weight, Float inverse, uint8_t* qweight) {
  Float even, odd;
  load_pairs<T>(weight, even, odd);
  const Int first = nearest_code(multiply(even, inverse)), second = nearest_code(multiply(odd, inverse));
  const Int bytes = _mm512_or_si512(_mm512_slli_epi32(first, 4), second);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(qweight), _mm512_cvtepi32_epi8(bytes));
}

// ---- decoding NF4

struct WeightTable {
  __m512 value;
};
template <class T>
NF4LORA_INLINE WeightTable weight_table(float absmax) {
  return {T::round(multiply(load(kCodeTable.value), broadcast(absmax)))};
}
NF4LORA_INLINE Float decode_weights(const uint8_t* qweight, const WeightTable& table) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(qweight));
  const __m128i codes = _mm_unpacklo_epi8(_mm_srli_epi16(bytes, 4), bytes);  // vpermps ignores the bits above 3
  return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), table.value);
}
NF4LORA_INLINE Float decode_lanes(Int codes, Float absmax) {
  return multiply(_mm512_permutexvar_ps(codes, load(kCodeTable.value)), absmax);
}

// 16 words, twice, so that bit 4 of an index does not matter.
template <class T>
struct WordTable {
  static constexpr bool kExists = sizeof(typename T::Element) == 2;
  static constexpr int kWeights = 32;
  __m512i words;

  NF4LORA_INLINE WordTable of(float absmax) {
    const Float product = multiply(load(kCodeTable.value), broadcast(absmax));
    if constexpr (T::kHalf) return {_mm512_broadcast_i64x4(to_words_f16(product))};
    return {_mm512_broadcast_i64x4(to_words_bf16(product))};
  }
  // From 16 bytes: each byte four times, so that a word holds a nibble in its lower half, then one permute.
  __attribute__((always_inline)) void decode(const uint8_t* qweight, bool streamed, uint16_t* out) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(qweight));
    const __m512i four = _mm512_shuffle_epi8(
        _mm512_broadcast_i32x4(bytes),
        _mm512_set_epi32(0x0F0F0F0F, 0x0E0E0E0E, 0x0D0D0D0D, 0x0C0C0C0C, 0x0B0B0B0B, 0x0A0A0A0A, 0x09090909, 0x08080808,
                         0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0));
    const __m512i weights = _mm512_permutexvar_epi16(_mm512_srlv_epi16(four, _mm512_set1_epi32(4)), words);
    if (streamed) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out), weights);
    } else {
      _mm512_storeu_si512(out, weights);
    }
  }
};

template <class T>
struct Chunk {
  static constexpr int column(int i) {
    const int part = i / kLanes, lane = i % kLanes;
    return 8 * (lane % 8) + ((part + (lane < 8 ? 0 : 4)) ^ 1);
  }

  // Eight dwords, twice: the lower lanes shift their first four nibbles down one by one, the upper ones the others.
  template <bool kSmall, class Each>
  NF4LORA_INLINE void decode(const uint8_t* bytes, const float* scales, Each&& each) {
    const __m512i codes = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(16), 1);
    const WeightTable table = weight_table<T>(scales[0]), other = kSmall ? weight_table<T>(scales[1]) : table;
    NF4LORA_UNROLL
    for (int part = 0; part < 64 / kLanes; ++part) {
      __m512i index = _mm512_srlv_epi32(codes, _mm512_add_epi32(upper, _mm512_set1_epi32(4 * part)));
      if constexpr (kSmall) {
        const __m512i second = _mm512_setr_epi32(0, 0, 0, 0, 16, 16, 16, 16, 0, 0, 0, 0, 16, 16, 16, 16);
        index = _mm512_ternarylogic_epi32(index, _mm512_set1_epi32(15), second, 0xEA);  // (a & b) | c
        each(part, _mm512_permutex2var_ps(table.value, index, other.value));
      } else {
        each(part, _mm512_permutexvar_ps(index, table.value));  // ignores the bits above 3
      }
    }
  }
};

// ---- products

inline constexpr int kFewTileRows = 16;
inline constexpr int kFewTiles = 2;

// ---- the map of scales

inline constexpr int kLookedUp = 32;
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
      const uint16_t* table = kSignedWords.part[h] + 64 * q;
      quarter[q] = _mm512_permutex2var_epi16(_mm512_load_si512(table), code, _mm512_load_si512(table + 32));
    }
    half[h] = _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, quarter[0], quarter[1]),
                                      _mm512_mask_blend_epi16(bit6, quarter[2], quarter[3]));
  }
  _mm512_storeu_si512(out, _mm512_unpacklo_epi16(half[0], half[1]));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi16(half[0], half[1]));
}

}  // namespace nf4lora::NF4LORA_ISA::avx512

#include "avx512_moment.h"
