// What every op demands of its arguments. CPU and CUDA kernels call the same function, so a bad call reads the same
// on every device: ValueError for values, TypeError for kinds, never torch's own prefixed text.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "ceil_div.h"
#include "format.h"

namespace nf4lora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
void require_value(bool held, const Parts&... parts) {
  if (!held) throw std::invalid_argument(text(parts...));
}

template <class... Parts>
void require_kind(bool held, const Parts&... parts) {
  if (!held) throw pybind11::type_error(text(parts...));
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.size(i);
  out << ']';
  return out.str();
}

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline bool is_weight_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline void check_dtype(const char* op, const char* what, const Tensor& tensor, ScalarType dtype) {
  require_kind(tensor.scalar_type() == dtype, op, ": ", what, " must be ", name_of(dtype), ", got ",
               name_of(tensor.scalar_type()));
}

inline void check_float(const char* op, const char* what, const Tensor& tensor) {
  require_kind(is_weight_dtype(tensor.scalar_type()), op, ": ", what, " must be float32, bfloat16 or float16, got ",
               name_of(tensor.scalar_type()));
}

inline void check_blocksize(const char* op, int64_t blocksize) {
  require_value(is_blocksize(blocksize), op, ": blocksize must be a power of two between ", kMinBlocksize, " and ",
                kMaxBlocksize, ", got ", blocksize);
}

inline void check_same_device(const char* op, const char* what, const Tensor& tensor, const Tensor& other) {
  require_value(tensor.device() == other.device(), op, ": ", what,
                " must be on the device of the first argument, got another; move it with .to(x.device)");
}

// weight: [..., K] float32, bfloat16 or float16, K a multiple of blocksize.
inline void check_nf4_quantize(const Tensor& weight, int64_t blocksize) {
  constexpr const char* op = "nf4_quantize";
  check_blocksize(op, blocksize);
  check_float(op, "weight", weight);
  require_value(weight.dim() >= 1 && weight.size(weight.dim() - 1) % blocksize == 0, op,
                ": the last dimension of weight must be a multiple of blocksize ", blocksize, ", got shape ",
                shape_of(weight));
}

// A weight that is not finite has no nearest code. `block` is where it was met.
inline void fail_nf4_quantize_finite(int64_t block, int64_t blocksize) {
  require_value(false, "nf4_quantize: weight must be finite, got NaN or Inf in block ", block, " (flat elements ",
                block * blocksize, " to ", (block + 1) * blocksize - 1, ")");
}

// qweight: uint8 [..., K/2]; absmax: float32 [..., K/blocksize] (or any shape with as many elements).
inline void check_nf4_dequantize(const Tensor& qweight, const Tensor& absmax, int64_t blocksize, ScalarType dtype) {
  constexpr const char* op = "nf4_dequantize";
  check_blocksize(op, blocksize);
  check_dtype(op, "qweight", qweight, ScalarType::Byte);
  check_dtype(op, "absmax", absmax, ScalarType::Float);
  check_same_device(op, "absmax", absmax, qweight);
  require_kind(is_weight_dtype(dtype), op, ": dtype must be float32, bfloat16 or float16, got ", name_of(dtype));
  require_value(qweight.dim() >= 1 && qweight.size(qweight.dim() - 1) * 2 % blocksize == 0, op,
                ": the last dimension of qweight must be a multiple of blocksize / 2 = ", blocksize / 2, ", got shape ",
                shape_of(qweight));
  require_value(absmax.numel() * blocksize == qweight.numel() * 2, op, ": absmax must hold ",
                qweight.numel() * 2 / blocksize, " values (one per ", blocksize, " weights), got shape ",
                shape_of(absmax));
}

// out: [..., K] contiguous, for the qweight [..., K/2] of check_nf4_dequantize.
inline void check_nf4_dequantize_out(const Tensor& qweight, const Tensor& out) {
  constexpr const char* op = "nf4_dequantize";
  bool same = out.dim() == qweight.dim();
  for (int64_t i = 0; same && i < out.dim(); ++i) {
    same = out.size(i) == qweight.size(i) * (i + 1 == out.dim() ? 2 : 1);
  }
  require_value(same, op, ": out must have the shape of qweight with the last dimension doubled, got ", shape_of(out),
                " for qweight ", shape_of(qweight));
  require_value(out.is_contiguous(), op, ": out must be contiguous, got strides that are not; pass out.contiguous()");
  check_same_device(op, "out", out, qweight);
}

