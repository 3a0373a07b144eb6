// What the CUDA ops share about torch's tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../check.h"
#include "launch.h"

namespace nf4lora::cuda {

inline Dtype dtype_of(ScalarType dtype) {
  return dtype == ScalarType::Float ? Dtype::f32 : dtype == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::f16;
}
inline Dtype dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

// The shape of tensor with its last dimension replaced.
inline std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> shape(tensor.sizes().begin(), tensor.sizes().end());
  shape.back() = last;
  return shape;
}

}  // namespace nf4lora::cuda
