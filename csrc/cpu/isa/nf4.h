// NF4 in vectors: the 16 products of a block looked up by code (decode), the nearest code found in a tree (encode).
#pragma once

#include "simd.h"

namespace nf4lora::NF4LORA_ISA {

alignas(64) inline constexpr Code kCodeTable = kCode;
alignas(64) inline constexpr Code kTree = kThresholdTree;

// The 16 weights that a block can hold, code[i] * absmax, rounded to T or left in float32.
// Looking products up is exact and costs 16 multiplies per block instead of one per weight.
struct Products {
#if defined(__AVX512F__)
  __m512 value;
#elif defined(__AVX2__)
  __m256 low, high;
#else
  float value[16];
#endif
};

template <class T>
NF4LORA_INLINE Products products(float absmax) {
  const Float scale = broadcast(absmax);
  Products table;
#if defined(__AVX512F__)
  table.value = T::round(multiply(load(kCodeTable.value), scale));
#elif defined(__AVX2__)
  table.low = T::round(multiply(load(kCodeTable.value), scale));
  table.high = T::round(multiply(load(kCodeTable.value + 8), scale));
#else
  for (int i = 0; i < 16; i += kLanes) store(table.value + i, T::round(multiply(load(kCodeTable.value + i), scale)));
#endif
  return table;
}

// kLanes weights from kLanes / 2 bytes, in the order of k.
NF4LORA_INLINE Float decode(const uint8_t* qweight, const Products& table) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(qweight));
  const __m128i codes = _mm_unpacklo_epi8(_mm_srli_epi16(bytes, 4), bytes);  // vpermps ignores the bits above 3
  return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), table.value);
#elif defined(__AVX2__)
  int32_t four;
  std::memcpy(&four, qweight, 4);
  const __m256i shift = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(four), shift);
  const __m256 low = _mm256_permutevar8x32_ps(table.low, codes), high = _mm256_permutevar8x32_ps(table.high, codes);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));  // bit 3 chooses
#else
  Float v;
  for (int i = 0; i < kLanes; i += 2) {
    v[i] = table.value[first_code(qweight[i / 2])];
    v[i + 1] = table.value[second_code(qweight[i / 2])];
  }
  return v;
#endif
}

// Columns [k, k + count) of one row as floats rounded to T; k and count are multiples of kLanes.
template <class T>
NF4LORA_INLINE void decode_row(const uint8_t* qweight, const float* absmax, int64_t blocksize, int64_t k, int64_t count,
                               float* out) {
  const int64_t end = k + count;
  while (k < end) {
    const int64_t block = k / blocksize, stop = smaller(end, (block + 1) * blocksize);
    const Products table = products<T>(absmax[block]);
    for (; k < stop; k += kLanes, out += kLanes) store(out, decode(qweight + k / 2, table));
  }
}

#if defined(__AVX512BW__)

// The same in 16 bits: a table of 16 words, and one permute per 32 weights.
template <class T>
NF4LORA_INLINE __m512i products16(float absmax) {
  alignas(32) uint16_t words[16];
  T::store(words, multiply(load(kCodeTable.value), broadcast(absmax)));
  return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(words)));
}
NF4LORA_INLINE __m512i decode32(__m128i bytes, __m512i table) {
  const __m512i wide = _mm512_cvtepu8_epi32(bytes);
  const __m512i pairs = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16));
  // Word 0 takes the high nibble, word 1 the low one; the table repeats, so that bit 4 of the index does not matter.
  return _mm512_permutexvar_epi16(_mm512_srlv_epi16(pairs, _mm512_set1_epi32(4)), table);
}
template <class T>
NF4LORA_INLINE void decode_row16(const uint8_t* qweight, const float* absmax, int64_t blocksize, int64_t k,
                                 int64_t count, uint16_t* out) {
  const int64_t end = k + count;
  while (k < end) {
    const int64_t block = k / blocksize, stop = smaller(end, (block + 1) * blocksize);
    const __m512i table = products16<T>(absmax[block]);
    for (; k + 32 <= stop; k += 32, out += 32) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(qweight + k / 2));
      _mm512_storeu_si512(out, decode32(bytes, table));
    }
    if (k < stop) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(qweight + k / 2));
      const __m256i half = _mm512_castsi512_si256(decode32(bytes, table));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), half);
      k += 16;
      out += 16;
    }
  }
}

#endif

static void nf4_dequantize(const uint8_t* qweight, const float* absmax, int64_t begin, int64_t end, int64_t blocksize,
                           Dtype dtype, void* weight) {
  with_dtype(dtype, [&](auto tag) __attribute__((always_inline)) {
    using T = decltype(tag);
    auto* out = static_cast<typename T::Element*>(weight);
#if defined(__AVX512BW__)
    if constexpr (sizeof(*out) == 2) {
      decode_row16<T>(qweight, absmax, blocksize, begin * blocksize, (end - begin) * blocksize,
                      out + begin * blocksize);
      return;
    }
#endif
    for (int64_t block = begin; block < end; ++block) {
      const Products table = products<F32>(absmax[block]);
      for (int64_t i = block * blocksize; i < (block + 1) * blocksize; i += kLanes) {
        T::store(out + i, decode(qweight + i / 2, table));
      }
    }
  });
}

