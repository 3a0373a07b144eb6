// The rules that choose a kernel, and their names for Python. In a build without CUDA too, where Python reads the table.
#include "dispatch.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kept_weights.h"
#include "launch.h"

namespace nf4lora::cuda {
namespace {

constexpr std::array<const char*, 3> kNames = {"few", "fused", "dense"};

struct Rule {
  Kernel kernel;
  int64_t most_tokens, most_weights;
};
using Rules = std::vector<Rule>;
// By architecture and direction; architecture 0 has the rules of all cards that are not named.
using Table = std::map<std::pair<int, bool>, Rules>;

// A call reads the table without a lock. One that is replaced stays in memory: a call may still be reading it.
std::atomic<const Table*> table{nullptr};
std::atomic<int> forced{-1};
std::atomic<int64_t> most_workspace{int64_t{512} << 20};

Kernel kernel_of(const std::string& name) {
  const auto at = std::find(kNames.begin(), kNames.end(), name);
  if (at == kNames.end()) throw std::invalid_argument("the kernel must be one of few, fused, dense, got " + name);
  return static_cast<Kernel>(at - kNames.begin());
}
const char* name_of(Kernel kernel) { return kNames[static_cast<size_t>(kernel)]; }

bool takes(Kernel kernel, const Call& call) {
  if (kernel == Kernel::dense) return true;
  if (!call.sixteen_bits || call.tokens == 0 || call.N == 0 || call.K == 0) return false;
  if (kernel == Kernel::few) return !call.backward && call.tokens <= kMostFewRows;
  return !call.backward || call.N % kChunk == 0;  // dy is copied by chunks
}

Kernel by_table(bool backward, int64_t tokens, int64_t weights, int architecture) {
  const Table* rules = table.load(std::memory_order_acquire);
  if (!rules) return Kernel::dense;
  auto at = rules->find({architecture, backward});
  if (at == rules->end()) at = rules->find({0, backward});
  if (at == rules->end()) return Kernel::dense;
  for (const Rule& rule : at->second) {
    if (tokens <= rule.most_tokens && weights <= rule.most_weights) return rule.kernel;
  }
  return Kernel::dense;
}

Kernel the_forced_one(Kernel kernel, const Call& call) {
  if (takes(kernel, call)) return kernel;
  std::string names;
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (takes(static_cast<Kernel>(i), call)) names.append(names.empty() ? "" : ", ").append(kNames[i]);
  }
  throw std::invalid_argument("lora_linear: the forced kernel must be one of " + names + " here, got '" +
                              name_of(kernel) + "'");
}

}  // namespace

Kernel chosen(const Call& call, int architecture) {
  const int wanted = forced.load(std::memory_order_relaxed);
  if (wanted >= 0) return the_forced_one(static_cast<Kernel>(wanted), call);
  const Kernel kernel = by_table(call.backward, call.tokens, call.N * call.K, architecture);
  return takes(kernel, call) ? kernel : Kernel::dense;
}

int64_t workspace_bytes() { return most_workspace.load(std::memory_order_relaxed); }

void bind_dispatch(pybind11::module_& module) {
  namespace py = pybind11;
  using Row = std::tuple<int, bool, std::string, std::optional<int64_t>, std::optional<int64_t>>;
  module.attr("CUDA_KERNELS") = py::tuple(py::cast(std::vector<std::string>(kNames.begin(), kNames.end())));
  module.def("set_cuda_rules", [](const std::vector<Row>& rows) {
    static std::mutex lock;
    static std::vector<std::unique_ptr<const Table>> all;
    Table made;
    constexpr int64_t any = std::numeric_limits<int64_t>::max();
    for (const auto& [architecture, backward, kernel, tokens, weights] : rows) {
      made[{architecture, backward}].push_back({kernel_of(kernel), tokens.value_or(any), weights.value_or(any)});
    }
    const std::lock_guard guard(lock);
    all.push_back(std::make_unique<const Table>(std::move(made)));
    table.store(all.back().get(), std::memory_order_release);
  });
  module.def("cuda_kernel_for", [](int architecture, bool backward, int64_t tokens, int64_t weights) {
    return std::string(name_of(by_table(backward, tokens, weights, architecture)));
  });
  module.def("cuda_kernel_takes",
             [](const std::string& kernel, bool backward, bool sixteen_bits, int64_t tokens, int64_t N, int64_t K) {
               return takes(kernel_of(kernel), {backward, sixteen_bits, tokens, N, K});
             });
  module.def("cuda_kernel_chosen",
             [](int architecture, bool backward, bool sixteen_bits, int64_t tokens, int64_t N, int64_t K) {
               return std::string(name_of(chosen({backward, sixteen_bits, tokens, N, K}, architecture)));
             });
  module.def("force_cuda_kernel", [](const std::optional<std::string>& name) {
    forced.store(name ? static_cast<int>(kernel_of(*name)) : -1);
  });
  module.def("set_cuda_workspace", [](int64_t bytes) { most_workspace.store(bytes); });
  module.def("cuda_workspace", &workspace_bytes);
  module.def("keep_next_cuda_weight", &keep_next_weight);
  module.def("drop_kept_cuda_weights", &drop_kept_weights);
  module.def("set_most_kept_cuda_bytes", &set_most_kept_bytes);
}

}  // namespace nf4lora::cuda
