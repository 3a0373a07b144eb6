// AVX2 with FMA and F16C: eight lanes.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace nf4lora::NF4LORA_ISA::avx2 {

using namespace scalar;

inline constexpr int kLanes = 8;

// ---- floats

using Float = __m256;
using Mask = __m256;

NF4LORA_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
NF4LORA_INLINE void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
NF4LORA_INLINE void store_streamed(float* p, Float v) { _mm256_stream_ps(p, v); }
NF4LORA_INLINE void finish_streamed() { _mm_sfence(); }
NF4LORA_INLINE Float broadcast(float v) { return _mm256_set1_ps(v); }
NF4LORA_INLINE Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
NF4LORA_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
NF4LORA_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
NF4LORA_INLINE Float fused(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
NF4LORA_INLINE Float divide(Float a, Float b) { return _mm256_div_ps(a, b); }
NF4LORA_INLINE Float square_root(Float v) { return _mm256_sqrt_ps(v); }
NF4LORA_INLINE Float magnitude(Float v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
NF4LORA_INLINE Mask below(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
NF4LORA_INLINE Float select(Mask mask, Float yes, Float no) { return _mm256_blendv_ps(no, yes, mask); }
NF4LORA_INLINE int count(Mask mask) { return __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(mask))); }
NF4LORA_INLINE Float keep_bits(Float v, const uint32_t* bits) {
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits))));
}
NF4LORA_INLINE Float larger(Float a, Float b) { return _mm256_max_ps(a, b); }
NF4LORA_INLINE Float lesser(Float a, Float b) { return _mm256_min_ps(a, b); }
NF4LORA_INLINE float largest_lane(Float v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// ---- floats of 16 bits

NF4LORA_INLINE Float load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
NF4LORA_INLINE Float load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
NF4LORA_INLINE Float round_bf16(Float v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const Float nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  const Float chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
  return _mm256_and_ps(chosen, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
}
NF4LORA_INLINE Float round_f16(Float v) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
NF4LORA_INLINE void store_bf16(uint16_t* p, Float v) {
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(round_bf16(v)), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
NF4LORA_INLINE void store_f16(uint16_t* p, Float v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

NF4LORA_INLINE Float load_part(const float* p, int64_t count) { return load_first<kLanes>(load, p, count); }
NF4LORA_INLINE void store_part(float* p, Float v, int64_t count) { store_first<kLanes>(store, p, v, count); }
NF4LORA_INLINE void store_part_bf16(uint16_t* p, Float v, int64_t count) {
  store_first<kLanes>(store_bf16, p, v, count);
}
NF4LORA_INLINE void store_part_f16(uint16_t* p, Float v, int64_t count) { store_first<kLanes>(store_f16, p, v, count); }

// ---- bits in lanes

using Int = __m256i;

NF4LORA_INLINE Int no_bits() { return _mm256_setzero_si256(); }
NF4LORA_INLINE Int load_bits(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
NF4LORA_INLINE Int load_bits(const uint8_t* p, int64_t lanes) {
  const Int wanted =
      _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(lanes)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), wanted);
}
NF4LORA_INLINE Int shift_right(Int v, int bits) { return _mm256_srli_epi32(v, bits); }
NF4LORA_INLINE void transpose(Int v[kLanes]) {
  Int t[8];
  NF4LORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  NF4LORA_UNROLL
  for (int i = 0; i < 2; ++i) {
    v[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  NF4LORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x31);
  }
  NF4LORA_UNROLL
  for (int i = 0; i < 8; ++i) v[i] = t[i];
}
inline constexpr int kTransposed = 8;
NF4LORA_INLINE void transpose_words(const uint8_t* const rows[8], int valid, int64_t at, uint32_t* out, int stride) {
  __m256i v[8];
  NF4LORA_UNROLL
  for (int r = 0; r < 8; ++r) v[r] = r < valid ? load_bits(rows[r] + 4 * at) : no_bits();
  transpose(v);
  NF4LORA_UNROLL
  for (int i = 0; i < 8; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (at + i) * stride), v[i]);
}

// ---- encoding NF4

inline constexpr int kEncoded = kLanes;

template <class T>
NF4LORA_INLINE Int larger_magnitudes(const typename T::Element* weight, Int largest) {
  const Int bits = _mm256_castps_si256(T::load(weight));
  return _mm256_max_epu32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)), largest);
}
NF4LORA_INLINE uint32_t largest_lane(Int v) {
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}
// Four steps down the tree of thresholds, as in scalar.h.
NF4LORA_INLINE Int nearest_code(Float scaled) {
  const __m256 upper = load(kTree.value), leaves = load(kTree.value + 8);
  __m256i node = _mm256_set1_epi32(1);
  NF4LORA_UNROLL
  for (int depth = 0; depth < 4; ++depth) {
    const __m256 threshold = _mm256_permutevar8x32_ps(depth < 3 ? upper : leaves, node);  // reads bits 0 to 2
    const __m256i right = _mm256_castps_si256(_mm256_cmp_ps(scaled, threshold, _CMP_GT_OQ));
    node = _mm256_sub_epi32(_mm256_add_epi32(node, node), right);  // a true lane is -1
  }
  return node;
}
template <class T>
NF4LORA_INLINE void encode_weights(const typename T::Element* weight, Float inverse, uint8_t* qweight) {
  const Int node = nearest_code(multiply(T::load(weight), inverse));
  const __m256i first = _mm256_and_si256(_mm256_slli_epi64(node, 4), _mm256_set1_epi64x(0xF0));
  const __m256i second = _mm256_and_si256(_mm256_srli_epi64(node, 32), _mm256_set1_epi64x(0x0F));
  const __m256i bytes = _mm256_or_si256(first, second);  // the low byte of each 64 bits
  for (int i = 0; i < 2; ++i) {
    const __m128i half = i ? _mm256_extracti128_si256(bytes, 1) : _mm256_castsi256_si128(bytes);
    qweight[2 * i] = static_cast<uint8_t>(_mm_extract_epi8(half, 0));
    qweight[2 * i + 1] = static_cast<uint8_t>(_mm_extract_epi8(half, 8));
  }
}

