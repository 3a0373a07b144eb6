// The arguments of adamw_step_, which ops.cpp names for torch, as a struct that the check and the kernels of every device
// take. It holds references, which live as long as torch's call.
#pragma once

#include "adamw.h"
#include "tensors.h"

namespace nf4lora {

struct AdamWStep {
  const Tensors& params;
  const Tensors& grads;
  const Tensors& exp_avgs;
  const Tensors& exp_avg_sqs;
  const Tensors& absmaxs;  // none: the moments are float32
  const Tensor& skipped;
  const OptionalTensor& scale;
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step;  // counts from 1

  bool eight_bits() const { return !absmaxs.empty(); }
  AdamW numbers() const { return adamw_numbers(lr, beta1, beta2, eps, weight_decay, step); }

  // TORCH_BOX (torch's adapter from its untyped stack to a C++ function) calls this with the arguments in the order of the
  // schema, for a function of the struct.
  template <auto compute>
  static void op(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                 const Tensors& absmaxs, const Tensor& skipped, const OptionalTensor& scale, double lr, double beta1,
                 double beta2, double eps, double weight_decay, int64_t step) {
    compute({params, grads, exp_avgs, exp_avg_sqs, absmaxs, skipped, scale, lr, beta1, beta2, eps, weight_decay, step});
  }
};

}  // namespace nf4lora
