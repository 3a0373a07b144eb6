// What every launcher shares: the verdict on a launch, and the one way back from the device.
#include "launch.h"

#include <cuda_runtime.h>

namespace nf4lora::cuda {

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
