// Several neighbouring values as one load or store, and float32 from and to every dtype of a weight.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace nf4lora::cuda {

// N values side by side, aligned so that they move in one instruction (16 bytes at most).
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T value[N];
};

// A tensor may start anywhere (a slice of a file, `out=` of a larger buffer), so alignment is a property of the call:
// the launcher asks once, the branch is the same for every thread.
inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load(const T* __restrict__ from, bool aligned) {
  if (aligned) return *reinterpret_cast<const Vector<T, N>*>(from);
  Vector<T, N> vector;
#pragma unroll
  for (int i = 0; i < N; ++i) vector.value[i] = from[i];
  return vector;
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& vector, bool aligned) {
  if (aligned) {
    *reinterpret_cast<Vector<T, N>*>(to) = vector;
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = vector.value[i];
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

// Two float32 values rounded to T, to nearest, ties to even: one instruction for a pair of 16-bit values.
__device__ __forceinline__ void round_pair(float first, float second, float* to) {
  to[0] = first;
  to[1] = second;
}
__device__ __forceinline__ void round_pair(float first, float second, __nv_bfloat16* to) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  to[0] = pair.x;
  to[1] = pair.y;
}
__device__ __forceinline__ void round_pair(float first, float second, __half* to) {
  const __half2 pair = __floats2half2_rn(first, second);
  to[0] = pair.x;
  to[1] = pair.y;
}

}  // namespace nf4lora::cuda
