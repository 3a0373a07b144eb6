// lora_linear and its backward for CUDA tensors, by each kernel. The arguments have been checked, the device of x or dy is
// current, and everything is asynchronous on the stream. Which kernel takes what: dispatch.h.
#pragma once

#include <tuple>
#include <vector>

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

using GroupOutputs = std::tuple<Tensors, Tensors>;            // y, S
using GroupGradients = std::tuple<Tensor, Tensors, Tensors>;  // dx, dA, dB

// Whether a group of these shapes, all of which the dense kernel computes, can be computed together; rows are x or a dy.
bool is_one_dense_group(const Tensor& rows, const Tensors& lora_A, const std::vector<LinearShape>& shapes);
GroupOutputs lora_linear_group_dense(const LoraLinearGroup& group, const std::vector<LinearShape>& shapes, void* stream,
                                     bool keeps);
GroupGradients lora_linear_group_backward_dense(const LoraLinearGroupBackward& group,
                                                const std::vector<LinearShape>& shapes, void* stream);

}  // namespace nf4lora::cuda
