// adamw_step_ for CUDA tensors: checks, and the lists as the launcher takes them. Kernels: adamw.cu.
#include <torch/csrc/stable/library.h>

#include <iterator>
#include <vector>

#include "../check/adamw.h"
#include "launch.h"
#include "stream.h"

namespace nf4lora::cuda {
namespace {

void adamw_step_(const AdamWStep& step) {
  check_adamw_step(step);
  const OnDeviceOf device(step.skipped);
  const AdamW numbers = step.numbers();
  const auto* factor = step.scale ? static_cast<const float*>(step.scale->const_data_ptr()) : nullptr;
  constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16};
  std::vector<AdamWTensor> of_dtype[std::size(kDtypes)];
  for (size_t i = 0; i < step.params.size(); ++i) {
    of_dtype[static_cast<size_t>(dtype_of(step.params[i]))].push_back(
        {step.params[i].mutable_data_ptr(), step.grads[i].const_data_ptr(), step.exp_avgs[i].mutable_data_ptr(),
         step.exp_avg_sqs[i].mutable_data_ptr(),
         step.eight_bits() ? static_cast<float*>(step.absmaxs[i].mutable_data_ptr()) : nullptr,
         step.params[i].numel()});
  }
  for (const Dtype dtype : kDtypes) {
    const std::vector<AdamWTensor>& tensors = of_dtype[static_cast<size_t>(dtype)];
    if (tensors.empty()) continue;
    require_launched("adamw_step_",
                     adamw_step(tensors.data(), static_cast<int64_t>(tensors.size()), dtype, step.eight_bits(), numbers,
                                factor, static_cast<int64_t*>(step.skipped.mutable_data_ptr()), device.stream()));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nf4lora, CUDA, m) { m.impl("adamw_step_", TORCH_BOX(&AdamWStep::op<&adamw_step_>)); }

}  // namespace nf4lora::cuda
