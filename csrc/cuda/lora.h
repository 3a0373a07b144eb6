// lora_linear and its backward for CUDA tensors, by each kernel. The arguments have been checked, the device of x or dy is
// current, and everything is asynchronous on the stream. Which kernel takes what: dispatch.h.
#pragma once

#include <tuple>

#include "../check/lora.h"
#include "../lora.h"

namespace nf4lora::cuda {

using Outputs = std::tuple<Tensor, Tensor>;            // y, S
using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // dx, dA, dB

Outputs lora_linear_few(const LoraLinear& arguments, const LinearShape& shape, void* stream);
Outputs lora_linear_fused(const LoraLinear& arguments, const LinearShape& shape, void* stream);
// keeps: W for the backward pass (kept_weights.h)
Outputs lora_linear_dense(const LoraLinear& arguments, const LinearShape& shape, void* stream, bool keeps);

Gradients lora_linear_backward_fused(const LoraLinearBackward& arguments, const LinearShape& shape, void* stream);
Gradients lora_linear_backward_dense(const LoraLinearBackward& arguments, const LinearShape& shape, void* stream);

}  // namespace nf4lora::cuda
