// Launches of what is no registered kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "counts.h"
#include "streams.h"

namespace nf4lora::card {

// Counts a launch into the stream, or a node of the graph that it is captured into.
cudaError_t launch(Counter& counter, cudaStream_t stream);

}  // namespace nf4lora::card
