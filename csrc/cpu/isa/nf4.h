// NF4 in vectors. Decoding: a block holds 16 different weights, so they are made once and looked up by code. Encoding:
// the largest magnitude of a block, then the nearest code of each weight over it.
#pragma once

#include "absmax.h"
#include "dtype.h"

namespace nf4lora::NF4LORA_ISA {

// Columns [k, k + count) of one row as floats rounded to T; k and count are multiples of kLanes.
template <class T>
NF4LORA_INLINE void decode_row(const Packed& W, int64_t row, int64_t k, int64_t count, float* out) {
  const uint8_t* qweight = W.qweight + row * (W.K / 2);
  const int64_t end = k + count;
  while (k < end) {
    const int64_t block = k / W.blocksize, stop = smaller(end, (block + 1) * W.blocksize);
    const WeightTable table = weight_table<T>(read_scale(W.scales, row * (W.K / W.blocksize) + block));
    for (; k < stop; k += kLanes, out += kLanes) store(out, decode_weights(qweight + k / 2, table));
  }
}

static void nf4_dequantize(const uint8_t* qweight, const float* absmax, int64_t begin, int64_t end, int64_t blocksize,
                           Dtype dtype, bool stream, void* weight) {
  with_dtype(dtype, [&](auto tag) __attribute__((always_inline)) {
    using T = decltype(tag);
    auto* out = static_cast<typename T::Element*>(weight);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * blocksize, last = first + blocksize;
      if constexpr (WordTable<T>::kExists) {
        const WordTable<T> table = WordTable<T>::of(absmax[block]);
        for (int64_t i = first; i < last; i += table.kWeights) table.decode(qweight + i / 2, stream, out + i);
        continue;
      }
      const WeightTable table = weight_table<F32>(absmax[block]);
      for (int64_t i = first; i < last; i += kLanes) {
        const Float value = decode_weights(qweight + i / 2, table);
        if constexpr (__is_same(T, F32)) {
          if (stream) {
            store_streamed(out + i, value);
            continue;
          }
        }
        T::store(out + i, value);
      }
    }
  });
  if (stream) finish_streamed();
}

inline constexpr float kMostInverse = 1.0f / kMinAbsmax;

static int64_t nf4_quantize(const void* weight, Dtype dtype, int64_t begin, int64_t end, int64_t blocksize,
                            uint8_t* qweight, float* absmax) {
  const KeepDenormals keep;
  return with_dtype(dtype, [&](auto tag) __attribute__((always_inline)) -> int64_t {
    using T = decltype(tag);
    const auto* in = static_cast<const typename T::Element*>(weight);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * blocksize;
      Int magnitudes = no_bits();
      for (int64_t i = 0; i < blocksize; i += kEncoded) magnitudes = larger_magnitudes<T>(in + first + i, magnitudes);
      const uint32_t largest = largest_lane(magnitudes);
      if (largest >= 0x7F800000) return block;
      const float magnitude = float_of(largest);
      absmax[block] = magnitude;
      // Compared as integers: kMinAbsmax lies below 2^-126, and may count as zero among floats.
      const Float inverse = broadcast(largest > bits_of(kMinAbsmax) ? 1.0f / magnitude : kMostInverse);
      for (int64_t i = first; i < first + blocksize; i += kEncoded) encode_weights<T>(in + i, inverse, qweight + i / 2);
    }
    return -1;
  });
}

}  // namespace nf4lora::NF4LORA_ISA
