// The dtypes that weights, activations and factors of LoRA come in, for code that knows nothing of torch: the CPU's loops
// and the CUDA kernels. No torch and no CUDA headers.
#pragma once

namespace nf4lora {

enum class Dtype : int { f32, bf16, f16 };

}  // namespace nf4lora
