// The arguments of adamw_step_, as torch's box holds them while it calls. ops.cpp names them for torch, here they become a
// struct, which the check and the kernels of every device take.
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

  // What torch's box calls, argument by argument in the order of the schema, for a function of the struct.
  template <auto compute>
  static void op(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                 const Tensors& absmaxs, const Tensor& skipped, const OptionalTensor& scale, double lr, double beta1,
                 double beta2, double eps, double weight_decay, int64_t step) {
    compute({params, grads, exp_avgs, exp_avg_sqs, absmaxs, skipped, scale, lr, beta1, beta2, eps, weight_decay, step});
  }
};

}  // namespace nf4lora
