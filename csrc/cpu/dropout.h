// The mask of dropout on the CPU. Nothing is stored: a seed and an index give every element.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../dropout.h"
#include "instruction_set.h"
#include "memory.h"

namespace nf4lora {

// Of [M, K]: all bits of an element set where it is kept.
class DropoutMask {
 public:
  DropoutMask(const Loops& isa, const Dropout& dropout, int64_t K)
      : isa_(isa),
        active_(dropout.seed.has_value()),
        seed_(active_ ? *static_cast<const uint64_t*>(dropout.seed->const_data_ptr()) : 0),
        threshold_(dropout.threshold),
        K_(K) {}

  bool active() const { return active_; }
  void keep(int64_t row, int64_t column, int64_t count, uint32_t* out) const {
    isa_.dropout_mask(seed_, threshold_, row * K_ + column, count, out);
  }
  // x with the dropped elements zeroed, for rows [first, first + rows): [rows, K] of x's dtype.
  Scratch<uint8_t> masked_rows(const Dense& x, int64_t first, int64_t rows) const {
    const int64_t row_bytes = K_ * bytes_of(x.dtype);
    Scratch<uint8_t> out(rows * row_bytes);
    const auto* source = static_cast<const uint8_t*>(x.data) + first * row_bytes;
    uint8_t* target = out.get();
    torch::stable::parallel_for(0, rows, 1 + 4096 / (K_ + 1), [&](int64_t begin, int64_t end) {
      Scratch<uint32_t> kept(K_);
      for (int64_t row = begin; row < end; ++row) {
        keep(first + row, 0, K_, kept.get());
        isa_.keep(source + row * row_bytes, kept.get(), K_, x.dtype, target + row * row_bytes);
      }
    });
    return out;
  }

 private:
  const Loops& isa_;
  bool active_;
  uint64_t seed_;
  uint32_t threshold_;
  int64_t K_;
};

}  // namespace nf4lora
