// Pager for Python: addresses and streams are integers, and the arena is a buffer, so that torch.frombuffer keeps it
// alive. Calls that may wait let other threads go on. Local to its module: the tests have a second one.
#include "paged_module.h"

#include <pybind11/stl.h>

#include <tuple>

#include "paged.h"

namespace nf4lora::cuda {

namespace py = pybind11;

void bind_pager(py::module_& m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  const auto stream_of = [](uintptr_t stream) { return reinterpret_cast<void*>(stream); };
  py::class_<Pager>(m, "Pager", py::module_local(), py::buffer_protocol())
      .def(py::init(&Pager::make), py::arg("device"), py::arg("bytes"), py::arg("mode"), Unlocked())
      .def_property_readonly("mode", &Pager::mode)
      .def_property_readonly("reason", &Pager::reason)
      .def_property_readonly("address", [](const Pager& pager) { return reinterpret_cast<uintptr_t>(pager.arena()); })
      .def_buffer([](Pager& pager) {
        return py::buffer_info(static_cast<uint8_t*>(pager.arena()), static_cast<py::ssize_t>(pager.bytes()));
      })
      .def(
          "plan",
          [](Pager& pager, const std::vector<std::vector<std::tuple<int64_t, int64_t>>>& chunks) {
            std::vector<Ranges> planned;
            for (const auto& ranges : chunks) {
              Ranges& chunk = planned.emplace_back();
              for (const auto& [offset, bytes] : ranges) chunk.push_back({offset, bytes});
            }
            pager.plan(std::move(planned));
          },
          py::arg("chunks"), Unlocked())
      .def("begin", &Pager::begin, Unlocked())
      .def("addresses",
           [](const Pager& pager, int64_t chunk) {
             std::vector<uintptr_t> found;
             for (void* address : pager.addresses(chunk)) found.push_back(reinterpret_cast<uintptr_t>(address));
             return found;
           })
      .def(
          "acquire",
          [=](Pager& pager, const std::vector<int64_t>& chunks, int64_t following, uintptr_t stream) {
            for (size_t i = 0; i < chunks.size(); ++i) {
              pager.acquire(chunks[i], i + 1 < chunks.size() ? chunks[i + 1] : following, stream_of(stream));
            }
          },
          py::arg("chunks"), py::arg("following"), py::arg("stream"), Unlocked())
      .def(
          "release",
          [=](Pager& pager, const std::vector<int64_t>& chunks, uintptr_t stream) {
            for (const int64_t chunk : chunks) pager.release(chunk, stream_of(stream));
          },
          py::arg("chunks"), py::arg("stream"), Unlocked())
      .def("wait", &Pager::wait, Unlocked())
      .def("evict", &Pager::evict, Unlocked())
      .def("residency", [](const Pager& pager) {
        const Residency found = pager.residency();
        return py::dict(py::arg("resident") = found.resident, py::arg("peak") = found.peak,
                        py::arg("held_back") = found.held_back);
      });
}

}  // namespace nf4lora::cuda
