// Dropout of the LoRA branch, of an op's arguments. Which elements it leaves out: format.h.
#pragma once

#include "format.h"
#include "lora.h"

namespace nf4lora {

struct Dropout {
  OptionalTensor seed;  // [1] int64, contiguous; none where nothing is dropped
  uint32_t threshold = 0;
  double inverse_keep = 1.0;  // 1 / (1 - probability)

  explicit Dropout(const Adapter& adapter) {
    if (adapter.dropout == 0.0 || !adapter.A) return;
    seed = contiguous_view(adapter.seed);
    threshold = dropout_threshold(adapter.dropout);
    inverse_keep = 1.0 / (1.0 - adapter.dropout);
  }
};

}  // namespace nf4lora
