// A row of W in chunks, decoded to vectors that are multiplied as they come: how a chunk of W and of x is laid out.
//
// A sum over k may take its terms in any order. So nibbles are used in the order in which shifts bring them out of the
// packed bytes, and x is laid out in that order once, instead of every weight being brought into the order of k.
#pragma once

#include "nf4.h"

namespace nf4lora::NF4LORA_ISA {

inline constexpr int kSteps = 64;                      // 32-bit elements in a chunk: floats, or pairs of bfloat16
inline constexpr int kChunkVectors = kSteps / kLanes;  // vectors in a chunk
inline constexpr int64_t kChunkBytes = 4 * kSteps;     // of x

// x widened to float32, W a table of float32: any instruction set, any dtype.
template <class T>
struct Widened {
  using Tag = T;
  using Vector = Float;
  static constexpr int64_t kColumns = 64;  // of a chunk

  // The column of a chunk that element i of its vectors, one after the other, belongs to.
  static constexpr int column(int i) {
    const int part = i / kLanes, lane = i % kLanes;
#if defined(__AVX512F__)
    return 8 * (lane % 8) + ((part + (lane < 8 ? 0 : 4)) ^ 1);
#elif defined(__AVX2__)
    if (kBytewise) return 4 * (lane % 4) + 32 * (lane / 4) + 16 * (part / 2 % 2) + 2 * (part % 2) + 1 - part / 4;
    return 8 * lane + (part ^ 1);
#else
    return kLanes * part + lane;
#endif
  }

  // Chunk of x with `count` columns, zeros behind them.
  static void prepare(const typename T::Element* x, int64_t count, void* out) {
    float wide[kColumns] = {};
    widen<T>(x, count, wide);
    float ordered[kColumns];
    for (int i = 0; i < kColumns; ++i) ordered[i] = wide[kOrder.column[i]];
    std::memcpy(out, ordered, sizeof ordered);
  }

  NF4LORA_INLINE Float multiply_add(Float sum, Vector w, const uint8_t* x) {
    return fma(load(reinterpret_cast<const float*>(x)), w, sum);
  }
  NF4LORA_INLINE Float multiply_add(Float sum, uint32_t w, Float x) { return fma(broadcast(float_of(w)), x, sum); }
  NF4LORA_INLINE void put(uint32_t* to, Vector w) { store(reinterpret_cast<float*>(to), w); }

  // each(part, w) for the vectors of a chunk; one scale for 64 columns or, kSmall, one for 32.
  template <bool kSmall, class Each>
  NF4LORA_INLINE void decode(const uint8_t* bytes, const float* scales, Each&& each) {
#if defined(__AVX512F__)
    // Eight dwords, twice: the lower lanes shift their first four nibbles down one by one, the upper ones the others.
    const __m512i codes = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(16), 1);
    const __m512 table = table_of(scales[0]), other = kSmall ? table_of(scales[1]) : table;
    NF4LORA_UNROLL
    for (int part = 0; part < kChunkVectors; ++part) {
      __m512i index = _mm512_srlv_epi32(codes, _mm512_add_epi32(upper, _mm512_set1_epi32(4 * part)));
      if constexpr (kSmall) {
        const __m512i second = _mm512_setr_epi32(0, 0, 0, 0, 16, 16, 16, 16, 0, 0, 0, 0, 16, 16, 16, 16);
        index = _mm512_ternarylogic_epi32(index, _mm512_set1_epi32(15), second, 0xEA);  // (a & b) | c
        each(part, _mm512_permutex2var_ps(table, index, other));
      } else {
        each(part, _mm512_permutexvar_ps(index, table));  // ignores the bits above 3
      }
    }
#elif defined(__AVX2__)
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
    if constexpr (kBytewise) {
      // Both bytes of a weight are looked up, 32 weights at a time; a weight's float has them as its upper half.
      const Planes planes = planes_of(scales[0], scales[kSmall ? 1 : 0]);
      NF4LORA_UNROLL
      for (int nibble = 0; nibble < 2; ++nibble) {
        const __m256i index = _mm256_and_si256(nibble ? _mm256_srli_epi16(codes, 4) : codes, _mm256_set1_epi8(15));
        const __m256i low = _mm256_shuffle_epi8(planes.low, index), high = _mm256_shuffle_epi8(planes.high, index);
        NF4LORA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const __m256i words = half ? _mm256_unpackhi_epi8(low, high) : _mm256_unpacklo_epi8(low, high);
          each(4 * nibble + 2 * half, _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)));
          each(4 * nibble + 2 * half + 1,
               _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xFFFF0000)))));
        }
      }
    } else {
      const Products table = products<T>(scales[0]), other = products<T>(scales[kSmall ? 1 : 0]);
      NF4LORA_UNROLL
      for (int part = 0; part < kChunkVectors; ++part) {
        const __m256i index = _mm256_srli_epi32(codes, 4 * part);
        const __m256 choice = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28 - 4 * part));  // bit 3 chooses
        const Float w = look_up(table, index, choice);
        each(part, kSmall ? _mm256_blend_ps(w, look_up(other, index, choice), 0xF0) : w);
      }
    }
#else
    const Products table = products<T>(scales[0]), other = products<T>(scales[kSmall ? 1 : 0]);
    NF4LORA_UNROLL
    for (int part = 0; part < kChunkVectors; ++part) {
      each(part, NF4LORA_ISA::decode(bytes + part * kLanes / 2, part < kChunkVectors / 2 ? table : other));
    }
#endif
  }

 private:
#if defined(__AVX512F__)
  NF4LORA_INLINE Float table_of(float scale) { return T::round(multiply(load(kCodeTable.value), broadcast(scale))); }
