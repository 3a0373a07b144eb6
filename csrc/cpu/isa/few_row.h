// One row of W times a few rows of x, as it is decoded: the two ways of laying out x for it, and what runs ahead.
#pragma once

#include "nf4.h"

namespace nf4lora::NF4LORA_ISA {

// What is needed soon. Bytes of W to prefetch; and the scales that come next, looked up one by one while vectors are
// multiplied: a loop of its own, in which the vector units idle, would take a tenth of the time.
struct Ahead {
  const uint8_t* bytes;
  const uint8_t* codes;  // null without double quantisation
  float* values;
  int64_t count;
  int64_t done;

  __attribute__((always_inline)) void look_up(int more) {
    if (done + more > count) return;
    NF4LORA_UNROLL
    for (int i = 0; i < more; ++i) values[done + i] = kNestedTable.value[codes[done + i]];
    done += more;
  }
};

// Sums per row of x, so that additions that follow each other do not wait for each other.
constexpr int sums_for(int M) { return M <= 2 ? 4 : M <= 8 ? 2 : 1; }
template <int M>
using Sums = Float[M][sums_for(M)];

// x widened to float32, row after row: any instruction set, any dtype.
template <class T>
struct Widened {
  using Tag = T;
  static constexpr int kMost = 4;
  static constexpr int kBytes = 4;  // of an element of x

  static void prepare(const Dense& x, int64_t row, int rows, int, int64_t K, void* out) {
    for (int m = 0; m < rows; ++m) {
      const auto* source = static_cast<const typename T::Element*>(x.data) + (row + m) * x.stride;
      widen<T>(source, K, static_cast<float*>(out) + m * K);
    }
  }

  // sums += x times row n of W, columns [k, k + count). A piece may end within a block.
  template <int M>
  NF4LORA_INLINE void multiply_row(const Packed& W, int64_t n, const void* x, int64_t k, int64_t count,
                                   const float* scales, Ahead& ahead, Sums<M>& sums) {
    const auto* rows = static_cast<const float*>(x);
    const uint8_t* bytes = W.qweight + n * W.K / 2;
    const int64_t first = k / W.blocksize, from = k;
    constexpr int kSums = sums_for(M);
    const int64_t end = k + count;
    while (k < end) {
      const int64_t block = k / W.blocksize, stop = smaller(end, (block + 1) * W.blocksize);
      const Products table = products<T>(scales[block - first]);
      __builtin_prefetch(ahead.bytes + (k - from) / 2);
      ahead.look_up(1);
      for (; k < stop; k += 2 * kLanes) {
        NF4LORA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int64_t at = k + half * kLanes;
          const Float w = decode(bytes + at / 2, table);
          NF4LORA_UNROLL
          for (int m = 0; m < M; ++m) sums[m][half % kSums] = fma(load(rows + m * W.K + at), w, sums[m][half % kSums]);
        }
      }
    }
  }
};

#if defined(__AVX512BF16__)
// x as pairs of bfloat16. 128 columns of all rows lie together: for each row four vectors, of the columns that are
// 1, 0, 3 and 2 modulo 4, as the nibbles of 64 bytes come apart when they are taken for 32 words.
struct Paired {
  using Tag = Bf16;
  static constexpr int kMost = 16;
  static constexpr int kBytes = 2;  // of an element of x

  static void prepare(const Dense& x, int64_t row, int rows, int M, int64_t K, void* out) {
    alignas(64) uint16_t evens[32];
    for (int i = 0; i < 32; ++i) evens[i] = static_cast<uint16_t>(2 * i);
    const __m512i even = _mm512_load_si512(evens), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    for (int m = 0; m < rows; ++m) {
      const uint16_t* source = static_cast<const uint16_t*>(x.data) + (row + m) * x.stride;
      uint16_t* target = static_cast<uint16_t*>(out) + m * 128;
      for (int64_t k = 0; k < K; k += 128, target += M * 128) {
        __m512i v[4];
        for (int i = 0; i < 4; ++i) {
          v[i] = k + 32 * i < K ? _mm512_loadu_si512(source + k + 32 * i) : _mm512_setzero_si512();
        }
        const __m512i evens0 = _mm512_permutex2var_epi16(v[0], even, v[1]),
                      odds0 = _mm512_permutex2var_epi16(v[0], odd, v[1]);
        const __m512i evens1 = _mm512_permutex2var_epi16(v[2], even, v[3]),
                      odds1 = _mm512_permutex2var_epi16(v[2], odd, v[3]);
        _mm512_storeu_si512(target, _mm512_permutex2var_epi16(odds0, even, odds1));
        _mm512_storeu_si512(target + 32, _mm512_permutex2var_epi16(evens0, even, evens1));
        _mm512_storeu_si512(target + 64, _mm512_permutex2var_epi16(odds0, odd, odds1));
        _mm512_storeu_si512(target + 96, _mm512_permutex2var_epi16(evens0, odd, evens1));
      }
    }
  }

