// Encoding NF4 in vectors: the largest magnitude of a block, then the nearest code of each weight over it.
#pragma once

#include "dtype.h"

namespace nf4lora::NF4LORA_ISA {

alignas(64) inline constexpr Code kTree = kThresholdTree;

// The largest magnitude, as bits: magnitudes compare as integers, where NaN and Inf are the largest of all.
#if defined(__AVX512F__)
NF4LORA_INLINE Int larger_magnitude(Float a, Int largest) {
  return _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7FFFFFFF)), largest);
}
NF4LORA_INLINE uint32_t largest_lane(Int v) { return _mm512_reduce_max_epu32(v); }
#elif defined(__AVX2__)
NF4LORA_INLINE Int larger_magnitude(Float a, Int largest) {
  return _mm256_max_epu32(_mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7FFFFFFF)), largest);
}
NF4LORA_INLINE uint32_t largest_lane(Int v) {
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}
#else
NF4LORA_INLINE Int larger_magnitude(Float a, Int largest) {
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t magnitude = bits_of(a[i]) & 0x7FFFFFFF;
    if (magnitude > largest[i]) largest[i] = magnitude;
  }
  return largest;
}
NF4LORA_INLINE uint32_t largest_lane(Int v) {
  uint32_t largest = v[0];
  for (int i = 1; i < kLanes; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}
#endif

// encode: the codes of a block, scaled by `inverse`, into qweight.
#if defined(__AVX512F__)

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

NF4LORA_INLINE __m512i nearest(Float scaled) {
  const __m512 place = _mm512_fmadd_ps(scaled, _mm512_set1_ps(16.0f), _mm512_set1_ps(16.0f));
  const __m512i part = _mm512_min_epi32(_mm512_cvttps_epi32(place), _mm512_set1_epi32(31));
  const __m512i below =
      _mm512_permutex2var_epi32(_mm512_load_si512(kParts.below), part, _mm512_load_si512(kParts.below + 16));
  const __m512 threshold = _mm512_permutex2var_ps(load(kParts.threshold), part, load(kParts.threshold + 16));
  return _mm512_mask_add_epi32(below, _mm512_cmp_ps_mask(scaled, threshold, _CMP_GT_OQ), below, _mm512_set1_epi32(1));
}

// 32 weights in two vectors, those of even k and those of odd k.
template <class T>
NF4LORA_INLINE void load_pairs(const typename T::Element* p, Float& even, Float& odd) {
  if constexpr (sizeof(*p) == 2 && !T::kHalf) {
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
template <class T>
NF4LORA_INLINE uint32_t largest_of(const typename T::Element* weight, int64_t count) {
  Int largest = no_bits();
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    Float even, odd;
    load_pairs<T>(weight + i, even, odd);
    largest = larger_magnitude(odd, larger_magnitude(even, largest));
  }
  return largest_lane(largest);
}
template <class T>
NF4LORA_INLINE void encode(const typename T::Element* weight, Float inverse, int64_t count, uint8_t* qweight) {
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    Float even, odd;
    load_pairs<T>(weight + i, even, odd);
    const __m512i first = nearest(multiply(even, inverse)), second = nearest(multiply(odd, inverse));
    const __m512i bytes = _mm512_or_si512(_mm512_slli_epi32(first, 4), second);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(qweight + i / 2), _mm512_cvtepi32_epi8(bytes));
  }
}

#else

// Index of the nearest code, in 32 bits per lane: four steps down the tree of thresholds. 16 is added to it, which is
// dropped when nibbles are packed.
#if defined(__AVX2__)
NF4LORA_INLINE Int nearest(Float scaled) {
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
NF4LORA_INLINE void store_codes(uint8_t* qweight, Int node) {
  const __m256i first = _mm256_and_si256(_mm256_slli_epi64(node, 4), _mm256_set1_epi64x(0xF0));
  const __m256i second = _mm256_and_si256(_mm256_srli_epi64(node, 32), _mm256_set1_epi64x(0x0F));
  const __m256i bytes = _mm256_or_si256(first, second);  // the low byte of each 64 bits
  for (int i = 0; i < 2; ++i) {
    const __m128i half = i ? _mm256_extracti128_si256(bytes, 1) : _mm256_castsi256_si128(bytes);
    qweight[2 * i] = static_cast<uint8_t>(_mm_extract_epi8(half, 0));
    qweight[2 * i + 1] = static_cast<uint8_t>(_mm_extract_epi8(half, 8));
  }
}
#else
NF4LORA_INLINE Int nearest(Float scaled) {
  Int node = Int{1, 1, 1, 1};
  for (int i = 0; i < kLanes; ++i) {
    for (int depth = 0; depth < 4; ++depth) node[i] = 2 * node[i] + (scaled[i] > kTree.value[node[i]] ? 1 : 0);
  }
  return node;
}
NF4LORA_INLINE void store_codes(uint8_t* qweight, Int node) {
  for (int i = 0; i < kLanes; i += 2) {
    qweight[i / 2] = pack(static_cast<uint8_t>(node[i] & 15), static_cast<uint8_t>(node[i + 1] & 15));
  }
}
#endif

template <class T>
NF4LORA_INLINE uint32_t largest_of(const typename T::Element* weight, int64_t count) {
  Int largest = no_bits();
  for (int64_t i = 0; i < count; i += kLanes) largest = larger_magnitude(T::load(weight + i), largest);
  return largest_lane(largest);
}
template <class T>
NF4LORA_INLINE void encode(const typename T::Element* weight, Float inverse, int64_t count, uint8_t* qweight) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store_codes(qweight + i / 2, nearest(multiply(T::load(weight + i), inverse)));
  }
}

#endif

inline constexpr float kMostInverse = 1.0f / kMinAbsmax;

static int64_t nf4_quantize(const void* weight, Dtype dtype, int64_t begin, int64_t end, int64_t blocksize,
                            uint8_t* qweight, float* absmax) {
  const KeepDenormals keep;
  return with_dtype(dtype, [&](auto tag) __attribute__((always_inline)) -> int64_t {
    using T = decltype(tag);
    const auto* in = static_cast<const typename T::Element*>(weight);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * blocksize;
      const uint32_t largest = largest_of<T>(in + first, blocksize);
      if (largest >= 0x7F800000) return block;
      const float magnitude = float_of(largest);
      absmax[block] = magnitude;
      // Compared as integers: kMinAbsmax lies below 2^-126, and may count as zero among floats.
      const Float inverse = broadcast(largest > bits_of(kMinAbsmax) ? 1.0f / magnitude : kMostInverse);
      encode<T>(in + first, inverse, blocksize, qweight + first / 2);
    }
    return -1;
  });
}

}  // namespace nf4lora::NF4LORA_ISA
