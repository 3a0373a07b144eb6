// What the dense kernel does with one layer (lora_dense.cpp) and with a group of them (lora_group.cpp).
#pragma once

#include <algorithm>
#include <cmath>

#include "../check/lora.h"
#include "kept_weights.h"
#include "launch.h"
#include "layer.h"

namespace nf4lora::cuda {

inline constexpr int64_t kStep = 64;  // rows or columns of slices of W: tiles of a product are filled

// Whether the low-rank term can be multiplied beside W, where scaling multiplies the factor in 16 bits: that is exact for a
// power of two in bfloat16.
inline bool is_exact_beside(ScalarType dtype, double scaling) {
  int exponent = 0;
  return dtype == ScalarType::BFloat16 && std::abs(std::frexp(scaling, &exponent)) == 0.5;
}

// Of out's rows (forward) or columns that are made of one slice of W.
inline int64_t step_of(int64_t length, int64_t bytes_of_one, int64_t most_bytes) {
  const int64_t most = std::max(kStep, most_bytes / std::max<int64_t>(bytes_of_one, 1) / kStep * kStep);
  const int64_t parts = length * bytes_of_one <= most_bytes ? 1 : ceil_div(length, most);
  return std::max<int64_t>(1, ceil_div(length, parts * kStep)) * kStep;
}

// Memory for W that also has room for the factors of so many ranks, on its right or below it.
inline KeptWeight room_to_keep(const Tensor& rows, const LinearShape& shape, int64_t ranks) {
  const int64_t room = padded_rank(ranks), stride = shape.K + room;
  return {empty({(shape.N + room) * stride}, rows.scalar_type(), rows), stride, room};
}

inline Slice slice_of(const Tensor& rows, const Weight& weight, const LinearShape& shape, int64_t blocksize) {
  Slice slice{};
  slice.dtype = dtype_of(rows);
  slice.W = weight.packed();
  slice.N = shape.N, slice.K = shape.K, slice.blocksize = blocksize;
  slice.rows = shape.N, slice.columns = shape.K;
  return slice;
}

inline void add_factor(Slice& slice, const Tensor& factor, double scaling, int64_t R, bool is_below) {
  slice.factor = factor.const_data_ptr(), slice.dtype_of_factor = dtype_of(factor);
  slice.factor_is_below = is_below;
  slice.scaling = static_cast<float>(scaling), slice.R = R;
}

// out = bias + scale * P F with the factor F [R, columns of out], or its transpose; of a group the caller adds the others.
inline Expansion expansion_of(const Tensor& factor, bool is_transposed, const OptionalTensor& bias, double scale,
                              const Tensor& out) {
  Expansion expansion;
  expansion.out = out.mutable_data_ptr(), expansion.columns = last_size(out);
  expansion.E[0] = factor.const_data_ptr(), expansion.dtype_of_E = dtype_of(factor);
  expansion.E_is_transposed = is_transposed;
  expansion.bias = static_cast<const float*>(data_of(bias));
  expansion.scale = static_cast<float>(scale);
  return expansion;
}

}  // namespace nf4lora::cuda
