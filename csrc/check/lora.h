// What lora_linear and its backward demand of their arguments.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "../lora.h"
#include "absmax.h"
#include "tensor.h"

namespace nf4lora {

struct LinearShape {
  int64_t M, N, K, R;  // tokens, out features, in features, rank (0 without LoRA)
};

// W, on the device of `like`. Returns N and K.
inline LinearShape check_packed(const char* op, const PackedTensors& W, const Tensor& like) {
  const Tensor &qweight = W.qweight, &absmax = W.absmax;
  check_blocksize(op, W.blocksize);
  check_dtype(op, "qweight", qweight, ScalarType::Byte);
  require_value(qweight.dim() == 2, op, ": qweight must be [N, K/2], got shape ", shape_of(qweight));
  const int64_t N = qweight.size(0), K = qweight.size(1) * 2;
  require_value(K % W.blocksize == 0, op, ": qweight must have a multiple of blocksize / 2 = ", W.blocksize / 2,
                " columns, got shape ", shape_of(qweight));
  check_same_device(op, "qweight", qweight, like);
  check_same_device(op, "absmax", absmax, like);
  const int64_t blocks = N * (K / W.blocksize);
  require_value(absmax.numel() == blocks, op, ": absmax must hold ", blocks, " values (one per ", W.blocksize,
                " weights), got shape ", shape_of(absmax));
  if (W.nested) {
    check_nested(op, absmax, *W.nested);
  } else {
    require_kind(absmax.scalar_type() == ScalarType::Float, op, ": absmax must be float32, or uint8 with nested, got ",
                 name_of(absmax.scalar_type()));
  }
  return {0, N, K, 0};
}

inline void check_bias(const char* op, const Tensor& bias, int64_t N, const Tensor& like) {
  check_float(op, "bias", bias);
  check_same_device(op, "bias", bias, like);
  require_value(bias.dim() == 1 && bias.size(0) == N, op, ": bias must be [", N, "], got shape ", shape_of(bias));
}

// A, B and dropout, on the device of `like`. Returns R.
inline int64_t check_adapter(const char* op, const Adapter& adapter, int64_t N, int64_t K, const Tensor& like) {
  const OptionalTensor &A = adapter.A, &B = adapter.B, &seed = adapter.seed;
  require_value(A.has_value() == B.has_value(), op, ": lora_A and lora_B must come together, got only one");
  require_value(adapter.dropout >= 0.0 && adapter.dropout < 1.0, op, ": dropout must be in [0, 1), got ",
                adapter.dropout);
  // The kernels multiply in float32 by both at once.
  const double scale = adapter.scaling / (1.0 - adapter.dropout);
  require_value(std::abs(scale) <= std::numeric_limits<float>::max(), op, ": scaling must be finite in float32, ",
                "also divided by 1 - dropout, got ", adapter.scaling);
  if (!A) return 0;
  check_float(op, "lora_A", *A);
  check_float(op, "lora_B", *B);
  check_same_device(op, "lora_A", *A, like);
  check_same_device(op, "lora_B", *B, like);
  require_value(A->dim() == 2 && A->size(1) == K && A->size(0) >= 1, op, ": lora_A must be [R, ", K,
                "] with R >= 1, got shape ", shape_of(*A));
  const int64_t R = A->size(0);
  require_value(B->dim() == 2 && B->size(0) == N && B->size(1) == R, op, ": lora_B must be [", N, ", ", R,
                "] (out features, rank of lora_A), got shape ", shape_of(*B));
  if (adapter.dropout > 0.0) {
    require_value(seed.has_value(), op, ": dropout > 0 needs a seed, got None; pass torch.randint(2**62, (1,))");
    check_dtype(op, "seed", *seed, ScalarType::Long);
    check_same_device(op, "seed", *seed, like);
    require_value(seed->numel() == 1, op, ": seed must hold one value, got shape ", shape_of(*seed));
  }
  return R;
}

inline void check_in_features(const char* op, const Tensor& x, int64_t K) {
  require_value(x.dim() >= 1 && last_size(x) == K, op, ": the last dimension of x must be ", K,
                " (in features of qweight), got shape ", shape_of(x));
}

inline LinearShape check_lora_linear(const LoraLinear& arguments) {
  constexpr const char* op = "lora_linear";
  const Tensor& x = arguments.x;
  check_float(op, "x", x);
  LinearShape shape = check_packed(op, arguments.weight, x);
  if (arguments.bias) check_bias(op, *arguments.bias, shape.N, x);
  shape.R = check_adapter(op, arguments.adapter, shape.N, shape.K, x);
  check_in_features(op, x, shape.K);
  shape.M = rows_of(x);
  return shape;
}

// dy, x and S are of one dtype.
inline LinearShape check_lora_linear_backward(const LoraLinearBackward& arguments) {
  constexpr const char* op = "lora_linear_backward";
  const OptionalTensor &x = arguments.x, &S = arguments.S;
  const Tensor &dy = arguments.dy, &like = x ? *x : dy;
  check_float(op, x ? "x" : "dy", like);
  LinearShape shape = check_packed(op, arguments.weight, like);
  shape.R = check_adapter(op, arguments.adapter, shape.N, shape.K, like);
  if (x) check_in_features(op, *x, shape.K);
  shape.M = rows_of(like);
  check_dtype(op, "dy", dy, like.scalar_type());
  check_same_device(op, "dy", dy, like);
  require_value(dy.dim() >= 1 && last_size(dy) == shape.N && rows_of(dy) == shape.M, op, ": dy must be [", shape.M,
                " tokens, ", shape.N, "], got shape ", shape_of(dy));
  if (!S) return shape;
  check_dtype(op, "S", *S, like.scalar_type());
  check_same_device(op, "S", *S, like);
  require_value(S->dim() == 2 && S->size(0) == shape.M && S->size(1) == shape.R, op, ": S must be [", shape.M, ", ",
                shape.R, "], got shape ", shape_of(*S));
  return shape;
}

// The lists of a group: one entry for each layer.
template <class Group>
void check_lists(const char* op, const Group& group) {
  const size_t count = group.size();
  require_value(count >= 1 && count <= size_t{kMostSiblings}, op, ": a group must be of 1 to ", kMostSiblings,
                " layers, got ", count);
  const auto check_size = [&](const char* name, size_t size) {
    require_value(size == count, op, ": ", name, " must have as many entries as qweight, ", count, ", got ", size);
  };
  check_size("absmax", group.absmax.size()), check_size("nested", group.nested.size());
  check_size("lora_A", group.lora_A.size()), check_size("lora_B", group.lora_B.size());
}

inline std::vector<LinearShape> check_lora_linear_group(const LoraLinearGroup& group) {
  constexpr const char* op = "lora_linear_group";
  check_lists(op, group);
  require_value(group.bias.size() == group.size(), op, ": bias must have as many entries as qweight, ", group.size(),
                ", got ", group.bias.size());
  std::vector<LinearShape> shapes;
  for (size_t i = 0; i < group.size(); ++i) shapes.push_back(check_lora_linear(group.layer(i)));
  return shapes;
}

inline std::vector<LinearShape> check_lora_linear_group_backward(const LoraLinearGroupBackward& group) {
  constexpr const char* op = "lora_linear_group_backward";
  check_lists(op, group);
  require_value(group.dy.size() == group.size(), op, ": dy must have as many entries as qweight, ", group.size(),
                ", got ", group.dy.size());
  require_value(group.S.empty() || group.S.size() == group.size(), op, ": S must have as many entries as qweight, ",
                group.size(), ", or none, got ", group.S.size());
  std::vector<LinearShape> shapes;
  for (size_t i = 0; i < group.size(); ++i) {
    shapes.push_back(check_lora_linear_backward(group.layer(i)));
    require_value(shapes[i].M == shapes[0].M && shapes[i].K == shapes[0].K, op,
                  ": all layers must have the tokens and in features of the first, ", shapes[0].M, " and ", shapes[0].K,
                  ", got ", shapes[i].M, " and ", shapes[i].K);
    require_kind(group.dy[i].scalar_type() == group.dy[0].scalar_type(), op, ": all dy must be of one dtype, got ",
                 name_of(group.dy[0].scalar_type()), " and ", name_of(group.dy[i].scalar_type()));
    check_same_device(op, "dy", group.dy[i], group.dy[0]);
  }
  return shapes;
}

}  // namespace nf4lora
