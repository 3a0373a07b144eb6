// adamw_step_ for CUDA tensors: checks, and the lists as the launcher takes them. Kernels: adamw.cu.
#include <torch/csrc/stable/library.h>

#include <iterator>
#include <vector>

#include "../check/adamw.h"
#include "launch.h"
#include "stream.h"

namespace nf4lora::cuda {
namespace {

void step(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
          const Tensors& absmaxs, Tensor skipped, const OptionalTensor& scale, double lr, double beta1, double beta2,
          double eps, double weight_decay, int64_t count) {
  const bool eight_bits = check_adamw_step(params, grads, exp_avgs, exp_avg_sqs, absmaxs, skipped, scale, lr, beta1,
                                           beta2, eps, weight_decay, count);
  const OnDeviceOf device(skipped);
  const AdamW numbers = adamw_numbers(lr, beta1, beta2, eps, weight_decay, count);
  const auto* factor = scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr;
  constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16};
  std::vector<AdamWTensor> of_dtype[std::size(kDtypes)];
  for (size_t i = 0; i < params.size(); ++i) {
    of_dtype[static_cast<size_t>(dtype_of(params[i]))].push_back(
        {params[i].mutable_data_ptr(), grads[i].const_data_ptr(), exp_avgs[i].mutable_data_ptr(),
         exp_avg_sqs[i].mutable_data_ptr(), eight_bits ? static_cast<float*>(absmaxs[i].mutable_data_ptr()) : nullptr,
         params[i].numel()});
  }
  for (const Dtype dtype : kDtypes) {
    const std::vector<AdamWTensor>& tensors = of_dtype[static_cast<size_t>(dtype)];
    if (tensors.empty()) continue;
    require_launched("adamw_step_",
                     adamw_step(tensors.data(), static_cast<int64_t>(tensors.size()), dtype, eight_bits, numbers,
                                factor, static_cast<int64_t*>(skipped.mutable_data_ptr()), device.stream()));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nf4lora, CUDA, m) { m.impl("adamw_step_", TORCH_BOX(&step)); }

}  // namespace nf4lora::cuda
