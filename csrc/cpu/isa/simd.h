// One vector of floats and what the loops do with it, for the instruction set that this file is compiled for.
//
// Everything lives in namespace NF4LORA_ISA and is forced inline: a function shared between two instruction sets
// under one name would let the linker keep the copy that the older processor cannot run. For the same reason no
// standard library template is used below this line. NEON and AMX would be further branches here.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../../format.h"
#include "loops.h"

#define NF4LORA_INLINE static inline __attribute__((always_inline))
#define NF4LORA_UNROLL _Pragma("GCC unroll 64")

namespace nf4lora::NF4LORA_ISA {

NF4LORA_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
NF4LORA_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
NF4LORA_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// While one lives, values below 2^-126 count on this thread, whatever torch.set_flush_denormal says: what packs a weight
// must give the same bytes everywhere.
class KeepDenormals {
#if defined(__SSE2__)
 public:
  KeepDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~(kFlushResults | kFlushOperands)); }
  ~KeepDenormals() { _mm_setcsr(before_); }
  KeepDenormals(const KeepDenormals&) = delete;

 private:
  static constexpr unsigned kFlushResults = 0x8000, kFlushOperands = 0x0040;
  unsigned before_;
#endif
};

// To bfloat16, nearest even, kept as float32. The carry of the addition would turn a NaN into an infinity or a zero.
NF4LORA_INLINE float to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return float_of((bits | 0x00400000) & 0xFFFF0000);
  return float_of((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000);
}

#if defined(__AVX2__)
// v[i] = element i of each, for eight vectors of eight 32-bit elements.
NF4LORA_INLINE void transpose8(__m256i v[8]) {
  __m256i t[8];
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
#endif

#if defined(__AVX512F__)

inline constexpr int kLanes = 16;
using Float = __m512;

NF4LORA_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
NF4LORA_INLINE void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
NF4LORA_INLINE Float broadcast(float v) { return _mm512_set1_ps(v); }
NF4LORA_INLINE Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
NF4LORA_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
NF4LORA_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
NF4LORA_INLINE Float fused(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
NF4LORA_INLINE Float divide(Float a, Float b) { return _mm512_div_ps(a, b); }
NF4LORA_INLINE Float square_root(Float v) { return _mm512_sqrt_ps(v); }
NF4LORA_INLINE Float magnitude(Float v) { return _mm512_abs_ps(v); }
NF4LORA_INLINE Float larger(Float a, Float b) { return _mm512_max_ps(a, b); }  // b where either is NaN
NF4LORA_INLINE Float lesser(Float a, Float b) { return _mm512_min_ps(a, b); }
using Mask = __mmask16;
NF4LORA_INLINE Mask below(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
NF4LORA_INLINE Float select(Mask mask, Float yes, Float no) { return _mm512_mask_blend_ps(mask, no, yes); }
NF4LORA_INLINE Float keep_bits(Float v, const uint32_t* bits) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_loadu_si512(bits)));
}
NF4LORA_INLINE int count(Mask mask) { return __builtin_popcount(mask); }
NF4LORA_INLINE float largest_lane(Float v) { return _mm512_reduce_max_ps(v); }

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
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh(v);  // results below 2^-126 become zeros
  return reinterpret_cast<const __m256i&>(rounded);
#else
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(round_bf16(v)), 16));
#endif
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

// The first lanes only; zeros in the rest of what is loaded.
NF4LORA_INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
NF4LORA_INLINE Float load_part(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
NF4LORA_INLINE void store_part(float* p, Float v, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), v); }
NF4LORA_INLINE void store_part_bf16(uint16_t* p, Float v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), to_words_bf16(v));
}
NF4LORA_INLINE void store_part_f16(uint16_t* p, Float v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), to_words_f16(v));
}

// Bits in lanes: packed codes on their way to an index.
using Int = __m512i;
NF4LORA_INLINE Int load_bits(const uint8_t* p) { return _mm512_loadu_si512(p); }
NF4LORA_INLINE Int load_bits(const uint8_t* p, int64_t lanes) {  // the first lanes; zeros in the rest
  return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << lanes) - 1), p);
}
NF4LORA_INLINE Int no_bits() { return _mm512_setzero_si512(); }
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

#elif defined(__AVX2__)

inline constexpr int kLanes = 8;
using Float = __m256;

NF4LORA_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
NF4LORA_INLINE void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
NF4LORA_INLINE Float broadcast(float v) { return _mm256_set1_ps(v); }
NF4LORA_INLINE Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
NF4LORA_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
NF4LORA_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
NF4LORA_INLINE Float fused(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
NF4LORA_INLINE Float divide(Float a, Float b) { return _mm256_div_ps(a, b); }
NF4LORA_INLINE Float square_root(Float v) { return _mm256_sqrt_ps(v); }
NF4LORA_INLINE Float magnitude(Float v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
NF4LORA_INLINE Float larger(Float a, Float b) { return _mm256_max_ps(a, b); }
NF4LORA_INLINE Float lesser(Float a, Float b) { return _mm256_min_ps(a, b); }
using Mask = __m256;
NF4LORA_INLINE Mask below(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
NF4LORA_INLINE Float select(Mask mask, Float yes, Float no) { return _mm256_blendv_ps(no, yes, mask); }
NF4LORA_INLINE Float keep_bits(Float v, const uint32_t* bits) {
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits))));
}
NF4LORA_INLINE int count(Mask mask) { return __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(mask))); }
NF4LORA_INLINE float largest_lane(Float v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

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

using Int = __m256i;
NF4LORA_INLINE Int load_bits(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
NF4LORA_INLINE Int load_bits(const uint8_t* p, int64_t lanes) {
  const Int wanted =
      _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(lanes)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), wanted);
}
NF4LORA_INLINE Int no_bits() { return _mm256_setzero_si256(); }
NF4LORA_INLINE Int shift_right(Int v, int bits) { return _mm256_srli_epi32(v, bits); }
NF4LORA_INLINE void transpose(Int v[kLanes]) { transpose8(v); }

