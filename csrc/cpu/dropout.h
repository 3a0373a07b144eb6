// Dropout of the LoRA branch. Nothing is stored: a seed and an index give every element of the mask.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "instruction_set.h"
#include "tensors.h"

namespace nf4lora {

// The dropout mask over [M, K]: all bits of an element set where it is kept.
struct Dropout {
  const Loops& isa;
  double probability;
  uint64_t seed;
  int64_t K;

  bool active() const { return probability > 0.0; }
  double inverse_keep() const { return active() ? 1.0 / (1.0 - probability) : 1.0; }
  void keep(int64_t row, int64_t column, int64_t count, uint32_t* out) const {
    isa.dropout_mask(seed, dropout_threshold(probability), row * K + column, count, out);
  }
};

inline Dropout dropout_of(const Loops& isa, double probability, const OptionalTensor& seed, const LinearShape& shape) {
  const bool active = probability > 0.0 && shape.R > 0;
  return {isa, active ? probability : 0.0,
          active ? *static_cast<const uint64_t*>(contiguous_view(*seed).const_data_ptr()) : 0, shape.K};
}

// x with the dropped elements zeroed, for rows [first, first + rows): [rows, K] of x's dtype.
inline Scratch<uint8_t> masked_rows(const Dropout& dropout, const Dense& x, int64_t first, int64_t rows) {
  const int64_t K = dropout.K, row_bytes = K * bytes_of(x.dtype);
  Scratch<uint8_t> out(rows * row_bytes);
  const auto* source = static_cast<const uint8_t*>(x.data) + first * row_bytes;
  uint8_t* target = out.get();
  torch::stable::parallel_for(0, rows, 1 + 4096 / (K + 1), [&](int64_t begin, int64_t end) {
    Scratch<uint32_t> keep(K);
    for (int64_t row = begin; row < end; ++row) {
      dropout.keep(first + row, 0, K, keep.get());
      dropout.isa.keep(source + row * row_bytes, keep.get(), K, x.dtype, target + row * row_bytes);
    }
  });
  return out;
}

}  // namespace nf4lora
