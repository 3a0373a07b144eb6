// lora_linear and its backward for CUDA tensors: checks, the choice of a kernel, registration.
#include "lora.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

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

Outputs lora_linear(const LoraLinear& arguments) {
  const bool keeps = keeps_next_weight();  // asked first: it is said of this call, whatever becomes of it
  const LinearShape shape = check_lora_linear(arguments);
  const OnDeviceOf device(arguments.x);
  switch (kernel_for(false, arguments.x, shape)) {
    case Kernel::few: return lora_linear_few(arguments, shape, device.stream());
    case Kernel::fused: return lora_linear_fused(arguments, shape, device.stream());
    default: return lora_linear_dense(arguments, shape, device.stream(), keeps);
  }
}

Gradients lora_linear_backward(const LoraLinearBackward& arguments) {
  const LinearShape shape = check_lora_linear_backward(arguments);
  const OnDeviceOf device(arguments.dy);
  if (kernel_for(true, arguments.dy, shape) == Kernel::fused) {
    return lora_linear_backward_fused(arguments, shape, device.stream());
  }
  return lora_linear_backward_dense(arguments, shape, device.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nf4lora, CUDA, m) {
  m.impl("lora_linear", TORCH_BOX((&LoraLinear::op<&lora_linear>)));
  m.impl("lora_linear_backward", TORCH_BOX((&LoraLinearBackward::op<&lora_linear_backward>)));
}

}  // namespace nf4lora::cuda
