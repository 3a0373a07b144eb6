// Tiles of a matrix product whose right side may be packed NF4: laying out operands, and the product itself.
//
// A weight is decoded once per panel, to exactly the 16-bit (or 32-bit) value that nf4_dequantize gives, and the panel
// serves every row of A. loops.h has the layouts. Bound by the multiply-add rate once A has a few dozen rows.
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
    __m256i v[8], t[8];
    NF4LORA_UNROLL
    for (int r = 0; r < 8; ++r) {
      v[r] = r < valid ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r] + 4 * s)) : _mm256_setzero_si256();
    }
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
    for (int i = 0; i < 8; ++i) {
      const __m256i column =
          i < 4 ? _mm256_permute2x128_si256(v[i], v[i + 4], 0x20) : _mm256_permute2x128_si256(v[i - 4], v[i], 0x31);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (s + i) * width), column);
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

template <class Math>
static void panel_nf4_rows(const Packed& W, int64_t n, int64_t valid, int lanes, int64_t k, int64_t depth,
                           void* panel) {
  uint32_t room[kGroup][kPiece];
  const uint8_t* rows[kGroup];
  for (int r = 0; r < kGroup; ++r) rows[r] = reinterpret_cast<const uint8_t*>(room[r]);
  auto* out = static_cast<uint32_t*>(panel);
  for (int64_t done = 0; done < depth; done += kPiece * Math::kStep) {
    const int64_t piece = smaller(depth - done, kPiece * Math::kStep);
    for (int lane = 0; lane < lanes; lane += kGroup) {
      const int64_t count = smaller(valid - lane, kGroup);
      for (int64_t r = 0; r < count; ++r) {
        const uint8_t* qweight = W.qweight + (n + lane + r) * (W.K / 2);
        const float* absmax = W.absmax + (n + lane + r) * (W.K / W.blocksize);
        if constexpr (Math::kStep == 1) {
          decode_row<typename Math::Tag>(qweight, absmax, W.blocksize, k + done, piece,
                                         reinterpret_cast<float*>(room[r]));
        }
#if defined(__AVX512BF16__)
        if constexpr (Math::kStep == 2) {
          decode_row16<Bf16>(qweight, absmax, W.blocksize, k + done, piece, reinterpret_cast<uint16_t*>(room[r]));
        }
#endif
      }
      interleave(rows, static_cast<int>(count), steps_of<Math>(piece), lanes, out + done / Math::kStep * lanes + lane);
    }
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

template <class Math>
static void panel_nf4_columns(const Packed& W, int64_t n, int64_t valid, int lanes, int64_t k, int64_t depth,
                              void* panel) {
  auto* out = static_cast<uint32_t*>(panel);
  const int64_t count = smaller(valid, lanes);
  const uint8_t* qweight = W.qweight + k * (W.K / 2);
  const float* absmax = W.absmax + k * (W.K / W.blocksize);
  for (int64_t i = 0; i < depth; i += Math::kStep, out += lanes) {
    if constexpr (Math::kStep == 1) {
      decode_row<typename Math::Tag>(qweight, absmax, W.blocksize, n, count, reinterpret_cast<float*>(out));
      for (int64_t lane = count; lane < lanes; ++lane) out[lane] = 0;
    }
#if defined(__AVX512BF16__)
    if constexpr (Math::kStep == 2) {
      uint16_t room[2][kMaxLanes];
      const bool paired = i + 1 < depth;
      decode_row16<Bf16>(qweight, absmax, W.blocksize, n, count, room[0]);
      if (paired) {
        decode_row16<Bf16>(qweight + W.K / 2, absmax + W.K / W.blocksize, W.blocksize, n, count, room[1]);
      }
      join_rows<Math>(room[0], paired ? room[1] : nullptr, count, lanes, out);
    }
#endif
    qweight += Math::kStep * (W.K / 2);
    absmax += Math::kStep * (W.K / W.blocksize);
  }
}

// Not inlined: g++ 12 spills an accumulator inside the loop when it is.
template <class Math, int kWidth>
static __attribute__((noinline)) void tile_of(const uint32_t* A, const float* B, int64_t steps, float* C) {
  Float sum[kRows][kWidth];
  NF4LORA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    NF4LORA_UNROLL
    for (int j = 0; j < kWidth; ++j) sum[r][j] = load(C + (r * kWidth + j) * kLanes);
  }
  for (int64_t s = 0; s < steps; ++s, A += kRows, B += kWidth * kLanes) {
    Float b[kWidth];
    NF4LORA_UNROLL
    for (int j = 0; j < kWidth; ++j) b[j] = load(B + j * kLanes);
    NF4LORA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      NF4LORA_UNROLL
      for (int j = 0; j < kWidth; ++j) sum[r][j] = Math::apply(sum[r][j], A[r], b[j]);
    }
  }
  NF4LORA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    NF4LORA_UNROLL
    for (int j = 0; j < kWidth; ++j) store(C + (r * kWidth + j) * kLanes, sum[r][j]);
  }
}

template <class Math>
static void tile(const void* A, const void* B, int64_t steps, int lanes, float* C) {
  const auto* a = static_cast<const uint32_t*>(A);
  const auto* b = static_cast<const float*>(B);
  switch (lanes / kLanes) {
    case 1: return tile_of<Math, 1>(a, b, steps, C);
    case 2: return tile_of<Math, 2>(a, b, steps, C);
#if defined(__AVX512F__)
    case 3: return tile_of<Math, 3>(a, b, steps, C);
    case 4: return tile_of<Math, 4>(a, b, steps, C);
#endif
  }
}

template <class Math>
inline constexpr Gemm kGemm = {
    Math::kStep,
    kRows,
    kLanes < kGroup ? kGroup : kLanes,  // panels are transposed in whole groups of rows
    kMaxLanes,
    pack_rows<Math>,
    pack_columns<Math>,
    panel_rows<Math>,
    panel_columns<Math>,
    panel_nf4_rows<Math>,
    panel_nf4_columns<Math>,
    tile<Math>,
};

}  // namespace nf4lora::NF4LORA_ISA
