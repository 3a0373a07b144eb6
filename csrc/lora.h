// The arguments of lora_linear and of its backward. ops.cpp names them for torch; here they become a struct each, which
// the check and the kernels of every device take.
#pragma once

#include "siblings.h"
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

// A list has one entry for each layer of the group. There is no dropout, whose mask each layer draws for itself.
struct LoraLinearGroup {
  Tensor x;  // [..., K]
  Tensors qweight, absmax;
  OptionalTensors nested, bias;
  Tensors lora_A, lora_B;
  double scaling;
  int64_t blocksize;

  size_t size() const { return qweight.size(); }
  LoraLinear layer(size_t i) const {
    return {x, {qweight[i], absmax[i], nested[i], blocksize}, bias[i], {lora_A[i], lora_B[i], scaling, 0.0, {}}};
  }

  template <auto compute>
  static auto op(const Tensor& x, const Tensors& qweight, const Tensors& absmax, const OptionalTensors& nested,
                 const OptionalTensors& bias, const Tensors& lora_A, const Tensors& lora_B, double scaling,
                 int64_t blocksize) {
    return compute({x, qweight, absmax, nested, bias, lora_A, lora_B, scaling, blocksize});
  }
};

struct LoraLinearGroupBackward {
  Tensors dy;        // [..., N] each
  OptionalTensor x;  // [..., K], where the dA are wanted
  Tensors S;         // [M, R] each, where the dB are wanted; else none
  Tensors qweight, absmax;
  OptionalTensors nested;
  Tensors lora_A, lora_B;
  double scaling;
  int64_t blocksize;
  bool need_dx;

  size_t size() const { return qweight.size(); }
  LoraLinearBackward layer(size_t i) const {
    return {dy[i],
            x,
            S.empty() ? std::nullopt : OptionalTensor(S[i]),
            {qweight[i], absmax[i], nested[i], blocksize},
            {lora_A[i], lora_B[i], scaling, 0.0, {}},
            need_dx};
  }

  template <auto compute>
  static auto op(const Tensors& dy, const OptionalTensor& x, const Tensors& S, const Tensors& qweight,
                 const Tensors& absmax, const OptionalTensors& nested, const Tensors& lora_A, const Tensors& lora_B,
                 double scaling, int64_t blocksize, bool need_dx) {
    return compute({dy, x, S, qweight, absmax, nested, lora_A, lora_B, scaling, blocksize, need_dx});
  }
};

}  // namespace nf4lora
