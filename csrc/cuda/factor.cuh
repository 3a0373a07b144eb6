// Factors of LoRA, which have a dtype of their own: a value is rounded to T, the dtype of the computation, where it is
// read.
#pragma once

#include "../siblings.h"
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

// Rank r of all ranks [0, R) of a group: the matrix of the adapter that it belongs to, which rank it is there, and how many
// that adapter has. (No index into the arrays, which would go through local memory.)
template <typename Pointer>
struct OfRank {
  Pointer matrix;
  int64_t rank, ranks;
};
template <typename Pointer>
__device__ __forceinline__ OfRank<Pointer> of_rank(Pointer const (&matrices)[kMostSiblings],
                                                   const int64_t (&first_rank)[kMostSiblings], int64_t r, int64_t R) {
  OfRank<Pointer> found{matrices[0], r, min(first_rank[1], R)};
#pragma unroll
  for (int i = 1; i < kMostSiblings; ++i) {
    if (r < first_rank[i]) continue;
    const int64_t end = i + 1 < kMostSiblings ? min(first_rank[i + 1], R) : R;
    found = {matrices[i], r - first_rank[i], end - first_rank[i]};
  }
  return found;
}

}  // namespace nf4lora::cuda
