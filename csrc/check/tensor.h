// What several ops demand of one tensor or of the blocksize.
#pragma once

#include "../format.h"
#include "../tensors.h"
#include "require.h"

namespace nf4lora {

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

}  // namespace nf4lora
