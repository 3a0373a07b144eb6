// The checks of lora_linear as ops of their own, which return nothing: for kernels that are written in Python (unfused.py,
// sliced.py), so that they refuse bad input with the very words of the others. Not part of the catalogue: nobody else
// calls them.
#include <torch/csrc/stable/library.h>

#include "lora.h"

namespace nf4lora {
namespace {

void lora_linear(const LoraLinear& arguments) { check_lora_linear(arguments); }
void lora_linear_backward(const LoraLinearBackward& arguments) { check_lora_linear_backward(arguments); }

}  // namespace

STABLE_TORCH_LIBRARY(nf4lora_check, m) {
  m.def(renamed(kLoraLinearSchema, "lora_linear", "()").c_str());
  m.def(renamed(kLoraLinearBackwardSchema, "lora_linear_backward", "()").c_str());
}
STABLE_TORCH_LIBRARY_IMPL(nf4lora_check, CompositeExplicitAutograd, m) {
  m.impl("lora_linear", TORCH_BOX((&LoraLinear::op<&lora_linear>)));
  m.impl("lora_linear_backward", TORCH_BOX((&LoraLinearBackward::op<&lora_linear_backward>)));
}

}  // namespace nf4lora
