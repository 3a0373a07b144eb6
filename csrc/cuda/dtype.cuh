// From a Dtype, which is known when a kernel is launched, to the type that it is compiled for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../dtype.h"
#include "../format.h"

namespace nf4lora::cuda {

// Calls body with std::type_identity<T> of the T behind the dtype:
//   with_dtype(dtype, [&]<typename T>(std::type_identity<T>) { launch<T>(...); });
#pragma nv_exec_check_disable
template <class Body>
NF4LORA_HOST_DEVICE inline auto with_dtype(Dtype dtype, Body&& body) {
  switch (dtype) {
    case Dtype::f32: return body(std::type_identity<float>{});
    case Dtype::bf16: return body(std::type_identity<__nv_bfloat16>{});
    default: return body(std::type_identity<__half>{});
  }
}
// For kernels that have been refused float32.
template <class Body>
inline auto with_16_bits(Dtype dtype, Body&& body) {
  return dtype == Dtype::bf16 ? body(std::type_identity<__nv_bfloat16>{}) : body(std::type_identity<__half>{});
}

}  // namespace nf4lora::cuda
