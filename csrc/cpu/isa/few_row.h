// A row of W in chunks, decoded to vectors that are multiplied as they come: how a chunk of W and of x is laid out.
//
// A sum over k may take its terms in any order. So nibbles are used in the order in which shifts bring them out of the
// packed bytes, and x is laid out in that order once, instead of every weight being brought into the order of k. The
// order is the set's own: Chunk<T>::column, and a drawing above PairRow in avx512bf16.h.
#pragma once

#include "nf4.h"

namespace nf4lora::NF4LORA_ISA {

inline constexpr int kSteps = 64;                      // 32-bit elements in a chunk: floats, or pairs of bfloat16
inline constexpr int kChunkVectors = kSteps / kLanes;  // vectors in a chunk
inline constexpr int64_t kChunkBytes = 4 * kSteps;     // of x

// How x and W meet is said by Math, which has
//
//   Tag, Vector    the dtype of x; a vector of W's elements
//   kColumns       of a chunk
//   prepare        a chunk of x with `count` columns in the order of Chunk<T>, zeros behind them
//   decode         each(part, vector) for the vectors of a chunk of W; one scale for 64 columns or, kSmall, one for 32
//   put            such a vector into memory
//   multiply_add   a vector of sums + a vector of W times one of x; or + one element of W times x in the lanes

// x widened to float32, W a table of float32: any instruction set, any dtype.
template <class T>
struct Widened {
  using Tag = T;
  using Vector = Float;
  static constexpr int64_t kColumns = 64;

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

  template <bool kSmall, class Each>
  NF4LORA_INLINE void decode(const uint8_t* bytes, const float* scales, Each&& each) {
    Chunk<T>::template decode<kSmall>(bytes, scales, each);
  }

 private:
  struct Order {
    uint8_t column[kColumns];
  };
  static constexpr Order order() {
    Order order{};
    for (int i = 0; i < kColumns; ++i) order.column[i] = static_cast<uint8_t>(Chunk<T>::column(i));
    return order;
  }
  static constexpr Order kOrder = order();
};

}  // namespace nf4lora::NF4LORA_ISA
