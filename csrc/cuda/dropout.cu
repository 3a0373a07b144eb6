// Dropout alone, for what the kernels on tensor cores do not take, which make its words as they go.
#include "../ceil_div.h"
#include "dtype.cuh"
#include "factor.cuh"
#include "launch.h"
#include "philox.cuh"
#include "vector.cuh"

namespace nf4lora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWords = 4;  // that Philox makes at a time

// Formula   to[i] = from[i], or 0 where word i is below the threshold
// Threads   one for each 16 bytes
// Assumes   count a multiple of 4; `to` may be `from`
// Bound     the words of Philox; in float32 reading and writing
template <typename T>
__global__ void __launch_bounds__(kThreads) dropout_kernel(const T* from,         // [count]
                                                           T* to,                 // [count]
                                                           const uint64_t* seed,  // [1]
                                                           uint32_t threshold, int64_t count, bool aligned) {
  constexpr int kValues = 16 / sizeof(T);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kValues;
  if (first >= count) return;
  const bool all = first + kValues <= count;  // otherwise the last four of 16-bit values
  Vector<T, kValues> values{};
  if (all) {
    values = load<kValues>(from + first, aligned);
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) values.value[i] = from[first + i];
  }
#pragma unroll
  for (int i = 0; i < kValues; i += kWords) {
    const Words words = philox(*seed, static_cast<uint64_t>(first + i) / kWords);
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      if (words.value[j] < threshold) values.value[i + j] = narrow<T>(0.0f);
    }
  }
  if (all) {
    store(to + first, values, aligned);
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) to[first + i] = values.value[i];
  }
}

}  // namespace

Error dropout(const void* from, void* to, Dtype dtype, const uint64_t* seed, uint32_t threshold, int64_t count,
              void* stream) {
  if (count < 0 || count % kWords != 0) return "a number of values that is no multiple of 4";
  if (count == 0) return nullptr;  // a grid of zero blocks is an error
  with_dtype(dtype, [&]<typename T>(std::type_identity<T>) {
    const int64_t blocks = ceil_div(count, kThreads * 16 / static_cast<int64_t>(sizeof(T)));
    dropout_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(from), static_cast<T*>(to), seed, threshold, count, is_aligned(from) && is_aligned(to));
  });
  return launched();
}

}  // namespace nf4lora::cuda
