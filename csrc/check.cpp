// Checks of check.h as ops of their own, which return nothing: for kernels that are written in Python (unfused.py), so
// that they refuse bad input with the very words of the others. Not part of the catalogue: nobody else calls them.
#include "check.h"

#include <torch/csrc/stable/library.h>

namespace nf4lora {
namespace {

void lora_linear(const Tensor& x, const Tensor& qweight, const Tensor& absmax, const OptionalTensor& nested,
                 const OptionalTensor& bias, const OptionalTensor& lora_A, const OptionalTensor& lora_B, double dropout,
                 const OptionalTensor& seed, int64_t blocksize) {
  check_lora_linear("lora_linear", x, qweight, absmax, nested, bias, lora_A, lora_B, dropout, seed, blocksize);
}

void lora_linear_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& S, const Tensor& qweight,
                          const Tensor& absmax, const OptionalTensor& nested, const OptionalTensor& lora_A,
                          const OptionalTensor& lora_B, double dropout, const OptionalTensor& seed, int64_t blocksize) {
  check_lora_linear_backward(dy, x, S, qweight, absmax, nested, lora_A, lora_B, dropout, seed, blocksize);
}

}  // namespace

STABLE_TORCH_LIBRARY(nf4lora_check, m) {
  m.def(
      "lora_linear(Tensor x, Tensor qweight, Tensor absmax, Tensor? nested, Tensor? bias, Tensor? lora_A, "
      "Tensor? lora_B, float dropout, Tensor? seed, int blocksize) -> ()");
  m.def(
      "lora_linear_backward(Tensor dy, Tensor? x, Tensor? S, Tensor qweight, Tensor absmax, Tensor? nested, "
      "Tensor? lora_A, Tensor? lora_B, float dropout, Tensor? seed, int blocksize) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(nf4lora_check, CompositeExplicitAutograd, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
}

}  // namespace nf4lora
