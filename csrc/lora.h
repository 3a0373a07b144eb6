// The arguments of lora_linear and of its backward. ops.cpp names them for torch; here they become a struct each, which
// the check and the kernels of every device take.
#pragma once

#include "tensors.h"

namespace nf4lora {

// W as it is stored: N out features, K in features.
struct PackedTensors {
  Tensor qweight;         // [N, K/2] uint8
  Tensor absmax;          // [N, K/blocksize] float32, or uint8 with
  OptionalTensor nested;  // [ceil(N * K / blocksize / 256) + 1] float32
  int64_t blocksize;
};

struct Adapter {
  OptionalTensor A;  // [R, K]
  OptionalTensor B;  // [N, R]; together or not at all
  double scaling;
  double dropout;       // probability
  OptionalTensor seed;  // [1] int64, where there is dropout
};

// In both, TORCH_BOX (torch's adapter from its untyped stack to a C++ function) calls `op` with the arguments in the order
// of the schema, for a function of the struct.
struct LoraLinear {
  Tensor x;  // [..., K]
  PackedTensors weight;
  OptionalTensor bias;  // [N]
  Adapter adapter;

  template <auto compute>
  static auto op(const Tensor& x, const Tensor& qweight, const Tensor& absmax, const OptionalTensor& nested,
                 const OptionalTensor& bias, const OptionalTensor& lora_A, const OptionalTensor& lora_B, double scaling,
                 double dropout, const OptionalTensor& seed, int64_t blocksize) {
    return compute({x, {qweight, absmax, nested, blocksize}, bias, {lora_A, lora_B, scaling, dropout, seed}});
  }
};

struct LoraLinearBackward {
  Tensor dy;         // [..., N]
  OptionalTensor x;  // [..., K], where dA is wanted
  OptionalTensor S;  // [M, R] as the forward returned it, where dB is wanted
  PackedTensors weight;
  Adapter adapter;
  bool need_dx;

  template <auto compute>
  static auto op(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& S, const Tensor& qweight,
                 const Tensor& absmax, const OptionalTensor& nested, const OptionalTensor& lora_A,
                 const OptionalTensor& lora_B, double scaling, double dropout, const OptionalTensor& seed,
                 int64_t blocksize, bool need_dx) {
    return compute({dy, x, S, {qweight, absmax, nested, blocksize}, {lora_A, lora_B, scaling, dropout, seed}, need_dx});
  }
};

}  // namespace nf4lora
