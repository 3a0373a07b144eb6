// Two rows of W times a few rows of x: the two ways of laying out x for it, and what runs ahead.
#pragma once

#include "nf4.h"

namespace nf4lora::NF4LORA_ISA {

inline constexpr int kPair = 2;  // rows of W at a time: a load of x serves both

// A piece of two rows of W, and what is needed soon: bytes to prefetch; and the scales of the piece that comes next,
// looked up one by one while vectors are multiplied. A loop of its own, in which the vector units idle, would take a
// tenth of the time.
struct Piece {
  const uint8_t* bytes[kPair];
  const float* scales[kPair];
  int64_t count;  // columns
  int64_t blocksize;
  const uint8_t* later[kPair];
  const uint8_t* codes[kPair];  // of the next scales
  float* values[kPair];
  int64_t soon;  // how many of them in either row; 0 without double quantisation
  int64_t done;

  __attribute__((always_inline)) void look_up(int more) {
    if (done + more > soon) return;
    NF4LORA_UNROLL
    for (int r = 0; r < kPair; ++r) {
      NF4LORA_UNROLL
      for (int i = 0; i < more; ++i) {
        uint32_t bits = bits_of(kNestedTable.value[codes[r][done + i]]);
        asm("" : "+r"(bits));  // or g++ would put vectors together from these, with the ports that shuffles need
        std::memcpy(values[r] + done + i, &bits, 4);
      }
    }
    done += more;
  }
};

// Sums per row of W and of x, so that additions that follow each other do not wait for each other.
constexpr int sums_for(int M) { return M <= 2 ? 4 / M : 1; }
template <int M>
using Sums = Float[kPair][M][sums_for(M)];

// sums of row r of the pair and row m of x: out[r * stride + m].
template <int M>
NF4LORA_INLINE void load_sums(const Float* out, int64_t stride, Sums<M>& sums) {
  NF4LORA_UNROLL
  for (int r = 0; r < kPair; ++r) {
    NF4LORA_UNROLL
    for (int m = 0; m < M; ++m) {
      for (int j = 0; j < sums_for(M); ++j) sums[r][m][j] = j ? broadcast(0.0f) : out[r * stride + m];
    }
  }
}
template <int M>
NF4LORA_INLINE void store_sums(const Sums<M>& sums, int64_t stride, Float* out) {
  NF4LORA_UNROLL
  for (int r = 0; r < kPair; ++r) {
    NF4LORA_UNROLL
    for (int m = 0; m < M; ++m) {
      Float total = sums[r][m][0];
      for (int j = 1; j < sums_for(M); ++j) total = add(total, sums[r][m][j]);
      out[r * stride + m] = total;
    }
  }
}

// x widened to float32, row after row: any instruction set, any dtype.
template <class T>
struct Widened {
  using Tag = T;
  static constexpr int kMost = 8;
  static constexpr int kBytes = 4;  // of an element of x

  static void prepare(const Dense& x, int64_t row, int rows, int, int64_t K, void* out) {
    for (int m = 0; m < rows; ++m) {
      const auto* source = static_cast<const typename T::Element*>(x.data) + (row + m) * x.stride;
      widen<T>(source, K, static_cast<float*>(out) + m * K);
    }
  }

  // each(at, half, w): kLanes weights of either row, `at` columns in.
  template <class Each>
  NF4LORA_INLINE void decoded(Piece& own, Each&& each) {
    Piece piece = own;  // a copy, or what is written might change it
    const int64_t block = smaller(piece.blocksize, piece.count);
    for (int64_t k = 0, i = 0; k < piece.count; ++i) {
      Products table[kPair];
      NF4LORA_UNROLL
      for (int r = 0; r < kPair; ++r) {
        table[r] = products<T>(piece.scales[r][i]);
        __builtin_prefetch(piece.later[r] + k / 2);
      }
      piece.look_up(1);
      for (const int64_t stop = smaller(piece.count, k + block); k < stop; k += 2 * kLanes) {
        NF4LORA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int64_t at = k + half * kLanes;
          Float w[kPair];
          NF4LORA_UNROLL
          for (int r = 0; r < kPair; ++r) w[r] = decode(piece.bytes[r] + at / 2, table[r]);
          each(at, half, w);
        }
      }
    }
    own.done = piece.done;
  }

  template <int M>
  NF4LORA_INLINE void add_products(const float* x, int64_t K, const Float (&w)[kPair], int j, Sums<M>& sums) {
    NF4LORA_UNROLL
    for (int m = 0; m < M; ++m) {
      const Float a = load(x + m * K);
      NF4LORA_UNROLL
      for (int r = 0; r < kPair; ++r) sums[r][m][j] = fma(a, w[r], sums[r][m][j]);
    }
  }

  // out += x times the piece, which begins at column k.
  template <int M>
  static __attribute__((noinline)) void multiply_piece(Piece& piece, const void* x, int64_t k, int64_t K, Float* out,
                                                       int64_t stride) {
    const float* rows = static_cast<const float*>(x) + k;
    Sums<M> sums;
    load_sums<M>(out, stride, sums);
    decoded(piece, [&](int64_t at, int half, const Float(&w)[kPair])
                       __attribute__((always_inline)) { add_products<M>(rows + at, K, w, half % sums_for(M), sums); });
    store_sums<M>(sums, stride, out);
  }
};

