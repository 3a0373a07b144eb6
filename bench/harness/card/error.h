// The last error of a thread.
#pragma once

#include <cuda_runtime_api.h>

namespace nf4lora::card {

// Remembers the error for cudaGetLastError, and returns it.
cudaError_t fail(cudaError_t error);

}  // namespace nf4lora::card
