// lora_linear for CUDA tensors with few rows: checks, allocation, registration. The kernels are in lora_few.cu. The op is
// no part of the catalogue: cuda.py, which chooses between kernels, calls it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../format.h"
#include "launch.h"
#include "stream.h"
#include "tensors.h"

namespace nf4lora::cuda {
namespace {

std::optional<Tensor> contiguous(const OptionalTensor& tensor) {
  if (!tensor) return std::nullopt;
  return torch::stable::contiguous(*tensor);
}
const void* data_of(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor> lora_linear_few(const Tensor& x, const Tensor& qweight, const Tensor& absmax,
                                           const OptionalTensor& nested, const OptionalTensor& bias,
                                           const OptionalTensor& lora_A, const OptionalTensor& lora_B, double scaling,
                                           double dropout, const OptionalTensor& seed, int64_t blocksize) {
  const LinearShape shape =
      check_lora_linear("lora_linear", x, qweight, absmax, nested, bias, lora_A, lora_B, dropout, seed, blocksize);
  const OnDeviceOf device(x);
  const Tensor in = torch::stable::contiguous(x), codes = torch::stable::contiguous(qweight);
  const Tensor scales = torch::stable::contiguous(absmax);
  const auto scales_of_scales = contiguous(nested), A = contiguous(lora_A), B = contiguous(lora_B);
  std::optional<Tensor> offsets;
  if (bias) offsets = torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
  const bool drops = dropout > 0.0 && shape.R > 0;
  const auto word = contiguous(drops ? seed : OptionalTensor{});

  std::vector<int64_t> out_shape(in.sizes().begin(), in.sizes().end());
  out_shape.back() = shape.N;
  Tensor y = torch::stable::new_empty(in, out_shape, x.scalar_type());
  Tensor S = torch::stable::new_empty(in, {shape.M, shape.R}, x.scalar_type());

  FewRows few{};
  few.dtype = dtype_of(in);
  few.x = in.const_data_ptr();
  few.qweight = static_cast<const uint8_t*>(codes.const_data_ptr());
  if (nested) {
    few.absmax_q = static_cast<const uint8_t*>(scales.const_data_ptr());
    few.nested = static_cast<const float*>(data_of(scales_of_scales));
  } else {
    few.absmax = static_cast<const float*>(scales.const_data_ptr());
  }
  few.bias = static_cast<const float*>(data_of(offsets));
  few.lora_A = data_of(A);
  few.lora_B = data_of(B);
  if (A) few.dtype_of_A = dtype_of(*A), few.dtype_of_B = dtype_of(*B);
  few.seed = static_cast<const uint64_t*>(data_of(word));
  few.threshold = drops ? dropout_threshold(dropout) : 0;
  few.inverse_keep = drops ? static_cast<float>(1.0 / (1.0 - dropout)) : 1.0f;
  few.scaling = static_cast<float>(scaling);
  few.S = S.mutable_data_ptr();
  few.y = y.mutable_data_ptr();
  few.M = shape.M, few.N = shape.N, few.K = shape.K, few.R = shape.R, few.blocksize = blocksize;
  require_launched("lora_linear", lora_few(few, device.stream()));
  return {y, S};
}

}  // namespace

STABLE_TORCH_LIBRARY(nf4lora_cuda, m) {
  m.def(
      "lora_linear_few(Tensor x, Tensor qweight, Tensor absmax, Tensor? nested, Tensor? bias, Tensor? lora_A, "
      "Tensor? lora_B, float scaling, float dropout, Tensor? seed, int blocksize) -> (Tensor y, Tensor S)");
}
STABLE_TORCH_LIBRARY_IMPL(nf4lora_cuda, CUDA, m) { m.impl("lora_linear_few", TORCH_BOX(&lora_linear_few)); }

}  // namespace nf4lora::cuda
