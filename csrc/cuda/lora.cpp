// lora_linear and its backward for CUDA tensors: checks, the choice of a kernel, registration.
#include "lora.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "card.h"
#include "dispatch.h"
#include "kept_weights.h"
#include "stream.h"

namespace nf4lora::cuda {
namespace {

Kernel kernel_for(bool backward, const Tensor& rows, const LinearShape& shape) {
  const bool sixteen_bits = rows.scalar_type() != ScalarType::Float;
  return chosen({backward, sixteen_bits, shape.M, shape.N, shape.K}, current_card().architecture);
}

Outputs forward(const LoraLinear& arguments, const LinearShape& shape, void* stream, bool keeps) {
  switch (kernel_for(false, arguments.x, shape)) {
    case Kernel::few: return lora_linear_few(arguments, shape, stream);
    case Kernel::fused: return lora_linear_fused(arguments, shape, stream);
    default: return lora_linear_dense(arguments, shape, stream, keeps);
  }
}

Gradients backward(const LoraLinearBackward& arguments, const LinearShape& shape, void* stream) {
  if (kernel_for(true, arguments.dy, shape) == Kernel::fused) {
    return lora_linear_backward_fused(arguments, shape, stream);
  }
  return lora_linear_backward_dense(arguments, shape, stream);
}

Outputs lora_linear(const LoraLinear& arguments) {
  const bool keeps = keeps_next_weight();  // asked first: it is said of this call, whatever becomes of it
  const LinearShape shape = check_lora_linear(arguments);
  const OnDeviceOf device(arguments.x);
  return forward(arguments, shape, device.stream(), keeps);
}

Gradients lora_linear_backward(const LoraLinearBackward& arguments) {
  const LinearShape shape = check_lora_linear_backward(arguments);
  const OnDeviceOf device(arguments.dy);
  return backward(arguments, shape, device.stream());
}

bool are_dense(bool backward, const Tensor& rows, const std::vector<LinearShape>& shapes) {
  return std::all_of(shapes.begin(), shapes.end(),
                     [&](const LinearShape& shape) { return kernel_for(backward, rows, shape) == Kernel::dense; });
}

// A group that the dense kernel does not take whole is each of its layers in turn.
GroupOutputs lora_linear_group(const LoraLinearGroup& group) {
  const bool keeps = keeps_next_weight();
  const std::vector<LinearShape> shapes = check_lora_linear_group(group);
  const OnDeviceOf device(group.x);
  if (are_dense(false, group.x, shapes) && is_one_dense_group(group.x, group.lora_A, shapes)) {
    return lora_linear_group_dense(group, shapes, device.stream(), keeps);
  }
  Tensors ys, Ss;
  for (size_t i = 0; i < group.size(); ++i) {
    const auto [y, S] = forward(group.layer(i), shapes[i], device.stream(), keeps);
    ys.push_back(y), Ss.push_back(S);
  }
  return {ys, Ss};
}

GroupGradients lora_linear_group_backward(const LoraLinearGroupBackward& group) {
  const std::vector<LinearShape> shapes = check_lora_linear_group_backward(group);
  const OnDeviceOf device(group.dy[0]);
  if (are_dense(true, group.dy[0], shapes) && is_one_dense_group(group.dy[0], group.lora_A, shapes)) {
    return lora_linear_group_backward_dense(group, shapes, device.stream());
  }
  OptionalTensor sum;
  Tensors dAs(group.size()), dBs(group.size());
  for (size_t i = group.size(); i-- > 0;) {
    const auto [dx, dA, dB] = backward(group.layer(i), shapes[i], device.stream());
    dAs[i] = dA, dBs[i] = dB;
    sum = sum && group.need_dx ? sum_of(*sum, dx) : dx;
  }
  return {*sum, dAs, dBs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nf4lora, CUDA, m) {
  m.impl("lora_linear", TORCH_BOX((&LoraLinear::op<&lora_linear>)));
  m.impl("lora_linear_backward", TORCH_BOX((&LoraLinearBackward::op<&lora_linear_backward>)));
  m.impl("lora_linear_group", TORCH_BOX((&LoraLinearGroup::op<&lora_linear_group>)));
  m.impl("lora_linear_group_backward", TORCH_BOX((&LoraLinearGroupBackward::op<&lora_linear_group_backward>)));
}

}  // namespace nf4lora::cuda
