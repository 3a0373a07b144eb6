// What adamw_step_ demands of its arguments.
#pragma once

#include <cmath>

#include "../adamw_step.h"
#include "../ceil_div.h"
#include "tensor.h"

namespace nf4lora {

inline int64_t moment_blocks(int64_t count) { return ceil_div(count, kMomentBlocksize); }

inline void check_real(const char* op, const char* what, bool held, const char* contract, double value) {
  require_value(held, op, ": ", what, " must be ", contract, ", got ", value);
}

// One entry of a list: of `count` values, in order in memory, on the device of `skipped`.
inline void check_adamw_entry(const char* what, size_t i, const Tensor& tensor, int64_t count, const Tensor& skipped) {
  constexpr const char* op = "adamw_step_";
  require_value(tensor.numel() == count, op, ": ", what, "[", i, "] must hold ", count, " values, got shape ",
                shape_of(tensor));
  require_value(tensor.is_contiguous(), op, ": ", what, "[", i, "] must be contiguous, got strides that are not");
  require_value(tensor.device() == skipped.device(), op, ": ", what, "[", i, "] must be on the device of skipped");
}

// params: float32, bfloat16 or float16; grads: the same; exp_avgs, exp_avg_sqs: float32, or uint8 with absmaxs float32
// [ceil(n / 256), 2]; all contiguous.
inline void check_adamw_step(const AdamWStep& step) {
  constexpr const char* op = "adamw_step_";
  check_real(op, "lr", step.lr >= 0.0 && std::isfinite(step.lr), "finite and not negative", step.lr);
  check_real(op, "beta1", step.beta1 >= 0.0 && step.beta1 < 1.0, "in [0, 1)", step.beta1);
  check_real(op, "beta2", step.beta2 >= 0.0 && step.beta2 < 1.0, "in [0, 1)", step.beta2);
  check_real(op, "eps", step.eps >= 0.0 && std::isfinite(step.eps), "finite and not negative", step.eps);
  check_real(op, "weight_decay", step.weight_decay >= 0.0 && std::isfinite(step.weight_decay),
             "finite and not negative", step.weight_decay);
  require_value(step.step >= 1, op, ": step must count from 1, got ", step.step);
  const bool eight_bits = step.eight_bits();
  const auto check_length = [&](const char* what, const Tensors& list) {
    require_value(list.size() == step.params.size(), op, ": ", what, " must be as many as params, ", step.params.size(),
                  ", got ", list.size());
  };
  check_length("grads", step.grads);
  check_length("exp_avgs", step.exp_avgs);
  check_length("exp_avg_sqs", step.exp_avg_sqs);
  if (eight_bits) check_length("absmaxs (none for float32 moments)", step.absmaxs);
  check_dtype(op, "skipped", step.skipped, ScalarType::Long);
  require_value(step.skipped.numel() == 1, op, ": skipped must hold one value, got shape ", shape_of(step.skipped));
  if (step.scale) {
    check_dtype(op, "scale", *step.scale, ScalarType::Float);
    check_same_device(op, "scale", *step.scale, step.skipped);
    require_value(step.scale->numel() == 1, op, ": scale must hold one value, got shape ", shape_of(*step.scale));
  }
  const ScalarType moment = eight_bits ? ScalarType::Byte : ScalarType::Float;
  for (size_t i = 0; i < step.params.size(); ++i) {
    const int64_t count = step.params[i].numel();
    check_float(op, "every param", step.params[i]);
    check_dtype(op, "every grad (as its param)", step.grads[i], step.params[i].scalar_type());
    check_dtype(op, eight_bits ? "every exp_avg (with absmaxs)" : "every exp_avg (without absmaxs)", step.exp_avgs[i],
                moment);
    check_dtype(op, eight_bits ? "every exp_avg_sq (with absmaxs)" : "every exp_avg_sq (without absmaxs)",
                step.exp_avg_sqs[i], moment);
    check_adamw_entry("params", i, step.params[i], count, step.skipped);
    check_adamw_entry("grads", i, step.grads[i], count, step.skipped);
    check_adamw_entry("exp_avgs", i, step.exp_avgs[i], count, step.skipped);
    check_adamw_entry("exp_avg_sqs", i, step.exp_avg_sqs[i], count, step.skipped);
    if (!eight_bits) continue;
    check_dtype(op, "every absmax", step.absmaxs[i], ScalarType::Float);
    check_adamw_entry("absmaxs", i, step.absmaxs[i], 2 * moment_blocks(count), step.skipped);
  }
}

}  // namespace nf4lora
