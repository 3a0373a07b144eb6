// Laying out the operands of a matrix product whose right side may be packed NF4. loops.h has the layouts.
//
// A weight is decoded once per panel, to exactly the 16-bit (or 32-bit) value that nf4_dequantize gives, and the panel
// serves every row of A.
#pragma once

#include "nf4.h"

namespace nf4lora::NF4LORA_ISA {

inline constexpr int kRows = 6;  // with kVectors, as many accumulators as registers allow
#if defined(__AVX512F__)
inline constexpr int kVectors = 4;
#else
inline constexpr int kVectors = 2;
#endif
inline constexpr int kMaxLanes = kVectors * kLanes;
inline constexpr int kGroup = 8;  // rows that are transposed together

// One float per element; operands of dtype T are widened, NF4 is rounded to T and then widened.
template <class T>
struct Multiply {
  using Tag = T;
  static constexpr int kStep = 1;
  NF4LORA_INLINE Float apply(Float sum, uint32_t a, Float b) { return fma(broadcast(float_of(a)), b, sum); }
};

#if defined(__AVX512BF16__)
// A pair of bfloat16 per element and the instruction that multiplies and adds both.
struct DotProduct {
  using Tag = Bf16;
  static constexpr int kStep = 2;
  NF4LORA_INLINE Float apply(Float sum, uint32_t a, Float b) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(a));
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pair), reinterpret_cast<__m512bh>(b));
  }
};
#endif

inline constexpr int kMostBlocks = 1024 / kMinBlocksize;  // in the deepest panel, of 512 steps
inline constexpr int64_t kAhead = 32;                     // rows to prefetch before they are decoded

template <class Math>
NF4LORA_INLINE int64_t steps_of(int64_t depth) {
  return (depth + Math::kStep - 1) / Math::kStep;
}

// Columns [k, k + depth) of a row as 32-bit elements, written to `room` unless memory already holds them so.
template <class Math>
NF4LORA_INLINE const uint8_t* row_elements(const Dense& D, int64_t row, int64_t k, int64_t depth, uint32_t* room) {
  using Element = typename Math::Tag::Element;
  const Element* source = static_cast<const Element*>(D.data) + row * D.stride + k;
  if constexpr (Math::kStep == 1 && sizeof(Element) == 2) {
    widen<typename Math::Tag>(source, depth, reinterpret_cast<float*>(room));
  } else if (depth % Math::kStep == 0) {
    return reinterpret_cast<const uint8_t*>(source);
  } else {
    room[depth / Math::kStep] = 0;
    std::memcpy(room, source, static_cast<size_t>(depth) * sizeof(Element));
  }
  return reinterpret_cast<const uint8_t*>(room);
}

// out[s * width + r] = element s of row r, for r < kGroup; rows from `valid` on are zeros. With a width below kGroup
// the stores overlap: each overwrites what the one before wrote too much, and the caller's buffer has room for the last.
NF4LORA_INLINE void interleave(const uint8_t* const rows[kGroup], int valid, int64_t steps, int width, uint32_t* out) {
  int64_t s = 0;
#if defined(__AVX2__)
  for (; s + 8 <= steps; s += 8) {
    __m256i v[8];
    NF4LORA_UNROLL
    for (int r = 0; r < 8; ++r) {
      v[r] = r < valid ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r] + 4 * s)) : _mm256_setzero_si256();
    }
    transpose8(v);
    NF4LORA_UNROLL
    for (int i = 0; i < 8; ++i) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (s + i) * width), v[i]);
    }
  }
#endif
  for (; s < steps; ++s) {
    for (int r = 0; r < kGroup; ++r) {
      uint32_t element = 0;
      if (r < valid) std::memcpy(&element, rows[r] + 4 * s, 4);
      out[s * width + r] = element;
    }
  }
}

// Rows are taken in pieces of this many steps, so that widened copies stay in the first cache level.
inline constexpr int64_t kPiece = 128;