  // The products of two blocks in one table: 16 words each.
  NF4LORA_INLINE __m512i table_of(float absmax, float next) {
    const Float code = load(kCodeTable.value);
    const __m512bh both = _mm512_cvtne2ps_pbh(multiply(code, broadcast(next)), multiply(code, broadcast(absmax)));
    return reinterpret_cast<const __m512i&>(both);
  }

  // 128 columns. An index is a nibble plus 16 for the second half of them, whose block is another; where blocks hold 32
  // weights (kSmall), plus 16 for every quarter, over two tables.
  template <int M, bool kSmall>
  NF4LORA_INLINE void multiply_128(__m512i bytes, const float (&absmax)[4], const uint16_t* rows, Sums<M>& sums) {
    const __m512i table = table_of(absmax[0], absmax[1]);
    const __m512i other = kSmall ? table_of(absmax[2], absmax[3]) : table;
    __m512i block = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    if constexpr (kSmall)
      block = _mm512_setr_epi64(0, 0, 0x0010001000100010, 0x0010001000100010, 0x0020002000200020, 0x0020002000200020,
                                0x0030003000300030, 0x0030003000300030);
    constexpr int kSums = sums_for(M);
    NF4LORA_UNROLL
    for (int part = 0; part < 4; ++part) {
      const __m512i nibbles = part ? _mm512_srli_epi16(bytes, 4 * part) : bytes;
      const __m512i index = _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi16(15), block, 0xEA);  // (a & b) | c
      const __m512i w =
          kSmall ? _mm512_permutex2var_epi16(table, index, other) : _mm512_permutexvar_epi16(index, table);
      NF4LORA_UNROLL
      for (int m = 0; m < M; ++m) {
        const __m512i a = _mm512_loadu_si512(rows + m * 128 + part * 32);
        Float& sum = sums[m][part % kSums];
        sum = _mm512_dpbf16_ps(sum, reinterpret_cast<const __m512bh&>(w), reinterpret_cast<const __m512bh&>(a));
      }
    }
  }

  // sums += x times row n of W, columns [k, k + count); k is a multiple of 128.
  template <int M>
  NF4LORA_INLINE void multiply_row(const Packed& W, int64_t n, const void* x, int64_t k, int64_t count,
                                   const float* scales, Ahead& ahead, Sums<M>& sums) {
    const auto* rows = static_cast<const uint16_t*>(x) + k * M;
    const uint8_t* bytes = W.qweight + (n * W.K + k) / 2;
    const int shift = __builtin_ctzll(static_cast<unsigned long long>(W.blocksize));
    if (shift == 5) {
      for (int64_t i = 0; i < count; i += 128, scales += 4) {
        const int64_t words = smaller(count - i, 128) / 8;
        float absmax[4] = {};
        for (int64_t j = 0; 4 * j < words; ++j) absmax[j] = scales[j];
        ahead.look_up(4);
        multiply_128<M, true>(load_bits(bytes + i / 2, words), absmax, rows + i * M, sums);
      }
      return;
    }
    int64_t i = 0;
    for (; i + 128 <= count; i += 128) {
      __builtin_prefetch(ahead.bytes + i / 2);
      const float absmax[4] = {scales[i >> shift], scales[(i + 64) >> shift]};
      ahead.look_up(2);
      multiply_128<M, false>(load_bits(bytes + i / 2), absmax, rows + i * M, sums);
    }
    if (i < count) {
      const float absmax[4] = {scales[i >> shift]};
      multiply_128<M, false>(load_bits(bytes + i / 2, (count - i) / 8), absmax, rows + i * M, sums);
    }
  }
};
#endif

}  // namespace nf4lora::NF4LORA_ISA
