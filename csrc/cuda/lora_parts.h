// What becomes of the partial sums that a pass of tall_skinny leaves: lora_grad.cu writes them, lora_parts.cu adds them.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"

namespace nf4lora::cuda {

struct Parts {
  const float* inner;  // [inner_parts, rows, R]; null where P is there
  const float* outer;  // [outer_parts, D, R], or [outer_parts, R, D] as G lies; complete only after the last rows
  int64_t inner_parts, outer_parts;
  int64_t begin, rows;  // of Z, of which P's parts are
  bool completes_G;
};

// Adds the parts in order: P, with the columns of copy and the expansion that it has, and G where it is complete.
void add_parts(const TallSkinny& product, const Parts& parts, cudaStream_t stream);

}  // namespace nf4lora::cuda
