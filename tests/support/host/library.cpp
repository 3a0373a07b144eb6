// The kernels of lora_linear for CUDA tensors as ops for CPU tensors, with the launchers of launchers.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <stdexcept>

#include "cuda/dispatch.h"
#include "cuda/kept_weights.h"
#include "cuda/lora.h"
#include "cuda/stream.h"
#include "launchers.h"

namespace nf4lora::cuda {

int64_t most_workspace = int64_t{512} << 20;
int64_t workspace_bytes() { return most_workspace; }

OnDeviceOf::OnDeviceOf(const Tensor&) : stream_(nullptr) {}
void require_launched(const char* op, Error error) {
  if (error) throw std::runtime_error(std::string(op) + ": " + error);
}

namespace {

template <Outputs (*kernel)(const LoraLinear&, const LinearShape&, void*)>
Outputs forward(const LoraLinear& arguments) {
  return kernel(arguments, check_lora_linear(arguments), nullptr);
}
Outputs dense(const LoraLinear& arguments, const LinearShape& shape, void* stream) {
  return lora_linear_dense(arguments, shape, stream, keeps_next_weight());
}
template <Gradients (*kernel)(const LoraLinearBackward&, const LinearShape&, void*)>
Gradients backward(const LoraLinearBackward& arguments) {
  return kernel(arguments, check_lora_linear_backward(arguments), nullptr);
}

GroupOutputs group(const LoraLinearGroup& arguments) {
  const auto shapes = check_lora_linear_group(arguments);
  require_value(is_one_dense_group(arguments.x, arguments.lora_A, shapes), "not one group");
  return lora_linear_group_dense(arguments, shapes, nullptr, keeps_next_weight());
}
GroupGradients group_backward(const LoraLinearGroupBackward& arguments) {
  const auto shapes = check_lora_linear_group_backward(arguments);
  require_value(is_one_dense_group(arguments.dy[0], arguments.lora_A, shapes), "not one group");
  return lora_linear_group_backward_dense(arguments, shapes, nullptr);
}

}  // namespace

#define FORWARD                                                                                              \
  "(Tensor x, Tensor qweight, Tensor absmax, Tensor? nested, Tensor? bias, Tensor? lora_A, Tensor? lora_B, " \
  "float scaling, float dropout, Tensor? seed, int blocksize) -> (Tensor y, Tensor S)"
#define BACKWARD                                                                                                    \
  "(Tensor dy, Tensor? x, Tensor? S, Tensor qweight, Tensor absmax, Tensor? nested, Tensor? lora_A, "               \
  "Tensor? lora_B, float scaling, float dropout, Tensor? seed, int blocksize, bool need_dx) -> (Tensor dx, Tensor " \
  "dA, Tensor dB)"

STABLE_TORCH_LIBRARY(nf4lora_host, m) {
  m.def("few" FORWARD);
  m.def("fused" FORWARD);
  m.def("dense" FORWARD);
  m.def("fused_backward" BACKWARD);
  m.def("dense_backward" BACKWARD);
  m.def(
      "group(Tensor x, Tensor[] qweight, Tensor[] absmax, Tensor?[] nested, Tensor?[] bias, Tensor[] lora_A, "
      "Tensor[] lora_B, float scaling, int blocksize) -> (Tensor[] y, Tensor[] S)");
  m.def(
      "group_backward(Tensor[] dy, Tensor? x, Tensor[] S, Tensor[] qweight, Tensor[] absmax, Tensor?[] nested, "
      "Tensor[] lora_A, Tensor[] lora_B, float scaling, int blocksize, bool need_dx) -> (Tensor dx, Tensor[] dA, "
      "Tensor[] dB)");
}
STABLE_TORCH_LIBRARY_IMPL(nf4lora_host, CPU, m) {
  m.impl("few", TORCH_BOX((&LoraLinear::op<&forward<&lora_linear_few>>)));
  m.impl("fused", TORCH_BOX((&LoraLinear::op<&forward<&lora_linear_fused>>)));
  m.impl("dense", TORCH_BOX((&LoraLinear::op<&forward<&dense>>)));
  m.impl("fused_backward", TORCH_BOX((&LoraLinearBackward::op<&backward<&lora_linear_backward_fused>>)));
  m.impl("dense_backward", TORCH_BOX((&LoraLinearBackward::op<&backward<&lora_linear_backward_dense>>)));
  m.impl("group", TORCH_BOX((&LoraLinearGroup::op<&group>)));
  m.impl("group_backward", TORCH_BOX((&LoraLinearGroupBackward::op<&group_backward>)));
}

}  // namespace nf4lora::cuda

// For ctypes: the names of the launchers called since the last question, one a line, into at most `size` bytes; and the
// work space that a call may take.
extern "C" __attribute__((visibility("default"))) void nf4lora_host_launches(char* text, int size) {
  std::string names;
  for (const std::string& name : launches) names += name + "\n";
  launches.clear();
  names.copy(text, static_cast<size_t>(size - 1));
  text[std::min<size_t>(names.size(), static_cast<size_t>(size - 1))] = 0;
}
extern "C" __attribute__((visibility("default"))) void nf4lora_host_keep(int64_t bytes) {
  nf4lora::cuda::set_most_kept_bytes(bytes);
  nf4lora::cuda::keep_next_weight();
}
extern "C" __attribute__((visibility("default"))) void nf4lora_host_drop() { nf4lora::cuda::drop_kept_weights(); }
extern "C" __attribute__((visibility("default"))) void nf4lora_host_workspace(int64_t bytes) {
  nf4lora::cuda::most_workspace = bytes;
}