template <class Math>
static void pack_rows(const Dense& A, int64_t row, int64_t valid, int64_t k, int64_t depth, void* tile) {
  static_assert(kRows <= kGroup);
  uint32_t room[kRows][kPiece];
  const uint8_t* rows[kGroup] = {};
  auto* out = static_cast<uint32_t*>(tile);
  for (int64_t done = 0; done < depth; done += kPiece * Math::kStep) {
    const int64_t piece = smaller(depth - done, kPiece * Math::kStep);
    for (int r = 0; r < kRows && r < valid; ++r) rows[r] = row_elements<Math>(A, row + r, k + done, piece, room[r]);
    const int64_t count = valid < kRows ? valid : kRows;
    interleave(rows, static_cast<int>(count), steps_of<Math>(piece), kRows, out + done / Math::kStep * kRows);
  }
}

template <class Math>
static void pack_columns(const Dense& A, int64_t row, int64_t valid, int64_t k, int64_t depth, void* tile) {
  using Element = typename Math::Tag::Element;
  const int64_t count = smaller(valid, kRows), steps = steps_of<Math>(depth);
  auto* out = static_cast<uint32_t*>(tile);
  std::memset(out, 0, static_cast<size_t>(steps * kRows) * 4);
  for (int64_t i = 0; i < depth; ++i) {
    const Element* source = static_cast<const Element*>(A.data) + (k + i) * A.stride + row;
    if constexpr (Math::kStep == 1) {
      widen<typename Math::Tag>(source, count, reinterpret_cast<float*>(out + i * kRows));
    } else {
      auto* halves = reinterpret_cast<uint16_t*>(out + i / 2 * kRows) + i % 2;
      for (int64_t r = 0; r < count; ++r) halves[2 * r] = source[r];
    }
  }
}

template <class Math>
static void panel_rows(const Dense& D, int64_t n, int64_t valid, int lanes, int64_t k, int64_t depth, void* panel) {
  uint32_t room[kGroup][kPiece];
  const uint8_t* rows[kGroup] = {};
  auto* out = static_cast<uint32_t*>(panel);
  for (int64_t done = 0; done < depth; done += kPiece * Math::kStep) {
    const int64_t piece = smaller(depth - done, kPiece * Math::kStep);
    for (int lane = 0; lane < lanes; lane += kGroup) {
      const int64_t count = smaller(valid - lane, kGroup);
      for (int64_t r = 0; r < count; ++r) rows[r] = row_elements<Math>(D, n + lane + r, k + done, piece, room[r]);
      interleave(rows, static_cast<int>(count), steps_of<Math>(piece), lanes, out + done / Math::kStep * lanes + lane);
    }
  }
}

// Columns [k, k + depth) of kLanes rows from `row` on, of which `valid` exist; both are multiples of 32. Codes are
// transposed while they are packed, eight to a lane, then decoded where they stand.
template <class Emit>
NF4LORA_INLINE void transposed(const Packed& W, int64_t row, int64_t valid, int64_t k, int64_t depth, Emit&& emit) {
  const int64_t blocks = W.K / W.blocksize, first = k / W.blocksize, count = (k + depth - 1) / W.blocksize + 1 - first;
  float scales[kMostBlocks][kLanes] = {};  // a row that does not exist has zeros
  for (int64_t r = 0; r < valid; ++r) {
    float line[kMostBlocks];
    read_scales(W.scales, (row + r) * blocks + first, count, line);
    for (int64_t b = 0; b < count; ++b) scales[b][r] = line[b];
  }
  for (int64_t done = 0; done < depth; done += 8 * kLanes) {
    const int64_t words = smaller(depth - done, 8 * kLanes) / 8;
    Int codes[kLanes];
    NF4LORA_UNROLL
    for (int r = 0; r < kLanes; ++r) {
      const uint8_t* source = W.qweight + (row + r) * (W.K / 2) + (k + done) / 2;
      codes[r] = r >= valid ? no_bits() : words == kLanes ? load_bits(source) : load_bits(source, words);
    }
    transpose(codes);
    for (int64_t word = 0; word < words; word += 4) {  // four words hold 32 columns, which lie in one block
      const Float absmax = load(scales[(k + done + 8 * word) / W.blocksize - first]);
      emit(codes + word, absmax, done + 8 * word);
    }
  }
}

