// What every launcher shares: the verdict on a launch, the one way back from the device, and what is known of it.
#include "launch.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "card.h"
#include "per_device.h"

namespace nf4lora::cuda {

Card current_card() {
  static PerDevice known;  // all numbers in one word
  const uint64_t word = known.get([](int device) {
    int multiprocessors = 1, shared = 0, major = 0, minor = 0;
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return static_cast<uint64_t>(10 * major + minor) << 48 | static_cast<uint64_t>(multiprocessors) << 32 |
           static_cast<uint32_t>(shared);
  });
  return {static_cast<int>(word >> 32 & 0xFFFF), static_cast<int>(word & 0xFFFFFFFF), static_cast<int>(word >> 48)};
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
