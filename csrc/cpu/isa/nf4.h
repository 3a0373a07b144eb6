// Decoding NF4 in vectors: a block holds 16 different weights, so their products are made once and looked up by code.
#pragma once

#include "absmax.h"
#include "dtype.h"

namespace nf4lora::NF4LORA_ISA {

alignas(64) inline constexpr Code kCodeTable = kCode;

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
NF4LORA_INLINE void decode_row(const Packed& W, int64_t row, int64_t k, int64_t count, float* out) {
  const uint8_t* qweight = W.qweight + row * (W.K / 2);
  const int64_t end = k + count;
  while (k < end) {
    const int64_t block = k / W.blocksize, stop = smaller(end, (block + 1) * W.blocksize);
    const Products table = products<T>(read_scale(W.scales, row * (W.K / W.blocksize) + block));
    for (; k < stop; k += kLanes, out += kLanes) store(out, decode(qweight + k / 2, table));
  }
}

// kLanes weights of one k and as many rows, each with its own scale: codes stand in the lowest four bits of a lane.
NF4LORA_INLINE Float decode_lanes(Int codes, Float absmax) {
#if defined(__AVX512F__)
  return multiply(_mm512_permutexvar_ps(codes, load(kCodeTable.value)), absmax);
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(load(kCodeTable.value), codes);
  const __m256 high = _mm256_permutevar8x32_ps(load(kCodeTable.value + 8), codes);
  return multiply(_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28))), absmax);
#else
  Float v;
  for (int i = 0; i < kLanes; ++i) v[i] = kCodeTable.value[codes[i] & 15];
  return multiply(v, absmax);
#endif
}

#if defined(__AVX512BW__)

// The same in 16 bits: a table of 16 words, twice, so that bit 4 of an index does not matter.
template <class T>
NF4LORA_INLINE __m512i products16(float absmax) {
  const Float product = multiply(load(kCodeTable.value), broadcast(absmax));
  __m256i words;
  if constexpr (T::kHalf) {
    words = _mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(round_bf16(product)), 16));
  }
  return _mm512_broadcast_i64x4(words);
}
// 32 weights from 16 bytes: each byte four times, so that a word holds a nibble in its lower half, then one permute.
NF4LORA_INLINE __m512i decode32(__m128i bytes, __m512i table) {
  const __m512i four = _mm512_shuffle_epi8(
      _mm512_broadcast_i32x4(bytes),
      _mm512_set_epi32(0x0F0F0F0F, 0x0E0E0E0E, 0x0D0D0D0D, 0x0C0C0C0C, 0x0B0B0B0B, 0x0A0A0A0A, 0x09090909, 0x08080808,
                       0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0));
  return _mm512_permutexvar_epi16(_mm512_srlv_epi16(four, _mm512_set1_epi32(4)), table);
}

#endif

// Written past the caches or through them; `stream` needs an aligned address.
NF4LORA_INLINE void put(float* p, Float v, bool stream) {
#if defined(__AVX512F__)
  if (stream) return _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  if (stream) return _mm256_stream_ps(p, v);
#endif
  (void)stream;
  store(p, v);
}

static void nf4_dequantize(const uint8_t* qweight, const float* absmax, int64_t begin, int64_t end, int64_t blocksize,
                           Dtype dtype, bool stream, void* weight) {
  with_dtype(dtype, [&](auto tag) __attribute__((always_inline)) {
    using T = decltype(tag);
    auto* out = static_cast<typename T::Element*>(weight);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * blocksize, last = first + blocksize;
#if defined(__AVX512BW__)
      if constexpr (sizeof(*out) == 2) {
        const __m512i table = products16<T>(absmax[block]);
        for (int64_t i = first; i < last; i += 32) {
          const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(qweight + i / 2));
          const __m512i words = decode32(bytes, table);
          if (stream) {
            _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), words);
          } else {
            _mm512_storeu_si512(out + i, words);
          }
        }
        continue;
      }
#endif
      const Products table = products<F32>(absmax[block]);
      for (int64_t i = first; i < last; i += kLanes) {
        const Float value = decode(qweight + i / 2, table);
        if constexpr (sizeof(*out) == 4) {
          put(out + i, value, stream);
        } else {
          T::store(out + i, value);
        }
      }
    }
  });
#if defined(__AVX2__)
  if (stream) _mm_sfence();  // streaming stores are not ordered with those that tell another thread of them
#endif
}

}  // namespace nf4lora::NF4LORA_ISA
