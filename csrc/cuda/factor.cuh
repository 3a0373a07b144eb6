// Factors of LoRA, which have a dtype of their own: a value is rounded to T, the dtype of the computation, where it is
// read.
#pragma once

#include "dtype.cuh"
#include "vector.cuh"

namespace nf4lora::cuda {

template <typename T>
__device__ __forceinline__ T narrow(float value) {
  T pair[2];
  round_pair(value, 0.0f, pair);
  return pair[0];
}

template <typename T>
__device__ __forceinline__ float rounded(float value) {
  return to_float(narrow<T>(value));
}

template <typename T>
__device__ __forceinline__ float load_factor(const void* factor, Dtype dtype, int64_t at) {
  return rounded<T>(with_dtype(
      dtype, [&]<typename F>(std::type_identity<F>) { return to_float(static_cast<const F*>(factor)[at]); }));
}

}  // namespace nf4lora::cuda
