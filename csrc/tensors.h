// What the ops of every device share about torch's tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "dtype.h"

namespace nf4lora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

// Of a dtype that check_float has let through.
inline Dtype dtype_of(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? Dtype::bf16 : dtype == ScalarType::Half ? Dtype::f16 : Dtype::f32;
}
inline Dtype dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }
inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

inline int64_t last_size(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }

// The tensor itself where its memory is in order already, else a copy that is. (Asking the dispatcher costs a
// microsecond.)
inline Tensor contiguous_view(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline OptionalTensor contiguous_view(const OptionalTensor& tensor) {
  if (!tensor) return std::nullopt;
  return contiguous_view(*tensor);
}

// All dimensions but the last, multiplied.
inline int64_t rows_of(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) rows *= tensor.size(i);
  return rows;
}

// The shape of a tensor with its last dimension replaced.
inline std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> shape(tensor.sizes().begin(), tensor.sizes().end());
  shape.back() = last;
  return shape;
}

}  // namespace nf4lora