template <class Math>
static void panel_nf4_rows(const Packed& W, int64_t n, int64_t valid, int lanes, int64_t k, int64_t depth,
                           void* panel) {
  for (int lane = 0; lane < lanes; lane += kLanes) {
    auto* out = static_cast<float*>(panel) + lane;
    const int64_t rows = valid - lane < 0 ? 0 : smaller(valid - lane, kLanes);
    if constexpr (Math::kStep == 1) {
      transposed(W, n + lane, rows, k, depth,
                 [&](const Int* codes, Float absmax, int64_t at) __attribute__((always_inline)) {
                   for (int word = 0; word < 4; ++word) {
                     NF4LORA_UNROLL
                     for (int i = 0; i < 8; ++i) {  // the first of a byte's two is its high nibble
                       const Int code = shift_right(codes[word], 8 * (i / 2) + (i % 2 ? 0 : 4));
                       store(out + (at + 8 * word + i) * lanes, Math::Tag::round(decode_lanes(code, absmax)));
                     }
                   }
                 });
    }
#if defined(__AVX512BF16__)
    if constexpr (Math::kStep == 2) {
      // Each row's lane twice, shifted to its first and to its second code, so that rounding packs them as a pair.
      const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
      const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
      const __m512i nibble = _mm512_setr_epi32(4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0);
      transposed(W, n + lane, rows, k, depth,
                 [&](const Int* codes, Float absmax, int64_t at) __attribute__((always_inline)) {
                   const Float absmax_low = _mm512_permutexvar_ps(low, absmax);
                   const Float absmax_high = _mm512_permutexvar_ps(high, absmax);
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
                 });
    }
#endif
  }
}

// Lane by lane, the element of one row, or the pair of two rows; `second` is null past the last row.
template <class Math>
NF4LORA_INLINE void join_rows(const typename Math::Tag::Element* first, const typename Math::Tag::Element* second,
                              int64_t valid, int lanes, uint32_t* out) {
  if constexpr (Math::kStep == 1) {
    widen<typename Math::Tag>(first, valid, reinterpret_cast<float*>(out));
    for (int64_t lane = valid; lane < lanes; ++lane) out[lane] = 0;
  } else {
    int64_t lane = 0;
#if defined(__AVX512BF16__)
    for (; second && lane + 16 <= valid; lane += 16) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + lane));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + lane));
      const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
      _mm512_storeu_si512(out + lane, _mm512_or_si512(_mm512_cvtepu16_epi32(a), high));
    }
#endif
    for (; lane < valid; ++lane) {
      out[lane] = static_cast<uint32_t>(first[lane]) | static_cast<uint32_t>(second ? second[lane] : 0) << 16;
    }
    for (; lane < lanes; ++lane) out[lane] = 0;
  }
}

template <class Math>
static void panel_columns(const Dense& D, int64_t n, int64_t valid, int lanes, int64_t k, int64_t depth, void* panel) {
  const auto* data = static_cast<const typename Math::Tag::Element*>(D.data);
  auto* out = static_cast<uint32_t*>(panel);
  const int64_t count = smaller(valid, lanes);
  for (int64_t i = 0; i < depth; i += Math::kStep, out += lanes) {
    const auto* first = data + (k + i) * D.stride + n;
    join_rows<Math>(first, i + 1 < depth ? first + D.stride : nullptr, count, lanes, out);
  }
}

