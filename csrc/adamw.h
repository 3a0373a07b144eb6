// The numbers of one AdamW step, rounded where torch.optim.AdamW's single-tensor path rounds them. No torch and no CUDA
// headers: CPU and CUDA kernels take the same struct.
//
// One step, in float32, every operation rounded once and fma as one operation (this is what torch's CPU kernels do):
//   g          = grad * scale
//   exp_avg    = fma(weight, g - exp_avg, from_gradient ? g : exp_avg)      torch's lerp
//   exp_avg_sq = fma(square_weight * g, g, exp_avg_sq * beta2)
//   param      = param * decay + (-step_size * exp_avg) / (sqrt(exp_avg_sq) / correction + eps)
// and where g is not finite, nothing of this value changes. Moments of 8 bits have one rule more: where |g| is below
// gone * |exp_avg|, the gradient has ended, and exp_avg is lowered by at least drop * absmax, so that its code changes.
// kMomentDrop in format.h holds `drop` for each code.
#pragma once

#include <cmath>
#include <cstdint>

namespace nf4lora {

struct AdamW {
  float weight;        // 1 - beta1, or -beta1 from the gradient
  bool from_gradient;  // beta1 <= 0.5: torch.lerp then starts from its end
  float beta2;
  float square_weight;  // 1 - beta2
  float decay;          // 1 - lr * weight_decay
  float negative_step;  // -lr / (1 - beta1^step)
  float correction;     // sqrt(1 - beta2^step)
  float inverse_correction;
  float eps;
  float gone;  // a gradient below this share of its exp_avg has ended: 4 (1 - beta1), at most a half
};

// step counts from 1.
inline AdamW adamw_numbers(double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step) {
  const auto weight = static_cast<float>(1.0 - beta1);
  const bool from_gradient = !(weight < 0.5f);
  const double t = static_cast<double>(step);
  const auto correction = static_cast<float>(std::sqrt(1.0 - std::pow(beta2, t)));
  return {from_gradient ? weight - 1.0f : weight,
          from_gradient,
          static_cast<float>(beta2),
          static_cast<float>(1.0 - beta2),
          static_cast<float>(1.0 - lr * weight_decay),
          -static_cast<float>(lr / (1.0 - std::pow(beta1, t))),
          correction,
          1.0f / correction,
          static_cast<float>(eps),
          static_cast<float>(beta1 > 0.875 ? 4.0 * (1.0 - beta1) : 0.5)};
}

}  // namespace nf4lora