// Index of the nearest code, in 32 bits per lane: four steps down the tree of thresholds.
#if defined(__AVX512F__)
using Index = __m512i;
NF4LORA_INLINE Index nearest(Float scaled) {
  const __m512 tree = load(kTree.value);
  __m512i node = _mm512_set1_epi32(1);
  NF4LORA_UNROLL
  for (int depth = 0; depth < 4; ++depth) {
    const __mmask16 right = _mm512_cmp_ps_mask(scaled, _mm512_permutexvar_ps(node, tree), _CMP_GT_OQ);
    node = _mm512_add_epi32(node, node);
    node = _mm512_mask_add_epi32(node, right, node, _mm512_set1_epi32(1));
  }
  return node;  // 16 + index; the 16 is dropped when nibbles are packed
}
NF4LORA_INLINE void store_codes(uint8_t* qweight, Index node) {
  const __m512i first = _mm512_and_si512(_mm512_slli_epi64(node, 4), _mm512_set1_epi64(0xF0));
  const __m512i second = _mm512_and_si512(_mm512_srli_epi64(node, 32), _mm512_set1_epi64(0x0F));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(qweight), _mm512_cvtepi64_epi8(_mm512_or_si512(first, second)));
}
NF4LORA_INLINE uint32_t largest_magnitude(Float a, uint32_t largest) {
  const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7FFFFFFF));
  const uint32_t found = _mm512_reduce_max_epu32(magnitude);
  return found > largest ? found : largest;
}
#elif defined(__AVX2__)
using Index = __m256i;
NF4LORA_INLINE Index nearest(Float scaled) {
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
NF4LORA_INLINE void store_codes(uint8_t* qweight, Index node) {
  const __m256i first = _mm256_and_si256(_mm256_slli_epi64(node, 4), _mm256_set1_epi64x(0xF0));
  const __m256i second = _mm256_and_si256(_mm256_srli_epi64(node, 32), _mm256_set1_epi64x(0x0F));
  const __m256i bytes = _mm256_or_si256(first, second);  // the low byte of each 64 bits
  for (int i = 0; i < 2; ++i) {
    const __m128i half = i ? _mm256_extracti128_si256(bytes, 1) : _mm256_castsi256_si128(bytes);
    qweight[2 * i] = static_cast<uint8_t>(_mm_extract_epi8(half, 0));
    qweight[2 * i + 1] = static_cast<uint8_t>(_mm_extract_epi8(half, 8));
  }
}
NF4LORA_INLINE uint32_t largest_magnitude(Float a, uint32_t largest) {
  const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7FFFFFFF));
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(magnitude), _mm256_extracti128_si256(magnitude, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
  const uint32_t found = static_cast<uint32_t>(_mm_cvtsi128_si32(m));
  return found > largest ? found : largest;
}
#else
struct Index {
  uint32_t node[kLanes];
};
NF4LORA_INLINE Index nearest(Float scaled) {
  Index index;
  for (int i = 0; i < kLanes; ++i) {
    uint32_t node = 1;
    for (int depth = 0; depth < 4; ++depth) node = 2 * node + (scaled[i] > kTree.value[node] ? 1 : 0);
    index.node[i] = node;
  }
  return index;
}
NF4LORA_INLINE void store_codes(uint8_t* qweight, const Index& index) {
  for (int i = 0; i < kLanes; i += 2) {
    qweight[i / 2] = pack(static_cast<uint8_t>(index.node[i] & 15), static_cast<uint8_t>(index.node[i + 1] & 15));
  }
}
NF4LORA_INLINE uint32_t largest_magnitude(Float a, uint32_t largest) {
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t magnitude = bits_of(a[i]) & 0x7FFFFFFF;
    if (magnitude > largest) largest = magnitude;
  }
  return largest;
}
#endif

static int64_t nf4_quantize(const void* weight, Dtype dtype, int64_t begin, int64_t end, int64_t blocksize,
                            uint8_t* qweight, float* absmax) {
  return with_dtype(dtype, [&](auto tag) __attribute__((always_inline)) -> int64_t {
    using T = decltype(tag);
    const auto* in = static_cast<const typename T::Element*>(weight);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * blocksize, last = first + blocksize;
      // Magnitudes compare as integers, where NaN and Inf are the largest, so one test finds both.
      uint32_t largest = 0;
      for (int64_t i = first; i < last; i += kLanes) largest = largest_magnitude(T::load(in + i), largest);
      if (largest >= 0x7F800000) return block;
      const float magnitude = float_of(largest);
      absmax[block] = magnitude;
      const Float inverse = broadcast(1.0f / (magnitude > kMinAbsmax ? magnitude : kMinAbsmax));
      for (int64_t i = first; i < last; i += kLanes) {
        store_codes(qweight + i / 2, nearest(multiply(T::load(in + i), inverse)));
      }
    }
    return -1;
  });
}

}  // namespace nf4lora::NF4LORA_ISA
