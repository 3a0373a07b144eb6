// lora_linear for CUDA tensors with few rows: allocation. The kernels are in lora_few.cu.
#include "launch.h"
#include "layer.h"
#include "lora.h"
#include "stream.h"

namespace nf4lora::cuda {

Outputs lora_linear_few(const LoraLinear& arguments, const LinearShape& shape, void* stream) {
  const Tensor in = aligned(arguments.x);
  const Weight weight(arguments.weight);
  const Adapter& adapter = arguments.adapter;
  const Dropout dropout(adapter);
  const OptionalTensor A = contiguous_view(adapter.A), B = contiguous_view(adapter.B);
  const OptionalTensor offsets = float_bias(arguments.bias);

  Tensor y = empty(with_last(in, shape.N), in.scalar_type(), in);
  Tensor S = empty({shape.M, shape.R}, in.scalar_type(), in);

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
  require_launched("lora_linear", lora_few(few, stream));
  return {y, S};
}

}  // namespace nf4lora::cuda