// absmax: float32, any shape, finite: see check_absmax_quantized.
inline void check_absmax_quantize(const Tensor& absmax) {
  check_dtype("absmax_quantize", "absmax", absmax, ScalarType::Float);
}

// What absmax_quantize has made, [count] on the host, the offset last. Scales that are not finite make an offset that is
// not; those of both signs may lie so far apart that their distance from the offset is more than a float32 holds.
inline void check_absmax_quantized(const float* nested, int64_t count) {
  require_value(std::isfinite(nested[count - 1]), "absmax_quantize: absmax must be finite, got NaN or Inf");
  for (int64_t block = 0; block + 1 < count; ++block) {
    require_value(std::isfinite(nested[block]),
                  "absmax_quantize: absmax must lie within 3.4e38 of its mean, got values further away in block ",
                  block, " (flat elements from ", block * kNestedBlocksize, ")");
  }
}

inline int64_t nested_size(int64_t absmax_count) { return ceil_div(absmax_count, kNestedBlocksize) + 1; }

inline void check_nested(const char* op, const Tensor& absmax, const Tensor& nested) {
  check_dtype(op, "absmax", absmax, ScalarType::Byte);
  check_dtype(op, "nested", nested, ScalarType::Float);
  check_same_device(op, "nested", nested, absmax);
  require_value(nested.numel() == nested_size(absmax.numel()), op, ": nested must hold ", nested_size(absmax.numel()),
                " values (one per ", kNestedBlocksize, " absmax, and the offset), got shape ", shape_of(nested));
}

// absmax_q: uint8, any shape; nested: float32 [ceil(n/256) + 1].
inline void check_absmax_dequantize(const Tensor& absmax_q, const Tensor& nested) {
  constexpr const char* op = "absmax_dequantize";
  check_nested(op, absmax_q, nested);
}

struct LinearShape {
  int64_t M, N, K, R;  // tokens, out features, in features, rank (0 without LoRA)
};

// Of lora_linear and its backward, on the device of `x`: qweight: uint8 [N, K/2]; absmax: float32 [N, K/blocksize], or
// uint8 with nested float32; bias: [N]; lora_A: [R, K]; lora_B: [N, R]; seed: int64 [1], needed when dropout > 0. M is
// left to the caller.
inline LinearShape check_lora_layer(const char* op, const Tensor& x, const Tensor& qweight, const Tensor& absmax,
                                    const OptionalTensor& nested, const OptionalTensor& bias,
                                    const OptionalTensor& lora_A, const OptionalTensor& lora_B, double dropout,
                                    const OptionalTensor& seed, int64_t blocksize) {
  check_blocksize(op, blocksize);
  check_dtype(op, "qweight", qweight, ScalarType::Byte);
  require_value(qweight.dim() == 2, op, ": qweight must be [N, K/2], got shape ", shape_of(qweight));
  LinearShape shape{0, qweight.size(0), qweight.size(1) * 2, 0};
  require_value(shape.K % blocksize == 0, op, ": qweight must have a multiple of blocksize / 2 = ", blocksize / 2,
                " columns, got shape ", shape_of(qweight));
  check_same_device(op, "qweight", qweight, x);
  check_same_device(op, "absmax", absmax, x);
  const int64_t blocks = shape.N * (shape.K / blocksize);
  require_value(absmax.numel() == blocks, op, ": absmax must hold ", blocks, " values (one per ", blocksize,
                " weights), got shape ", shape_of(absmax));
  if (nested) {
    check_nested(op, absmax, *nested);
  } else {
    require_kind(absmax.scalar_type() == ScalarType::Float, op, ": absmax must be float32, or uint8 with nested, got ",
                 name_of(absmax.scalar_type()));
  }
  if (bias) {
    check_float(op, "bias", *bias);
    check_same_device(op, "bias", *bias, x);
    require_value(bias->dim() == 1 && bias->size(0) == shape.N, op, ": bias must be [", shape.N, "], got shape ",
                  shape_of(*bias));
  }
  require_value(lora_A.has_value() == lora_B.has_value(), op, ": lora_A and lora_B must come together, got only one");
  require_value(dropout >= 0.0 && dropout < 1.0, op, ": dropout must be in [0, 1), got ", dropout);
  if (!lora_A) return shape;
  check_float(op, "lora_A", *lora_A);
  check_float(op, "lora_B", *lora_B);
  check_same_device(op, "lora_A", *lora_A, x);
  check_same_device(op, "lora_B", *lora_B, x);
  require_value(lora_A->dim() == 2 && lora_A->size(1) == shape.K && lora_A->size(0) >= 1, op, ": lora_A must be [R, ",
                shape.K, "] with R >= 1, got shape ", shape_of(*lora_A));
  shape.R = lora_A->size(0);
  require_value(lora_B->dim() == 2 && lora_B->size(0) == shape.N && lora_B->size(1) == shape.R, op,
                ": lora_B must be [", shape.N, ", ", shape.R, "] (out features, rank of lora_A), got shape ",
                shape_of(*lora_B));
  if (dropout > 0.0) {
    require_value(seed.has_value(), op, ": dropout > 0 needs a seed, got None; pass torch.randint(2**62, (1,))");
    check_dtype(op, "seed", *seed, ScalarType::Long);
    check_same_device(op, "seed", *seed, x);
    require_value(seed->numel() == 1, op, ": seed must hold one value, got shape ", shape_of(*seed));
  }
  return shape;
}

