// lora_linear for CUDA tensors with few rows: checks, allocation, registration. The kernels are in lora_few.cu. The op is
// no part of the catalogue: python/nf4lora/ops/kernels calls it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "../check/lora.h"
#include "launch.h"
#include "layer.h"
#include "stream.h"

namespace nf4lora::cuda {
namespace {

std::tuple<Tensor, Tensor> lora_linear_few(const LoraLinear& arguments) {
  const LinearShape shape = check_lora_linear(arguments);
  const OnDeviceOf device(arguments.x);
  const Tensor in = aligned(arguments.x);
  const Weight weight(arguments.weight);
  const Adapter& adapter = arguments.adapter;
  const Dropout dropout(adapter);
  const OptionalTensor A = contiguous_view(adapter.A), B = contiguous_view(adapter.B);
  const OptionalTensor offsets = float_bias(arguments.bias);

  Tensor y = torch::stable::new_empty(in, with_last(in, shape.N), in.scalar_type());
  Tensor S = torch::stable::new_empty(in, {shape.M, shape.R}, in.scalar_type());

  FewRows few{};
  few.dtype = dtype_of(in);
  few.x = in.const_data_ptr();
  few.W = weight.packed();
  few.bias = static_cast<const float*>(data_of(offsets));
  few.lora_A = data_of(A);
  few.lora_B = data_of(B);
  if (A) few.dtype_of_A = dtype_of(*A), few.dtype_of_B = dtype_of(*B);
  few.seed = seed_of(dropout);
  few.threshold = dropout.threshold;
  few.inverse_keep = static_cast<float>(dropout.inverse_keep);
  few.scaling = static_cast<float>(adapter.scaling);
  few.S = S.mutable_data_ptr();
  few.y = y.mutable_data_ptr();
  few.M = shape.M, few.N = shape.N, few.K = shape.K, few.R = shape.R, few.blocksize = arguments.weight.blocksize;
  require_launched("lora_linear", lora_few(few, device.stream()));
  return {y, S};
}

}  // namespace

STABLE_TORCH_LIBRARY(nf4lora_cuda, m) { m.def(renamed(kLoraLinearSchema, "lora_linear_few").c_str()); }
STABLE_TORCH_LIBRARY_IMPL(nf4lora_cuda, CUDA, m) {
  m.impl("lora_linear_few", TORCH_BOX((&LoraLinear::op<&lora_linear_few>)));
}

}  // namespace nf4lora::cuda
