// The real pager over the fake runtime, for tests/test_pager.py.
#include "cuda/paged_module.h"

#include <pybind11/stl.h>

#include "runtime.h"

namespace py = pybind11;

PYBIND11_MODULE(NAME, m) {
  nf4lora::cuda::bind_pager(m);
  m.def(
      "reset",
      [](int64_t total, int64_t others, bool faults, bool deferred, uint32_t seed) {
        reset({total, others, faults, deferred, seed});
      },
      py::arg("total") = 1 << 30, py::arg("others") = 0, py::arg("faults") = true, py::arg("deferred") = false,
      py::arg("seed") = 0);
  m.def("set_others", &set_others);
  m.def("fail", &fail, py::arg("function"), py::arg("nth"), py::arg("code"));
  m.def("calls", &calls);
  m.def("wrongs", &wrongs);
  m.def("alive", &alive);
  m.def("resident", &resident);
  m.def("faults", &faults);
  m.def("new_stream", &new_stream);
  m.def("kernel", &kernel);
  m.def("finish", &finish);
}