// All dimensions but the last, multiplied.
inline int64_t rows_of(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) rows *= tensor.size(i);
  return rows;
}

inline void check_lora_x(const char* op, const Tensor& x, int64_t K) {
  require_value(x.dim() >= 1 && x.size(x.dim() - 1) == K, op, ": the last dimension of x must be ", K,
                " (in features of qweight), got shape ", shape_of(x));
}

// x: [..., K]; the rest as above.
inline LinearShape check_lora_linear(const char* op, const Tensor& x, const Tensor& qweight, const Tensor& absmax,
                                     const OptionalTensor& nested, const OptionalTensor& bias,
                                     const OptionalTensor& lora_A, const OptionalTensor& lora_B, double dropout,
                                     const OptionalTensor& seed, int64_t blocksize) {
  check_float(op, "x", x);
  LinearShape shape = check_lora_layer(op, x, qweight, absmax, nested, bias, lora_A, lora_B, dropout, seed, blocksize);
  check_lora_x(op, x, shape.K);
  shape.M = rows_of(x);
  return shape;
}

// dy: [..., N]; x: [..., K] as in the forward, or none; S: [M, R] as the forward returned it, or none; all of one dtype.
inline LinearShape check_lora_linear_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& S,
                                              const Tensor& qweight, const Tensor& absmax, const OptionalTensor& nested,
                                              const OptionalTensor& lora_A, const OptionalTensor& lora_B,
                                              double dropout, const OptionalTensor& seed, int64_t blocksize) {
  constexpr const char* op = "lora_linear_backward";
  const Tensor& like = x ? *x : dy;
  check_float(op, x ? "x" : "dy", like);
  LinearShape shape =
      check_lora_layer(op, like, qweight, absmax, nested, std::nullopt, lora_A, lora_B, dropout, seed, blocksize);
  if (x) check_lora_x(op, *x, shape.K);
  shape.M = rows_of(like);
  check_dtype(op, "dy", dy, like.scalar_type());
  check_same_device(op, "dy", dy, like);
  require_value(dy.dim() >= 1 && dy.size(dy.dim() - 1) == shape.N && rows_of(dy) == shape.M, op, ": dy must be [",
                shape.M, " tokens, ", shape.N, "], got shape ", shape_of(dy));
  if (!S) return shape;
  check_dtype(op, "S", *S, like.scalar_type());
  check_same_device(op, "S", *S, like);
  require_value(S->dim() == 2 && S->size(0) == shape.M && S->size(1) == shape.R, op, ": S must be [", shape.M, ", ",
                shape.R, "], got shape ", shape_of(*S));
  return shape;
}

using Tensors = std::vector<Tensor>;

