// Laying out the operands of a matrix product whose right side may be packed NF4, so that gemm.h reads both in order.
//
// An A tile has kRows rows of A (BLIS: packed A, MR), a B panel the columns of a strip (packed B: up to NR = kMaxLanes
// of them, and KC = 512 steps of the depth at most). An element has 32 bits: a float, or a pair of bfloat16 that follow
// each other in the depth. Element by element, n counting columns of the product and k its depth:
//
//   A tile  [steps][kRows]      step 0 | row 0  row 1  row 2  row 3  row 4  row 5
//                               step 1 | row 0  ...
//
//   B panel [steps][lanes]      step 0 | n 0       n 1       n 2       ...  n lanes - 1         all of k 0
//     of floats                 step 1 | n 0       ...                                          all of k 1
//
//     of pairs                  step 0 | n 0       n 0       n 1       n 1       n 2  ...       k 0 beside k 1
//                                      |   k 0       k 1       k 0       k 1       k 0
//                               step 1 | n 0       n 0       n 1       ...                      k 2 beside k 3
//
// (AMX takes the B panel of pairs as it is; amx.h.) A weight is decoded once per panel, to exactly the 16-bit (or
// 32-bit) value that nf4_dequantize gives, and the panel serves every row of A.
#pragma once

#include "nf4.h"

namespace nf4lora::NF4LORA_ISA {

inline constexpr int kRows = 6;                  // with kVectors, as many accumulators as registers allow
inline constexpr int kVectors = kRegisters / 8;  // of a step in the widest panel
inline constexpr int kMaxLanes = kVectors * kLanes;
inline constexpr int kGroup = 8;  // rows that are transposed together

// What an element holds is said by Math, which has
//
//   Tag            the dtype of the operands
//   kStep          values of the depth in an element
//   multiply_add   a vector of sums + an element of A times the elements of B in the lanes
//   decode_rows    columns [at, at + 32) of kLanes rows of W into the panel; `codes` as transposed_codes() has them
//   decode_pair    where kStep is 2: `count` columns of two rows of W, in one block each, into a step of the panel

// One float per element; operands of dtype T are widened, NF4 is rounded to T and then widened.
template <class T>
struct FloatProduct {
  using Tag = T;
  static constexpr int kStep = 1;
  NF4LORA_INLINE Float multiply_add(Float sum, uint32_t a, Float b) { return fma(broadcast(float_of(a)), b, sum); }
  NF4LORA_INLINE void decode_rows(const Int* codes, Float absmax, int64_t at, int lanes, float* out) {
    for (int word = 0; word < 4; ++word) {
      NF4LORA_UNROLL
      for (int i = 0; i < 8; ++i) {  // the first of a byte's two is its high nibble
        const Int code = shift_right(codes[word], 8 * (i / 2) + (i % 2 ? 0 : 4));
        store(out + (at + 8 * word + i) * lanes, T::round(decode_lanes(code, absmax)));
      }
    }
  }
};

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
  for (; s + kTransposed <= steps; s += kTransposed) transpose_words(rows, valid, s, out, width);
  for (; s < steps; ++s) scalar::transpose_words(rows, valid, s, out, width);
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
NF4LORA_INLINE void transposed_codes(const Packed& W, int64_t row, int64_t valid, int64_t k, int64_t depth,
                                     Emit&& emit) {
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
    transposed_codes(W, n + lane, rows, k, depth,
                     [&](const Int* codes, Float absmax, int64_t at)
                         __attribute__((always_inline)) { Math::decode_rows(codes, absmax, at, lanes, out); });
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
    pair_words(first, second, valid, out);
    for (int64_t lane = valid; lane < lanes; ++lane) out[lane] = 0;
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
  for (int64_t row = k; row < k + depth; row += Math::kStep, out += lanes) {
    // Rows lie far apart, which no hardware prefetcher follows. The address may lie behind the last
    // row, so it is computed as an integer.
    for (int i = 0; i < Math::kStep; ++i) {
      const int64_t ahead = (row + kAhead + i) * (W.K / 2) + n / 2;
      __builtin_prefetch(
          reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(W.qweight) + static_cast<uintptr_t>(ahead)));
    }
    for (int64_t lane = count; lane < lanes; ++lane) out[lane] = 0;
    if constexpr (Math::kStep == 1) {
      decode_row<typename Math::Tag>(W, row, n, count, reinterpret_cast<float*>(out));
    } else {
      const bool paired = row + 1 < k + depth;
      const int64_t blocks = W.K / W.blocksize;
      const uint8_t* qweight = W.qweight + row * (W.K / 2);
      for (int64_t column = n; column < n + count;) {
        const int64_t block = column / W.blocksize, stop = smaller(n + count, (block + 1) * W.blocksize);
        const float absmax = read_scale(W.scales, row * blocks + block);
        const float next = paired ? read_scale(W.scales, (row + 1) * blocks + block) : 0.0f;
        const uint8_t* bytes = qweight + column / 2;
        Math::decode_pair(bytes, paired ? bytes + W.K / 2 : bytes, absmax, next, stop - column, out + (column - n));
        column = stop;
      }
    }
  }
}

}  // namespace nf4lora::NF4LORA_ISA