#if defined(__AVX512BF16__)
// Columns [n, n + count) of a pair of rows, pair by pair, where both rows lie in one block each; at most 64.
// A table of 32 words holds the 16 products of either row. An index is a code, plus 16 for the second row.
NF4LORA_INLINE void decode_pair(const uint8_t* first, const uint8_t* second, float absmax0, float absmax1,
                                int64_t count, uint32_t* out) {
  const Float code = load(kCodeTable.value);
  const __m512bh rounded = _mm512_cvtne2ps_pbh(multiply(code, broadcast(absmax1)), multiply(code, broadcast(absmax0)));
  const __m512i table = reinterpret_cast<const __m512i&>(rounded);
  const __mmask32 exist = static_cast<__mmask32>((uint64_t{1} << count / 2) - 1);
  const __m512i bytes0 = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(exist, first));
  const __m512i bytes1 = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(exist, second));
  const __m512i both = _mm512_or_si512(bytes0, _mm512_slli_epi16(bytes1, 8));
  const __m512i nibbles = _mm512_set1_epi16(0x0F0F), second_row = _mm512_set1_epi16(0x1000);
  constexpr int kAndOr = 0xEA;  // (a & b) | c
  const __m512i odd = _mm512_ternarylogic_epi32(both, nibbles, second_row, kAndOr);
  const __m512i even = _mm512_ternarylogic_epi32(_mm512_srli_epi16(both, 4), nibbles, second_row, kAndOr);
  // Word 2i and 2i + 1 of quarter q: byte 8q + i / 2 of either row, of even columns from `even`, of odd ones from `odd`.
  const __m512i pick =
      _mm512_setr_epi32(0x00000000, 0x00200020, 0x00010001, 0x00210021, 0x00020002, 0x00220022, 0x00030003, 0x00230023,
                        0x00040004, 0x00240024, 0x00050005, 0x00250025, 0x00060006, 0x00260026, 0x00070007, 0x00270027);
  const __m512i halves = _mm512_set1_epi32(0x00080000);  // the second row's index is in the upper byte
  NF4LORA_UNROLL
  for (int quarter = 0; quarter < 4; ++quarter) {
    if (16 * quarter >= count) break;
    const __m512i from = _mm512_add_epi16(pick, _mm512_set1_epi16(static_cast<int16_t>(8 * quarter)));
    const __m512i index = _mm512_srlv_epi16(_mm512_permutex2var_epi16(even, from, odd), halves);
    _mm512_storeu_si512(out + 16 * quarter, _mm512_permutexvar_epi16(index, table));
  }
}
#endif

template <class Math>
static void panel_nf4_columns(const Packed& W, int64_t n, int64_t valid, int lanes, int64_t k, int64_t depth,
                              void* panel) {
  auto* out = static_cast<uint32_t*>(panel);
  const int64_t count = smaller(valid, lanes);
  for (int64_t row = k; row < k + depth; row += Math::kStep, out += lanes) {
    // Rows lie far apart, which no hardware prefetcher follows. The last ones have no such rows: hence no pointer.
    for (int i = 0; i < Math::kStep; ++i) {
      const int64_t ahead = (row + kAhead + i) * (W.K / 2) + n / 2;
      __builtin_prefetch(
          reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(W.qweight) + static_cast<uintptr_t>(ahead)));
    }
    for (int64_t lane = count; lane < lanes; ++lane) out[lane] = 0;
    if constexpr (Math::kStep == 1) {
      decode_row<typename Math::Tag>(W, row, n, count, reinterpret_cast<float*>(out));
    }
#if defined(__AVX512BF16__)
    if constexpr (Math::kStep == 2) {
      const bool paired = row + 1 < k + depth;
      const int64_t blocks = W.K / W.blocksize;
      const uint8_t* qweight = W.qweight + row * (W.K / 2);
      for (int64_t column = n; column < n + count;) {
        const int64_t block = column / W.blocksize, stop = smaller(n + count, (block + 1) * W.blocksize);
        const float absmax = read_scale(W.scales, row * blocks + block);
        const float next = paired ? read_scale(W.scales, (row + 1) * blocks + block) : 0.0f;
        const uint8_t* bytes = qweight + column / 2;
        decode_pair(bytes, paired ? bytes + W.K / 2 : bytes, absmax, next, stop - column, out + (column - n));
        column = stop;
      }
    }
#endif
  }
}

}  // namespace nf4lora::NF4LORA_ISA
