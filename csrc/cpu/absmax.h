// The scales of a weight as the loops take them, whether they were quantised again or not.
#pragma once

#include "../tensors.h"
#include "isa/loops.h"

namespace nf4lora {

// Views of absmax and, with double quantisation, of nested: nothing is decoded. The tensors must be contiguous and
// outlive the result.
Scales scales_of(const Tensor& absmax, const OptionalTensor& nested);

}  // namespace nf4lora