#if defined(__AVX512BF16__)
// x as pairs of bfloat16. 128 columns of all rows lie together: for each row four vectors, of the columns that are
// 1, 0, 3 and 2 modulo 4, as the nibbles of 64 bytes come apart when they are taken for 32 words.
struct Paired {
  using Tag = Bf16;
  static constexpr int kMost = 16;
  static constexpr int kBytes = 2;

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
  NF4LORA_INLINE __m512i table_of(const float& absmax, const float& next) {
    const Float code = load(kCodeTable.value);
    const __m512bh both = _mm512_cvtne2ps_pbh(multiply(code, broadcast(next)), multiply(code, broadcast(absmax)));
    return reinterpret_cast<const __m512i&>(both);
  }

  // each(at, part, w): 32 weights of either row, of the 128 columns that begin `at` columns in. An index is a nibble
  // plus 16 for the second half of them, whose block is another; where blocks hold 32 weights (kSmall), plus 16 for
  // every quarter, over two tables.
  template <bool kSmall, class Each>
  NF4LORA_INLINE void decoded_of(Piece& own, Each&& each) {
    Piece piece = own;  // a copy, or what is written might change it
    __m512i block = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    if constexpr (kSmall)
      block = _mm512_setr_epi64(0, 0, 0x0010001000100010, 0x0010001000100010, 0x0020002000200020, 0x0020002000200020,
                                0x0030003000300030, 0x0030003000300030);
    const int shift = __builtin_ctzll(static_cast<unsigned long long>(piece.blocksize));
    const int64_t last = (piece.count - 1) >> shift;  // a scale that does not exist multiplies zeros of x
    for (int64_t i = 0; i < piece.count; i += 128) {
      __m512i bytes[kPair], table[kPair], other[kPair];
      const bool whole = i + 128 <= piece.count;
      NF4LORA_UNROLL
      for (int r = 0; r < kPair; ++r) {
        const uint8_t* from = piece.bytes[r] + i / 2;
        __builtin_prefetch(piece.later[r] + i / 2);
        bytes[r] = __builtin_expect(whole, 1) ? load_bits(from) : load_bits(from, (piece.count - i) / 8);
        const float* scales = piece.scales[r];
        if constexpr (kSmall) {
          const int64_t b = i / 32;
          table[r] = table_of(scales[b], scales[smaller(b + 1, last)]);
          other[r] = table_of(scales[smaller(b + 2, last)], scales[smaller(b + 3, last)]);
        } else {
          table[r] = table_of(scales[i >> shift], scales[smaller((i + 64) >> shift, last)]);
        }
      }
      piece.look_up(kSmall ? 4 : 2);
      NF4LORA_UNROLL
      for (int part = 0; part < 4; ++part) {
        __m512i w[kPair];
        NF4LORA_UNROLL
        for (int r = 0; r < kPair; ++r) {
          const __m512i nibbles = part ? _mm512_srli_epi16(bytes[r], 4 * part) : bytes[r];
          const __m512i index = _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi16(15), block, 0xEA);  // (a & b) | c
          w[r] =
              kSmall ? _mm512_permutex2var_epi16(table[r], index, other[r]) : _mm512_permutexvar_epi16(index, table[r]);
        }
        each(i, part, w);
      }
    }
    own.done = piece.done;
  }
  template <class Each>
  NF4LORA_INLINE void decoded(Piece& piece, Each&& each) {
    if (piece.blocksize == kMinBlocksize) {
      decoded_of<true>(piece, each);
    } else {
      decoded_of<false>(piece, each);
    }
  }

  template <int M>
  NF4LORA_INLINE void add_products(const uint16_t* x, const __m512i (&w)[kPair], int j, Sums<M>& sums) {
    NF4LORA_UNROLL
    for (int m = 0; m < M; ++m) {
      __m512i a = _mm512_loadu_si512(x + m * 128);
      asm("" : "+v"(a));  // or g++ would load it once for each row of W
      NF4LORA_UNROLL
      for (int r = 0; r < kPair; ++r) {
        sums[r][m][j] = _mm512_dpbf16_ps(sums[r][m][j], reinterpret_cast<const __m512bh&>(w[r]),
                                         reinterpret_cast<const __m512bh&>(a));
      }
    }
  }

  // out += x times the piece, which begins at column k.
  template <int M>
  static __attribute__((noinline)) void multiply_piece(Piece& piece, const void* x, int64_t k, int64_t, Float* out,
                                                       int64_t stride) {
    const auto* rows = static_cast<const uint16_t*>(x) + k * M;
    Sums<M> sums;
    load_sums<M>(out, stride, sums);
    decoded(piece, [&](int64_t at, int part, const __m512i(&w)[kPair]) __attribute__((always_inline)) {
      add_products<M>(rows + at * M + part * 32, w, part % sums_for(M), sums);
    });
    store_sums<M>(sums, stride, out);
  }
};
#endif

}  // namespace nf4lora::NF4LORA_ISA
