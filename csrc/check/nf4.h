// What nf4_quantize and nf4_dequantize demand of their arguments.
#pragma once

#include "tensor.h"

namespace nf4lora {

// weight: [..., K] float32, bfloat16 or float16, K a multiple of blocksize.
inline void check_nf4_quantize(const Tensor& weight, int64_t blocksize) {
  constexpr const char* op = "nf4_quantize";
  check_blocksize(op, blocksize);
  check_float(op, "weight", weight);
  require_value(weight.dim() >= 1 && weight.size(weight.dim() - 1) % blocksize == 0, op,
                ": the last dimension of weight must be a multiple of blocksize ", blocksize, ", got shape ",
                shape_of(weight));
}

// A weight that is not finite has no nearest code. `block` is the index of the first such block.
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

}  // namespace nf4lora
