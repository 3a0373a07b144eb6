// What absmax_quantize and absmax_dequantize demand of their arguments.
#pragma once

#include <cmath>

#include "../ceil_div.h"
#include "tensor.h"

namespace nf4lora {

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

}  // namespace nf4lora
