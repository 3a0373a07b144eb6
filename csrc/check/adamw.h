// What adamw_step_ demands of its arguments.
#pragma once

#include <cmath>

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
// [ceil(n / 256), 2]; all contiguous. Returns whether the moments have 8 bits.
inline bool check_adamw_step(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                             const Tensors& exp_avg_sqs, const Tensors& absmaxs, const Tensor& skipped,
                             const OptionalTensor& scale, double lr, double beta1, double beta2, double eps,
                             double weight_decay, int64_t step) {
  constexpr const char* op = "adamw_step_";
  check_real(op, "lr", lr >= 0.0 && std::isfinite(lr), "finite and not negative", lr);
  check_real(op, "beta1", beta1 >= 0.0 && beta1 < 1.0, "in [0, 1)", beta1);
  check_real(op, "beta2", beta2 >= 0.0 && beta2 < 1.0, "in [0, 1)", beta2);
  check_real(op, "eps", eps >= 0.0 && std::isfinite(eps), "finite and not negative", eps);
  check_real(op, "weight_decay", weight_decay >= 0.0 && std::isfinite(weight_decay), "finite and not negative",
             weight_decay);
  require_value(step >= 1, op, ": step must count from 1, got ", step);
  const bool eight_bits = !absmaxs.empty();
  const auto check_length = [&](const char* what, const Tensors& list) {
    require_value(list.size() == params.size(), op, ": ", what, " must be as many as params, ", params.size(), ", got ",
                  list.size());
  };
  check_length("grads", grads);
  check_length("exp_avgs", exp_avgs);
  check_length("exp_avg_sqs", exp_avg_sqs);
  if (eight_bits) check_length("absmaxs (none for float32 moments)", absmaxs);
  check_dtype(op, "skipped", skipped, ScalarType::Long);
  require_value(skipped.numel() == 1, op, ": skipped must hold one value, got shape ", shape_of(skipped));
  if (scale) {
    check_dtype(op, "scale", *scale, ScalarType::Float);
    check_same_device(op, "scale", *scale, skipped);
    require_value(scale->numel() == 1, op, ": scale must hold one value, got shape ", shape_of(*scale));
  }
  const ScalarType moment = eight_bits ? ScalarType::Byte : ScalarType::Float;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t count = params[i].numel();
    check_float(op, "every param", params[i]);
    check_dtype(op, "every grad (as its param)", grads[i], params[i].scalar_type());
    check_dtype(op, eight_bits ? "every exp_avg (with absmaxs)" : "every exp_avg (without absmaxs)", exp_avgs[i],
                moment);
    check_dtype(op, eight_bits ? "every exp_avg_sq (with absmaxs)" : "every exp_avg_sq (without absmaxs)",
                exp_avg_sqs[i], moment);
    check_adamw_entry("params", i, params[i], count, skipped);
    check_adamw_entry("grads", i, grads[i], count, skipped);
    check_adamw_entry("exp_avgs", i, exp_avgs[i], count, skipped);
    check_adamw_entry("exp_avg_sqs", i, exp_avg_sqs[i], count, skipped);
    if (!eight_bits) continue;
    check_dtype(op, "every absmax", absmaxs[i], ScalarType::Float);
    check_adamw_entry("absmaxs", i, absmaxs[i], 2 * moment_blocks(count), skipped);
  }
  return eight_bits;
}

}  // namespace nf4lora
