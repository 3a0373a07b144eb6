// What the ops of every device share about torch's tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtype.h"

namespace nf4lora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;

// Of a dtype that check_float has let through.
inline Dtype dtype_of(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? Dtype::bf16 : dtype == ScalarType::Half ? Dtype::f16 : Dtype::f32;
}
inline Dtype dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }
inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// What torch says of the last failure of a call in this thread; torch 2.13 and later have it.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

inline std::string what_torch_says() {
  if (!torch_exception_get_what_without_backtrace) return "";
  return std::string("; torch says: ") + torch_exception_get_what_without_backtrace();
}

[[noreturn]] inline void fail_empty(bool on_cpu, int64_t values) {
  throw std::runtime_error((on_cpu ? "out of memory: nf4lora asked for " : "CUDA out of memory. nf4lora asked for ") +
                           std::to_string(values) + " values" + what_torch_says());
}

// A tensor of these sizes on the device of `like`, its values not set. (torch::stable::new_empty calls the dispatcher by
// name, which takes a microsecond.)
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = count;
    count *= std::max<int64_t>(sizes[i], 1);
  }
  int32_t device_type = 0, device_index = 0;
  aoti_torch_get_device_type(like.get(), &device_type);
  aoti_torch_get_device_index(like.get(), &device_index);
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), code, device_type,
                               device_index, &made) != 0) {
    fail_empty(like.is_cpu(), count);
  }
  return Tensor(made);
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }
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

// Two tensors of one shape and dtype. (An addition is not among the functions of torch's stable interface.)
inline Tensor sum_of(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }

// All dimensions but the last, multiplied.
inline int64_t rows_of(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) rows *= tensor.size(i);
  return rows;
}

// The shape of a tensor with its last dimension replaced.
inline std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> shape = sizes_of(tensor);
  shape.back() = last;
  return shape;
}

}  // namespace nf4lora