#elif defined(__AVX2__)
  static constexpr bool kBytewise = __is_same(T, Bf16);

  NF4LORA_INLINE Float look_up(const Products& table, __m256i index, __m256 choice) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index),
                            choice);
  }

  // The lower and the upper bytes of the 16 products: of one scale in the lower lane, of the other in the upper.
  struct Planes {
    __m256i low, high;
  };
  // Lower bytes in the lower lane, upper bytes in the upper lane.
  NF4LORA_INLINE __m256i bytes_of_products(float scale) {
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
  NF4LORA_INLINE Planes planes_of(float scale, float second_scale) {
    const __m256i first = bytes_of_products(scale), second = bytes_of_products(second_scale);
    return {_mm256_permute2x128_si256(first, second, 0x20), _mm256_permute2x128_si256(first, second, 0x31)};
  }
#endif

  struct Order {
    uint8_t column[kColumns];
  };
  static constexpr Order order() {
    Order order{};
    for (int i = 0; i < kColumns; ++i) order.column[i] = static_cast<uint8_t>(column(i));
    return order;
  }
  static constexpr Order kOrder = order();
};

#if defined(__AVX512BF16__)
// x and W as pairs of bfloat16: four vectors of 32 words, of the columns that are 1, 0, 3 and 2 modulo 4, as the nibbles
// of 64 bytes come apart when they are taken for 32 words.
struct Paired {
  using Tag = Bf16;
  using Vector = __m512i;
  static constexpr int64_t kColumns = 128;

  static void prepare(const uint16_t* x, int64_t count, void* out) {
    alignas(64) uint16_t evens[32];
    for (int i = 0; i < 32; ++i) evens[i] = static_cast<uint16_t>(2 * i);
    const __m512i even = _mm512_load_si512(evens), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    __m512i v[4];  // count is a multiple of 32
    for (int i = 0; i < 4; ++i) v[i] = 32 * i < count ? _mm512_loadu_si512(x + 32 * i) : _mm512_setzero_si512();
    const __m512i evens0 = _mm512_permutex2var_epi16(v[0], even, v[1]),
                  odds0 = _mm512_permutex2var_epi16(v[0], odd, v[1]);
    const __m512i evens1 = _mm512_permutex2var_epi16(v[2], even, v[3]),
                  odds1 = _mm512_permutex2var_epi16(v[2], odd, v[3]);
    auto* target = static_cast<uint16_t*>(out);
    _mm512_storeu_si512(target, _mm512_permutex2var_epi16(odds0, even, odds1));
    _mm512_storeu_si512(target + 32, _mm512_permutex2var_epi16(evens0, even, evens1));
    _mm512_storeu_si512(target + 64, _mm512_permutex2var_epi16(odds0, odd, odds1));
    _mm512_storeu_si512(target + 96, _mm512_permutex2var_epi16(evens0, odd, evens1));
  }

  NF4LORA_INLINE Float dot(Float sum, __m512i w, __m512i x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<const __m512bh&>(w), reinterpret_cast<const __m512bh&>(x));
  }
  NF4LORA_INLINE Float multiply_add(Float sum, Vector w, const uint8_t* x) {
    return dot(sum, w, _mm512_loadu_si512(x));
  }
  NF4LORA_INLINE Float multiply_add(Float sum, uint32_t w, Float x) {
    return dot(sum, _mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(w)));
  }
  NF4LORA_INLINE void put(uint32_t* to, Vector w) { _mm512_storeu_si512(to, w); }

  // The products of two blocks in one table: 16 words each.
  NF4LORA_INLINE __m512i table_of(const float& scale, const float& next) {
    const Float code = load(kCodeTable.value);
    const __m512bh both = _mm512_cvtne2ps_pbh(multiply(code, broadcast(next)), multiply(code, broadcast(scale)));
    return reinterpret_cast<const __m512i&>(both);
  }

  // each(part, w) for the vectors of a chunk; one scale for 64 columns or, kSmall, one for 32. An index is a nibble plus
  // 16 for the second half of the bytes, whose block is another; kSmall: plus 16 for every quarter, over two tables. All
  // are put into their bytes at once, and a look-up ignores the upper byte of its word.
  template <bool kSmall, class Each>
  NF4LORA_INLINE void decode(const uint8_t* bytes, const float* scales, Each&& each) {
    const __m512i table = table_of(scales[0], scales[1]);
    const __m512i other = kSmall ? table_of(scales[2], scales[3]) : table;
    __m512i block = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(16), 1);
    if constexpr (kSmall) {
      block = _mm512_inserti32x4(_mm512_setzero_si512(), _mm_set1_epi8(16), 1);
      block = _mm512_inserti32x4(block, _mm_set1_epi8(32), 2);
      block = _mm512_inserti32x4(block, _mm_set1_epi8(48), 3);
    }
    const __m512i packed = _mm512_loadu_si512(bytes), nibble = _mm512_set1_epi8(15);
    const __m512i second = _mm512_ternarylogic_epi32(packed, nibble, block, 0xEA);  // (a & b) | c
    const __m512i first = _mm512_ternarylogic_epi32(_mm512_srli_epi16(packed, 4), nibble, block, 0xEA);
    const auto look_up = [&](__m512i index) __attribute__((always_inline)) {
      return kSmall ? _mm512_permutex2var_epi16(table, index, other) : _mm512_permutexvar_epi16(index, table);
    };
    each(0, look_up(second));
    each(1, look_up(first));
    each(2, look_up(_mm512_srli_epi16(second, 8)));
    each(3, look_up(_mm512_srli_epi16(first, 8)));
  }
};
#endif

}  // namespace nf4lora::NF4LORA_ISA
