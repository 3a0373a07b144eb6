// What the CUDA ops share about torch's tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../check.h"
#include "launch.h"

namespace nf4lora::cuda {

inline Dtype dtype_of(ScalarType dtype) {
  return dtype == ScalarType::Float ? Dtype::f32 : dtype == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::f16;
}
inline Dtype dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

}  // namespace nf4lora::cuda
