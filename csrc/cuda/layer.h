// The arguments that the ops of lora_linear share, as launchers take them: contiguous, aligned, alive until the launch.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../dropout.h"
#include "../lora.h"
#include "launch.h"

namespace nf4lora::cuda {

inline const void* data_of(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
inline const uint64_t* seed_of(const Dropout& dropout) { return static_cast<const uint64_t*>(data_of(dropout.seed)); }

// Contiguous, and at a multiple of 16 bytes, as loads of 16 bytes want it: a view into a larger tensor may need a copy.
inline Tensor aligned(const Tensor& tensor) {
  const Tensor whole = contiguous_view(tensor);
  return reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0 ? whole : torch::stable::clone(whole);
}
inline OptionalTensor aligned(const OptionalTensor& tensor) {
  if (!tensor) return std::nullopt;
  return aligned(*tensor);
}

// The tensor in this dtype, contiguous: the tensor itself where it is so already.
inline Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  return contiguous_view(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}
inline OptionalTensor in_dtype(const OptionalTensor& tensor, ScalarType dtype) {
  if (!tensor) return std::nullopt;
  return in_dtype(*tensor, dtype);
}
inline OptionalTensor float_bias(const OptionalTensor& bias) { return in_dtype(bias, ScalarType::Float); }  // [N]

// For the gradient of lora_A or lora_B: a tensor like it where it is wanted, else an empty one.
inline Tensor gradient_of(const OptionalTensor& factor, bool wanted, const Tensor& like) {
  if (!wanted) return empty({0}, ScalarType::Float, like);
  return empty(sizes_of(*factor), factor->scalar_type(), like);
}

class Weight {
 public:
  explicit Weight(const PackedTensors& weight)
      : codes_(aligned(weight.qweight)),
        scales_(contiguous_view(weight.absmax)),
        nested_(contiguous_view(weight.nested)) {}

  // Holds as long as this object does.
  Packed packed() const {
    const auto* codes = static_cast<const uint8_t*>(codes_.const_data_ptr());
    const void* scales = scales_.const_data_ptr();
    if (!nested_) return {codes, static_cast<const float*>(scales), nullptr, nullptr};
    return {codes, nullptr, static_cast<const uint8_t*>(scales), static_cast<const float*>(nested_->const_data_ptr())};
  }

 private:
  Tensor codes_, scales_;
  OptionalTensor nested_;
};

}  // namespace nf4lora::cuda
