// Compiled instead of the rest of this folder where the build found no CUDA compiler: every op of the catalogue answers
// a CUDA tensor with what is missing and how to get it, where torch would only say that no kernel is registered.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../adamw_step.h"
#include "../lora.h"
#include "paged_module.h"

namespace nf4lora::cuda {
namespace {

// An op's name as a template argument, so that each function below knows which op it stands for.
template <size_t N>
struct Name {
  char text[N];
  constexpr Name(const char (&literal)[N]) { std::copy_n(literal, N, text); }  // NOLINT: implicit on purpose
};

// Takes its arguments typed, not as a raw stack, so that torch's box frees them when this throws.
template <Name op, class Signature>
struct Absent;
template <Name op, class Result, class... Arguments>
struct Absent<op, Result(Arguments...)> {
  static Result call(Arguments...) {
    const std::string name(op.text);
    throw std::runtime_error(
        name.substr(0, name.find('.')) +
        ": a CUDA tensor needs a build of nf4lora with CUDA, got one for the CPU only; put nvcc on "
        "PATH and reinstall: pip install --force-reinstall --no-deps --no-cache-dir .");
  }
};

template <Name op, class Signature>
void impl(torch::stable::detail::StableLibrary& library) {
  library.impl(op.text, TORCH_BOX((&Absent<op, Signature>::call)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nf4lora, CUDA, m) {
  using Pair = std::tuple<Tensor, Tensor>;
  using Triple = std::tuple<Tensor, Tensor, Tensor>;
  impl<"nf4_quantize", Pair(Tensor, int64_t)>(m);
  impl<"nf4_dequantize", Tensor(Tensor, Tensor, int64_t, ScalarType)>(m);
  impl<"nf4_dequantize.out", void(Tensor, Tensor, int64_t, Tensor)>(m);
  impl<"absmax_quantize", Pair(Tensor)>(m);
  impl<"absmax_dequantize", Tensor(Tensor, Tensor)>(m);
  m.impl("lora_linear", TORCH_BOX((&LoraLinear::op<&Absent<"lora_linear", Pair(const LoraLinear&)>::call>)));
  m.impl(
      "lora_linear_backward",
      TORCH_BOX((&LoraLinearBackward::op<&Absent<"lora_linear_backward", Triple(const LoraLinearBackward&)>::call>)));
  using Lists = std::tuple<Tensors, Tensors>;
  using Gradients = std::tuple<Tensor, Tensors, Tensors>;
  m.impl("lora_linear_group",
         TORCH_BOX((&LoraLinearGroup::op<&Absent<"lora_linear_group", Lists(const LoraLinearGroup&)>::call>)));
  m.impl("lora_linear_group_backward",
         TORCH_BOX((&LoraLinearGroupBackward::op<
                    &Absent<"lora_linear_group_backward", Gradients(const LoraLinearGroupBackward&)>::call>)));
  m.impl("adamw_step_", TORCH_BOX((&AdamWStep::op<&Absent<"adamw_step_", void(const AdamWStep&)>::call>)));
}

void bind_pager(pybind11::module_&) {}  // python/nf4lora/optim/arena_cuda.py says what is missing

}  // namespace nf4lora::cuda
