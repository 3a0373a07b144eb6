// AVX-512 with BF16 and VBMI besides: a product of pairs of bfloat16, and look-ups of bytes. All processors with BF16
// have VBMI but the first, Cooper Lake.
#pragma once

#include "avx512.h"

namespace nf4lora::NF4LORA_ISA::avx512bf16 {

using namespace avx512;
using avx512::broadcast, avx512::decode_lanes, avx512::Float, avx512::Int, avx512::load, avx512::multiply,
    avx512::store;  // used below, where these names could be those of avx2 as well

// ---- floats of 16 bits

NF4LORA_INLINE __m256i to_words_bf16(Float v) {
  const __m256bh rounded = _mm512_cvtneps_pbh(v);  // results below 2^-126 become zeros
  return reinterpret_cast<const __m256i&>(rounded);
}
NF4LORA_INLINE void store_bf16(uint16_t* p, Float v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_words_bf16(v));
}
NF4LORA_INLINE void store_part_bf16(uint16_t* p, Float v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), to_words_bf16(v));
}

// ---- bits in lanes

NF4LORA_INLINE void pair_words(const uint16_t* first, const uint16_t* second, int64_t count, uint32_t* out) {
  int64_t i = 0;
  for (; second && i + 16 <= count; i += 16) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + i));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + i));
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
    _mm512_storeu_si512(out + i, _mm512_or_si512(_mm512_cvtepu16_epi32(a), high));
  }
  for (; i < count; ++i) {
    out[i] = static_cast<uint32_t>(first[i]) | static_cast<uint32_t>(second ? second[i] : 0) << 16;
  }
}

// ---- products

// The 16 weights of a block and of another, rounded to words. An index is a code, plus 16 for the other block.
NF4LORA_INLINE __m512i two_word_tables(float absmax, float other) {
  const Float code = load(kCodeTable.value);
  const __m512bh both = _mm512_cvtne2ps_pbh(multiply(code, broadcast(other)), multiply(code, broadcast(absmax)));
  return reinterpret_cast<const __m512i&>(both);
}
NF4LORA_INLINE Float dot(Float sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<const __m512bh&>(a), reinterpret_cast<const __m512bh&>(b));
}
inline constexpr int kAndOr = 0xEA;  // of _mm512_ternarylogic: (a & b) | c

// For gemm.h: panel.h says what it has.
struct PairProduct {
  using Tag = Bf16;
  static constexpr int kStep = 2;

  NF4LORA_INLINE Float multiply_add(Float sum, uint32_t a, Float b) {
    return dot(sum, _mm512_set1_epi32(static_cast<int>(a)), _mm512_castps_si512(b));
  }

  // Each row's lane twice, shifted to its first and to its second code, so that rounding packs them as a pair.
  NF4LORA_INLINE void decode_rows(const Int* codes, Float absmax, int64_t at, int lanes, float* out) {
    const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512i nibble = _mm512_setr_epi32(4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0);
    const Float absmax_low = _mm512_permutexvar_ps(low, absmax), absmax_high = _mm512_permutexvar_ps(high, absmax);
    for (int word = 0; word < 4; ++word) {
      const __m512i codes_low = _mm512_permutexvar_epi32(low, codes[word]);
      const __m512i codes_high = _mm512_permutexvar_epi32(high, codes[word]);
      NF4LORA_UNROLL
      for (int byte = 0; byte < 4; ++byte) {
        const __m512i shift = _mm512_add_epi32(nibble, _mm512_set1_epi32(8 * byte));
        const Float a = decode_lanes(_mm512_srlv_epi32(codes_low, shift), absmax_low);
        const Float b = decode_lanes(_mm512_srlv_epi32(codes_high, shift), absmax_high);
        const __m512bh pairs = _mm512_cvtne2ps_pbh(b, a);
        store(out + ((at + 8 * word) / 2 + byte) * lanes, reinterpret_cast<const __m512&>(pairs));
      }
    }
  }

  NF4LORA_INLINE void decode_pair(const uint8_t* first, const uint8_t* second, float absmax0, float absmax1,
                                  int64_t count, uint32_t* out) {
    const __m512i table = two_word_tables(absmax0, absmax1);
    const __mmask32 exist = static_cast<__mmask32>((uint64_t{1} << count / 2) - 1);
    const __m512i bytes0 = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(exist, first));
    const __m512i bytes1 = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(exist, second));
    const __m512i both = _mm512_or_si512(bytes0, _mm512_slli_epi16(bytes1, 8));
    const __m512i nibbles = _mm512_set1_epi16(0x0F0F), second_row = _mm512_set1_epi16(0x1000);
    const __m512i odd = _mm512_ternarylogic_epi32(both, nibbles, second_row, kAndOr);
    const __m512i even = _mm512_ternarylogic_epi32(_mm512_srli_epi16(both, 4), nibbles, second_row, kAndOr);
    // Word 2i and 2i + 1 of quarter q: byte 8q + i / 2 of either row, of even columns from `even`, of odd ones from
    // `odd`.
    const __m512i pick = _mm512_setr_epi32(0x00000000, 0x00200020, 0x00010001, 0x00210021, 0x00020002, 0x00220022,
                                           0x00030003, 0x00230023, 0x00040004, 0x00240024, 0x00050005, 0x00250025,
                                           0x00060006, 0x00260026, 0x00070007, 0x00270027);
    const __m512i halves = _mm512_set1_epi32(0x00080000);  // the second row's index is in the upper byte
    NF4LORA_UNROLL
    for (int quarter = 0; quarter < 4; ++quarter) {
      if (16 * quarter >= count) break;
      const __m512i from = _mm512_add_epi16(pick, _mm512_set1_epi16(static_cast<int16_t>(8 * quarter)));
      const __m512i index = _mm512_srlv_epi16(_mm512_permutex2var_epi16(even, from, odd), halves);
      _mm512_storeu_si512(out + 16 * quarter, _mm512_permutexvar_epi16(index, table));
    }
  }
};

