// What is asked of CUDA's runtime once a device: an answer takes about a microsecond, and a call is launched every few.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstdint>

namespace nf4lora::cuda {

// A number of every device, kept when it has been asked for once. Zero means that it was not.
class PerDevice {
 public:
  // That of the current device; `ask` returns it, and it is not zero.
  template <class Ask>
  uint64_t get(Ask ask) {
    int device = 0;
    cudaGetDevice(&device);
    const auto index = static_cast<size_t>(device);
    if (index >= known_.size()) return ask(device);
    uint64_t number = known_[index].load(std::memory_order_relaxed);
    if (number == 0) known_[index].store(number = ask(device), std::memory_order_relaxed);
    return number;
  }

 private:
  std::array<std::atomic<uint64_t>, 128> known_{};
};

}  // namespace nf4lora::cuda
