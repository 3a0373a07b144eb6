// The scales of a weight as float32, whether they were quantised again or not.
#pragma once

#include "tensors.h"

namespace nf4lora {

// absmax itself, or its decoding when `nested` is there: float32, contiguous, one value per block.
Tensor decoded_absmax(const Tensor& absmax, const OptionalTensor& nested);

}  // namespace nf4lora