// For few.h: few_row.h says what it has. A chunk of 128 columns is 64 bytes of W. Taken for 32 words, the four nibbles
// of each come out by shifts, so each of a chunk's four vectors holds every fourth column, in ascending order:
//
//   byte      0       1       2       3      ...       word    0            1
//   column  0 | 1   2 | 3   4 | 5   6 | 7    ...       nibble  12 8 4 0     12 8 4 0    is shifted down by that
//   nibble  hi lo   hi lo   hi lo   hi lo              column   2 3 0 1      6 7 4 5
//
//   vector 0: bits  0 to 3    columns 1 5 9 ... 125        x lies in the same order, so that word i of x meets word i
//   vector 1: bits  4 to 7    columns 0 4 8 ... 124        of W, and the dot product adds the two products of each pair
//   vector 2: bits  8 to 11   columns 3 7 11 ... 127       of words: 1 and 5, 9 and 13, ...
//   vector 3: bits 12 to 15   columns 2 6 10 ... 126
struct PairRow {
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

  NF4LORA_INLINE Float multiply_add(Float sum, Vector w, const uint8_t* x) {
    return dot(sum, w, _mm512_loadu_si512(x));
  }
  NF4LORA_INLINE Float multiply_add(Float sum, uint32_t w, Float x) {
    return dot(sum, _mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(w)));
  }
  NF4LORA_INLINE void put(uint32_t* to, Vector w) { _mm512_storeu_si512(to, w); }

  // An index is a nibble plus 16 for the second half of the bytes, whose block is another; kSmall: plus 16 for every
  // quarter, over two tables. All are put into their bytes at once, and a look-up ignores the upper byte of its word.
  template <bool kSmall, class Each>
  NF4LORA_INLINE void decode(const uint8_t* bytes, const float* scales, Each&& each) {
    const __m512i table = two_word_tables(scales[0], scales[1]);
    const __m512i other = kSmall ? two_word_tables(scales[2], scales[3]) : table;
    __m512i block = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(16), 1);
    if constexpr (kSmall) {
      block = _mm512_inserti32x4(_mm512_setzero_si512(), _mm_set1_epi8(16), 1);
      block = _mm512_inserti32x4(block, _mm_set1_epi8(32), 2);
      block = _mm512_inserti32x4(block, _mm_set1_epi8(48), 3);
    }
    const __m512i packed = _mm512_loadu_si512(bytes), nibble = _mm512_set1_epi8(15);
    const __m512i second = _mm512_ternarylogic_epi32(packed, nibble, block, kAndOr);
    const __m512i first = _mm512_ternarylogic_epi32(_mm512_srli_epi16(packed, 4), nibble, block, kAndOr);
    const auto look_up = [&](__m512i index) __attribute__((always_inline)) {
      return kSmall ? _mm512_permutex2var_epi16(table, index, other) : _mm512_permutexvar_epi16(index, table);
    };
    each(0, look_up(second));
    each(1, look_up(first));
    each(2, look_up(_mm512_srli_epi16(second, 8)));
    each(3, look_up(_mm512_srli_epi16(first, 8)));
  }
};

// ---- the maps of 8 bits: 64 codes at a time, four vectors of floats

NF4LORA_INLINE Int byte_of(const uint8_t* table, Int code) {
  const Int low = _mm512_permutex2var_epi8(_mm512_load_si512(table), code, _mm512_load_si512(table + 64));
  const Int high = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), code, _mm512_load_si512(table + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high);
}
NF4LORA_INLINE void decode_map(const Planes<uint8_t>& map, const uint8_t* codes, Float* value) {
  const Int code = transpose_groups(_mm512_loadu_si512(codes));
  Int byte[4];
  NF4LORA_UNROLL
  for (int i = 0; i < 4; ++i) byte[i] = byte_of(map.part[i], code);
  const Int low01 = _mm512_unpacklo_epi8(byte[0], byte[1]), high01 = _mm512_unpackhi_epi8(byte[0], byte[1]);
  const Int low23 = _mm512_unpacklo_epi8(byte[2], byte[3]), high23 = _mm512_unpackhi_epi8(byte[2], byte[3]);
  value[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low01, low23));
  value[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low01, low23));
  value[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high01, high23));
  value[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high01, high23));
}
NF4LORA_INLINE void decode_signed(const uint8_t* codes, Float* value) { decode_map(kSignedBytes, codes, value); }
NF4LORA_INLINE void decode_unsigned(const uint8_t* codes, Float* value) { decode_map(kUnsignedBytes, codes, value); }
NF4LORA_INLINE void decode_drop(const uint8_t* codes, Float* drop) {  // of its bytes, two are zero
  const Int code = transpose_groups(_mm512_loadu_si512(codes)), none = _mm512_setzero_si512();
  const Int low = _mm512_unpacklo_epi8(byte_of(kDropBytes.part[2], code), byte_of(kDropBytes.part[3], code));
  const Int high = _mm512_unpackhi_epi8(byte_of(kDropBytes.part[2], code), byte_of(kDropBytes.part[3], code));
  drop[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(none, low));
  drop[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(none, low));
  drop[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(none, high));
  drop[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(none, high));
}

inline constexpr int kLookedUp = 64;
NF4LORA_INLINE void look_up_nested(const uint8_t* codes, float* out) {
  Float value[4];
  decode_signed(codes, value);
  NF4LORA_UNROLL
  for (int i = 0; i < 4; ++i) store(out + 16 * i, value[i]);
}

}  // namespace nf4lora::NF4LORA_ISA::avx512bf16
