// The pager as Python sees it: nf4lora._C.Pager, in a build with CUDA.
#pragma once

#include <pybind11/pybind11.h>

namespace nf4lora::cuda {

void bind_pager(pybind11::module_& m);

}  // namespace nf4lora::cuda