inline int64_t moment_blocks(int64_t count) { return ceil_div(count, kMomentBlocksize); }

inline void check_real(const char* op, const char* what, bool held, const char* contract, double value) {
  require_value(held, op, ": ", what, " must be ", contract, ", got ", value);
}

// One entry of a list: of `count` values, in order in memory, on the device of `skipped`.
inline void check_adamw_entry(const char* what, size_t i, const Tensor& tensor, int64_t count, const Tensor& skipped) {
  constexpr const char* op = "adamw_step_";
  require_value(tensor.numel() == count, op, ": ", what, "[", i, "] must hold ", count, " values, got shape ",
                shape_of(tensor));
  require_value(tensor.is_contiguous(), op, ": ", what, "[", i, "] must be contiguous, got strides that are not");
  require_value(tensor.device() == skipped.device(), op, ": ", what, "[", i, "] must be on the device of skipped");
}

// params: float32, bfloat16 or float16; grads: the same; exp_avgs, exp_avg_sqs: float32, or uint8 with absmaxs float32
// [ceil(n / 256), 2]; all contiguous. Returns whether the moments have 8 bits.
inline bool check_adamw_step(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                             const Tensors& exp_avg_sqs, const Tensors& absmaxs, const Tensor& skipped,
                             const OptionalTensor& scale, double lr, double beta1, double beta2, double eps,
                             double weight_decay, int64_t step) {
  constexpr const char* op = "adamw_step_";
  check_real(op, "lr", lr >= 0.0 && std::isfinite(lr), "finite and not negative", lr);
  check_real(op, "beta1", beta1 >= 0.0 && beta1 < 1.0, "in [0, 1)", beta1);
  check_real(op, "beta2", beta2 >= 0.0 && beta2 < 1.0, "in [0, 1)", beta2);
  check_real(op, "eps", eps >= 0.0 && std::isfinite(eps), "finite and not negative", eps);
  check_real(op, "weight_decay", weight_decay >= 0.0 && std::isfinite(weight_decay), "finite and not negative",
             weight_decay);
  require_value(step >= 1, op, ": step must count from 1, got ", step);
  const bool eight_bits = !absmaxs.empty();
  const auto check_length = [&](const char* what, const Tensors& list) {
    require_value(list.size() == params.size(), op, ": ", what, " must be as many as params, ", params.size(), ", got ",
                  list.size());
  };
  check_length("grads", grads);
  check_length("exp_avgs", exp_avgs);
  check_length("exp_avg_sqs", exp_avg_sqs);
  if (eight_bits) check_length("absmaxs (none for float32 moments)", absmaxs);
  check_dtype(op, "skipped", skipped, ScalarType::Long);
  require_value(skipped.numel() == 1, op, ": skipped must hold one value, got shape ", shape_of(skipped));
  if (scale) {
    check_dtype(op, "scale", *scale, ScalarType::Float);
    check_same_device(op, "scale", *scale, skipped);
    require_value(scale->numel() == 1, op, ": scale must hold one value, got shape ", shape_of(*scale));
  }
  const ScalarType moment = eight_bits ? ScalarType::Byte : ScalarType::Float;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t count = params[i].numel();
    check_float(op, "every param", params[i]);
    check_dtype(op, "every grad (as its param)", grads[i], params[i].scalar_type());
    check_dtype(op, eight_bits ? "every exp_avg (with absmaxs)" : "every exp_avg (without absmaxs)", exp_avgs[i],
                moment);
    check_dtype(op, eight_bits ? "every exp_avg_sq (with absmaxs)" : "every exp_avg_sq (without absmaxs)",
                exp_avg_sqs[i], moment);
    check_adamw_entry("params", i, params[i], count, skipped);
    check_adamw_entry("grads", i, grads[i], count, skipped);
    check_adamw_entry("exp_avgs", i, exp_avgs[i], count, skipped);
    check_adamw_entry("exp_avg_sqs", i, exp_avg_sqs[i], count, skipped);
    if (!eight_bits) continue;
    check_dtype(op, "every absmax", absmaxs[i], ScalarType::Float);
    check_adamw_entry("absmaxs", i, absmaxs[i], 2 * moment_blocks(count), skipped);
  }
  return eight_bits;
}

}  // namespace nf4lora