// ---- decoding NF4

struct WeightTable {
  __m256 low, high;
};
template <class T>
NF4LORA_INLINE WeightTable weight_table(float absmax) {
  const Float scale = broadcast(absmax);
  return {T::round(multiply(load(kCodeTable.value), scale)), T::round(multiply(load(kCodeTable.value + 8), scale))};
}
// The codes stand in bits 0 to 3 of `codes`, above which anything may stand, and bit 3 as the sign of `choice`.
NF4LORA_INLINE Float look_up(const WeightTable& table, __m256i codes, __m256i choice) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, codes), _mm256_permutevar8x32_ps(table.high, codes),
                          _mm256_castsi256_ps(choice));
}
NF4LORA_INLINE Float decode_weights(const uint8_t* qweight, const WeightTable& table) {
  int32_t four;
  std::memcpy(&four, qweight, 4);
  const __m256i shift = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(four), shift);
  return look_up(table, codes, _mm256_slli_epi32(codes, 28));
}
NF4LORA_INLINE Float decode_lanes(Int codes, Float absmax) {
  const WeightTable table = {load(kCodeTable.value), load(kCodeTable.value + 8)};
  return multiply(look_up(table, codes, _mm256_slli_epi32(codes, 28)), absmax);
}

// The lower and the upper bytes of the 16 weights: of one scale in the lower lane, of the other in the upper.
struct ByteTables {
  __m256i low, high;

  NF4LORA_INLINE ByteTables of(float scale, float second_scale) {
    const __m256i first = bytes_of_weights(scale), second = bytes_of_weights(second_scale);
    return {_mm256_permute2x128_si256(first, second, 0x20), _mm256_permute2x128_si256(first, second, 0x31)};
  }

 private:
  // Lower bytes in the lower lane, upper bytes in the upper lane.
  NF4LORA_INLINE __m256i bytes_of_weights(float scale) {
    if (__builtin_expect(scale != scale, 0)) scale = __builtin_nanf("");  // adding to other NaNs might leave none
    const Float factor = broadcast(scale);
    // Codes 0-3 and 8-11, and the rest: packing works within lanes and puts them in order.
    const __m256 first = _mm256_setr_m128(_mm_load_ps(kCodeTable.value), _mm_load_ps(kCodeTable.value + 8));
    const __m256 second = _mm256_setr_m128(_mm_load_ps(kCodeTable.value + 4), _mm_load_ps(kCodeTable.value + 12));
    const __m256i words =
        _mm256_packus_epi32(upper_word(multiply(first, factor)), upper_word(multiply(second, factor)));
    const __m256i order = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                           0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(words, order), 0xD8);
  }
  // Rounded to bfloat16, in the lower half of each lane.
  NF4LORA_INLINE __m256i upper_word(Float v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF)), 16);
  }
};

template <class T>
struct Chunk {
  static constexpr bool kBytewise = __is_same(T, Bf16);

  static constexpr int column(int i) {
    const int part = i / kLanes, lane = i % kLanes;
    if (kBytewise) return 4 * (lane % 4) + 32 * (lane / 4) + 16 * (part / 2 % 2) + 2 * (part % 2) + 1 - part / 4;
    return 8 * lane + (part ^ 1);
  }

  template <bool kSmall, class Each>
  NF4LORA_INLINE void decode(const uint8_t* bytes, const float* scales, Each&& each) {
    const __m256i codes = load_bits(bytes);
    if constexpr (kBytewise) {
      // Both bytes of a weight are looked up, 32 weights at a time; a weight's float has them as its upper half.
      const ByteTables tables = ByteTables::of(scales[0], scales[kSmall ? 1 : 0]);
      NF4LORA_UNROLL
      for (int nibble = 0; nibble < 2; ++nibble) {
        const __m256i index = _mm256_and_si256(nibble ? _mm256_srli_epi16(codes, 4) : codes, _mm256_set1_epi8(15));
        const __m256i low = _mm256_shuffle_epi8(tables.low, index), high = _mm256_shuffle_epi8(tables.high, index);
        NF4LORA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const __m256i words = half ? _mm256_unpackhi_epi8(low, high) : _mm256_unpacklo_epi8(low, high);
          each(4 * nibble + 2 * half, _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)));
          each(4 * nibble + 2 * half + 1,
               _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xFFFF0000)))));
        }
      }
    } else {
      const WeightTable table = weight_table<T>(scales[0]), other = weight_table<T>(scales[kSmall ? 1 : 0]);
      NF4LORA_UNROLL
      for (int part = 0; part < 64 / kLanes; ++part) {
        const __m256i index = _mm256_srli_epi32(codes, 4 * part), choice = _mm256_slli_epi32(codes, 28 - 4 * part);
        const Float w = look_up(table, index, choice);
        each(part, kSmall ? _mm256_blend_ps(w, look_up(other, index, choice), 0xF0) : w);
      }
    }
  }
};

// ---- products

inline constexpr int kFewTileRows = 6;
inline constexpr int kFewTiles = 5;

}  // namespace nf4lora::NF4LORA_ISA::avx2
