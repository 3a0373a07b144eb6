// The tables of format.h in a device's memory, and how a scale is decoded with one.
#pragma once

#include <cuda_runtime.h>

#include "../format.h"

namespace nf4lora::cuda {

[[maybe_unused]] __device__ constexpr Code kDeviceCode = kCode;
[[maybe_unused]] __device__ constexpr NestedCode kDeviceMap = kNestedCode;

// RN(RN(map[code] * nested) + offset): two roundings, never a fused multiply-add. The kernel has copied kDeviceMap to
// where its lanes can look up different values at a time.
__device__ __forceinline__ float decode_absmax(const float* map, uint8_t code, float nested, float offset) {
  return __fadd_rn(__fmul_rn(map[code], nested), offset);
}

}  // namespace nf4lora::cuda
