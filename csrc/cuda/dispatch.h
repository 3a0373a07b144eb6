// Which kernel computes lora_linear and its backward on a card: the table that Python has handed over.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace nf4lora::cuda {

// few: up to kMostFewRows rows in 16 bits, forward (lora_few.cpp); fused: 16 bits on tensor cores, W unpacked on the way
// (lora_fused.cpp); dense: W unpacked into memory, torch's product (lora_dense.cpp), which takes everything.
enum class Kernel { few, fused, dense };

// What a call of lora_linear asks for.
struct Call {
  bool backward;
  bool sixteen_bits;  // dtype of x, or of dy
  int64_t tokens;
  int64_t N, K;
};

// The kernel that Python forces, else that of the first rule which holds for this architecture (compute capability times
// ten), else dense where that kernel does not take the call. Throws std::invalid_argument where a forced one does not.
Kernel chosen(const Call& call, int architecture);

// The bytes that one call may take to unpack W, and for copies of x or dy beside it.
int64_t workspace_bytes();

void bind_dispatch(pybind11::module_& module);

}  // namespace nf4lora::cuda
