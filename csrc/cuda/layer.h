// The arguments that the ops of lora_linear share, as launchers take them: contiguous, aligned, alive until the launch.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../check.h"
#include "launch.h"
#include "tensors.h"

namespace nf4lora::cuda {

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  if (!tensor) return std::nullopt;
  return torch::stable::contiguous(*tensor);
}
inline const void* data_of(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// Contiguous, and at a multiple of 16 bytes, as loads of 16 bytes want it: a view into a larger tensor may need a copy.
inline Tensor aligned(const Tensor& tensor) {
  const Tensor whole = torch::stable::contiguous(tensor);
  return reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0 ? whole : torch::stable::clone(whole);
}

// [N] float32.
inline OptionalTensor float_bias(const OptionalTensor& bias) {
  if (!bias) return std::nullopt;
  return torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
}

// The packed weight.
struct Weight {
  Tensor codes, scales;
  OptionalTensor nested;

  Weight(const Tensor& qweight, const Tensor& absmax, const OptionalTensor& nested_absmax)
      : codes(aligned(qweight)), scales(torch::stable::contiguous(absmax)), nested(contiguous(nested_absmax)) {}

  template <class Arguments>
  void into(Arguments& arguments) const {
    arguments.qweight = static_cast<const uint8_t*>(codes.const_data_ptr());
    if (nested) {
      arguments.absmax_q = static_cast<const uint8_t*>(scales.const_data_ptr());
      arguments.nested = static_cast<const float*>(nested->const_data_ptr());
    } else {
      arguments.absmax = static_cast<const float*>(scales.const_data_ptr());
    }
  }
};

struct Dropout {
  OptionalTensor seed;  // [1] int64; none where nothing is dropped
  uint32_t threshold = 0;
  double inverse_keep = 1.0;

  Dropout(double probability, const OptionalTensor& drawn, int64_t rank) {
    if (probability == 0.0 || rank == 0) return;
    seed = contiguous(drawn);
    threshold = dropout_threshold(probability);
    inverse_keep = 1.0 / (1.0 - probability);
  }
  const uint64_t* word() const { return static_cast<const uint64_t*>(data_of(seed)); }
};

}  // namespace nf4lora::cuda
