// lora_linear for CUDA tensors with few rows: checks, allocation, registration. The kernels are in lora_few.cu. The op is
// no part of the catalogue: dispatch.py, which chooses between kernels, calls it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "../check.h"
#include "launch.h"
#include "layer.h"
#include "stream.h"

namespace nf4lora::cuda {
namespace {

std::tuple<Tensor, Tensor> lora_linear_few(const Tensor& x, const Tensor& qweight, const Tensor& absmax,
                                           const OptionalTensor& nested, const OptionalTensor& bias,
                                           const OptionalTensor& lora_A, const OptionalTensor& lora_B, double scaling,
                                           double probability, const OptionalTensor& seed, int64_t blocksize) {
  const LinearShape shape =
      check_lora_linear("lora_linear", x, qweight, absmax, nested, bias, lora_A, lora_B, probability, seed, blocksize);
  const OnDeviceOf device(x);
  const Tensor in = aligned(x);
  const Weight weight(qweight, absmax, nested);
  const Dropout dropout(probability, seed, shape.R);
  const auto A = contiguous(lora_A), B = contiguous(lora_B);
  const OptionalTensor offsets = float_bias(bias);

  Tensor y = torch::stable::new_empty(in, with_last(in, shape.N), x.scalar_type());
  Tensor S = torch::stable::new_empty(in, {shape.M, shape.R}, x.scalar_type());

  FewRows few{};
  few.dtype = dtype_of(in);
  few.x = in.const_data_ptr();
  weight.into(few);
  few.bias = static_cast<const float*>(data_of(offsets));
  few.lora_A = data_of(A);
  few.lora_B = data_of(B);
  if (A) few.dtype_of_A = dtype_of(*A), few.dtype_of_B = dtype_of(*B);
  few.seed = dropout.word();
  few.threshold = dropout.threshold;
  few.inverse_keep = static_cast<float>(dropout.inverse_keep);
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
