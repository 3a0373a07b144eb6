// The tables of format.h in a device's memory. A kernel copies the map to shared memory, where its lanes can look up
// different values at a time.
#pragma once

#include <cuda_runtime.h>

#include "../format.h"

namespace nf4lora::cuda {

[[maybe_unused]] __device__ constexpr Code kDeviceCode = kCode;
[[maybe_unused]] __device__ constexpr NestedCode kDeviceMap = kNestedCode;

}  // namespace nf4lora::cuda
