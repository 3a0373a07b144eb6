// The Python module nf4lora._C. Loading it registers the ops; what it exports is the format itself and what this build
// is, so that Python never writes a constant down again.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/instruction_set.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/paged_module.h"
#include "format.h"
#include "siblings.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using namespace nf4lora;
  m.attr("__version__") = NF4LORA_VERSION;
  m.attr("FORMAT_VERSION") = kFormatVersion;
  m.attr("CODE") = py::tuple(py::cast(std::vector<float>(kCode.value, kCode.value + 16)));
  m.attr("NESTED_CODE") = py::tuple(py::cast(std::vector<float>(kNestedCode.value, kNestedCode.value + 256)));
  m.attr("SQUARE_CODE") = py::tuple(py::cast(std::vector<float>(kSquareCode.value, kSquareCode.value + 256)));
  m.attr("MOMENT_BLOCKSIZE") = kMomentBlocksize;
  m.attr("BLOCKSIZE") = kBlocksize;
  m.attr("NESTED_BLOCKSIZE") = kNestedBlocksize;
  std::vector<int> blocksizes;
  for (int size = kMinBlocksize; size <= kMaxBlocksize; size *= 2) blocksizes.push_back(size);
  m.attr("BLOCKSIZES") = py::tuple(py::cast(blocksizes));
  m.attr("PHILOX_MULTIPLIER") = py::make_tuple(kPhiloxMultiplier[0], kPhiloxMultiplier[1]);
  m.attr("PHILOX_WEYL") = py::make_tuple(kPhiloxWeyl[0], kPhiloxWeyl[1]);
  m.attr("PHILOX_ROUNDS") = kPhiloxRounds;

  m.attr("COMPILER") = NF4LORA_COMPILER;
  m.attr("CUDA_VERSION") = NF4LORA_CUDA_VERSION;  // of the toolkit this was built with, "" without CUDA
  m.attr("CUDA_ARCHS") = NF4LORA_CUDA_ARCHS;
  m.attr("BUILD_TORCH") = NF4LORA_BUILD_TORCH;

  m.attr("MOST_SIBLINGS") = kMostSiblings;
  m.attr("CUDA_FEW_ROWS") = cuda::kMostFewRows;
  cuda::bind_dispatch(m);
  cuda::bind_pager(m);
  m.def("cpu_instruction_set", [] { return std::string(loops().name); });
  m.def("cpu_instruction_sets", &instruction_sets);
  m.def("force_cpu_instruction_set", &force_instruction_set, py::arg("name"));
}