#else  // any processor: four lanes that the compiler maps to what it has

inline constexpr int kLanes = 4;
typedef float Float __attribute__((vector_size(16)));

NF4LORA_INLINE Float load(const float* p) {
  Float v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
NF4LORA_INLINE void store(float* p, Float v) { std::memcpy(p, &v, sizeof v); }
NF4LORA_INLINE Float broadcast(float v) { return Float{v, v, v, v}; }
NF4LORA_INLINE Float multiply(Float a, Float b) { return a * b; }
NF4LORA_INLINE Float add(Float a, Float b) { return a + b; }
NF4LORA_INLINE Float fma(Float a, Float b, Float c) { return a * b + c; }
// One rounding, as the instruction of that name: for sums whose bits are defined. libm takes the instruction where the
// processor has it.
NF4LORA_INLINE Float fused(Float a, Float b, Float c) {
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return a;
}
NF4LORA_INLINE Float divide(Float a, Float b) { return a / b; }
NF4LORA_INLINE Float square_root(Float v) {
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
NF4LORA_INLINE Float magnitude(Float v) {
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_fabsf(v[i]);
  return v;
}
typedef int32_t Mask __attribute__((vector_size(16)));
NF4LORA_INLINE Mask below(Float a, Float b) { return a < b; }
NF4LORA_INLINE Float select(Mask mask, Float yes, Float no) {
  return reinterpret_cast<Float>((mask & reinterpret_cast<Mask>(yes)) | (~mask & reinterpret_cast<Mask>(no)));
}
NF4LORA_INLINE Float keep_bits(Float v, const uint32_t* bits) {
  Mask mask;
  std::memcpy(&mask, bits, sizeof mask);
  return reinterpret_cast<Float>(mask & reinterpret_cast<Mask>(v));
}
NF4LORA_INLINE Float larger(Float a, Float b) { return select(a > b, a, b); }
NF4LORA_INLINE Float lesser(Float a, Float b) { return select(a < b, a, b); }
NF4LORA_INLINE int count(Mask mask) { return -(mask[0] + mask[1] + mask[2] + mask[3]); }
NF4LORA_INLINE float largest_lane(Float v) {
  const float low = v[0] > v[1] ? v[0] : v[1], high = v[2] > v[3] ? v[2] : v[3];
  return low > high ? low : high;
}

typedef uint32_t Int __attribute__((vector_size(16)));
NF4LORA_INLINE Int no_bits() { return Int{0, 0, 0, 0}; }
NF4LORA_INLINE Int load_bits(const uint8_t* p, int64_t lanes) {
  Int v = no_bits();
  std::memcpy(&v, p, static_cast<size_t>(4 * lanes));
  return v;
}
NF4LORA_INLINE Int load_bits(const uint8_t* p) { return load_bits(p, kLanes); }
NF4LORA_INLINE Int shift_right(Int v, int bits) { return v >> static_cast<uint32_t>(bits); }
NF4LORA_INLINE void transpose(Int v[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const uint32_t kept = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = kept;
    }
  }
}

// IEEE binary16 without the instructions: exact one way, nearest even the other.
NF4LORA_INLINE float from_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7FFF;
  if (magnitude >= 0x7C00) return float_of(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  // Shifting the exponent field into place and multiplying by 2^112 also normalises the subnormals.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}
NF4LORA_INLINE uint16_t to_f16(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
  uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to 2^16 or beyond
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 puts the last half bit at the last float bit
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000));
  }
  magnitude += 0xFFF + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | ((magnitude >> 13) - (112 << 10)));
}

NF4LORA_INLINE Float load_bf16(const uint16_t* p) {
  Float v;
  for (int i = 0; i < kLanes; ++i) v[i] = float_of(static_cast<uint32_t>(p[i]) << 16);
  return v;
}
NF4LORA_INLINE Float load_f16(const uint16_t* p) {
  Float v;
  for (int i = 0; i < kLanes; ++i) v[i] = from_f16(p[i]);
  return v;
}
NF4LORA_INLINE Float round_bf16(Float v) {
  for (int i = 0; i < kLanes; ++i) v[i] = to_bf16(v[i]);
  return v;
}
NF4LORA_INLINE Float round_f16(Float v) {
  for (int i = 0; i < kLanes; ++i) v[i] = from_f16(to_f16(v[i]));
  return v;
}
NF4LORA_INLINE void store_bf16(uint16_t* p, Float v) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint16_t>(bits_of(to_bf16(v[i])) >> 16);
}
NF4LORA_INLINE void store_f16(uint16_t* p, Float v) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_f16(v[i]);
}

#endif

#if !defined(__AVX512F__)
NF4LORA_INLINE Float load_part(const float* p, int64_t count) {
  float lanes[kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof lanes[0]);
  return load(lanes);
}
NF4LORA_INLINE void store_part(float* p, Float v, int64_t count) {
  float lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof lanes[0]);
}
NF4LORA_INLINE void store_part_bf16(uint16_t* p, Float v, int64_t count) {
  uint16_t lanes[kLanes];
  store_bf16(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof lanes[0]);
}
NF4LORA_INLINE void store_part_f16(uint16_t* p, Float v, int64_t count) {
  uint16_t lanes[kLanes];
  store_f16(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof lanes[0]);
}
#endif

}  // namespace nf4lora::NF4LORA_ISA
