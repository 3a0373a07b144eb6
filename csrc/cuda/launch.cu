// What every launcher shares: the verdict on a launch, the one way back from the device, and what is known of it.
#include "launch.h"

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstdint>

#include "card.h"

namespace nf4lora::cuda {

Card current_card() {
  static std::array<std::atomic<uint64_t>, 128> known{};  // both numbers in one word; 0: not asked yet
  int device = 0;
  cudaGetDevice(&device);
  const auto index = static_cast<size_t>(device);
  uint64_t word = index < known.size() ? known[index].load(std::memory_order_relaxed) : 0;
  if (word == 0) {
    int multiprocessors = 1, shared = 0;
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    word = static_cast<uint64_t>(multiprocessors) << 32 | static_cast<uint32_t>(shared);
    if (index < known.size()) known[index].store(word, std::memory_order_relaxed);
  }
  return {static_cast<int>(word >> 32), static_cast<int>(word & 0xFFFFFFFF)};
}

Error launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

Error read(void* host, const void* device, int64_t bytes, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, cuda_stream);
  cudaStreamSynchronize(cuda_stream);
  return launched();
}

}  // namespace nf4lora::cuda
