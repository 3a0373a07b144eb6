// The passes of lora_grad.cu over x and dy, as both the fused and the dense kernel make them. All tensors are contiguous,
// x and dy aligned; what a pass leaves out is null in its struct.
#pragma once

#include "launch.h"
#include "layer.h"
#include "lora.h"

namespace nf4lora::cuda {

// S = dropout(x) A^T  [M, R]
inline TallSkinny pass_for_S(const Tensor& x, const Tensor& A, const Dropout& dropout, const LinearShape& shape,
                             void* S) {
  TallSkinny pass{};
  pass.dtype = dtype_of(x);
  pass.Z = x.const_data_ptr();
  pass.F[0] = A.const_data_ptr(), pass.dtype_of_F = dtype_of(A), pass.F_is_transposed = true;
  pass.seed = seed_of(dropout), pass.threshold = dropout.threshold;
  pass.inner_scale = static_cast<float>(dropout.inverse_keep);
  pass.P[0] = S;
  pass.M = shape.M, pass.D = shape.K, pass.R = shape.R;
  return pass;
}

// T = dy B  [M, R], and with S also dB = scaling dy^T S  [N, R]; either may be null.
inline TallSkinny pass_over_dy(const Tensor& dy, const Tensor& B, double scaling, const LinearShape& shape, void* T,
                               const OptionalTensor& S, const OptionalTensor& dB) {
  TallSkinny pass{};
  pass.dtype = dtype_of(dy);
  pass.Z = dy.const_data_ptr();
  pass.F[0] = B.const_data_ptr(), pass.dtype_of_F = dtype_of(B);
  pass.inner_scale = 1.0f, pass.outer_scale = static_cast<float>(scaling);
  pass.P[0] = T;
  pass.adds_as_both = true;  // whether dB is wanted makes no difference to dx and dA
  if (S) {
    pass.L = S->const_data_ptr();
    pass.G[0] = dB->mutable_data_ptr(), pass.dtype_of_G = dtype_of(*dB);
  }
  pass.M = shape.M, pass.D = last_size(dy), pass.R = shape.R;
  return pass;
}

// dA = scaling T^T dropout(x)  [R, K]
inline TallSkinny pass_for_dA(const Tensor& x, const void* T, double scaling, const Dropout& dropout,
                              const LinearShape& shape, const Tensor& dA) {
  TallSkinny pass{};
  pass.dtype = dtype_of(x);
  pass.Z = x.const_data_ptr();
  pass.L = T;
  pass.seed = seed_of(dropout), pass.threshold = dropout.threshold;
  pass.outer_scale = static_cast<float>(scaling * dropout.inverse_keep);
  pass.G[0] = dA.mutable_data_ptr(), pass.dtype_of_G = dtype_of(dA), pass.G_is_transposed = true;
  pass.M = shape.M, pass.D = shape.K, pass.R = shape.R;
  return pass;
}

}  // namespace nf4lora::cuda
