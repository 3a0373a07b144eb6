// Double quantisation of the scales: 1/64 of the weights, so plain loops that the compiler vectorises where it can.
#pragma once

#include "simd.h"

namespace nf4lora::NF4LORA_ISA {

static void absmax_quantize(const float* absmax, const float* nested, float offset, int64_t begin, int64_t end,
                            uint8_t* absmax_q) {
  for (int64_t i = begin; i < end; ++i) {
    const float scale = nested[i / kNestedBlocksize];
    if (scale == 0.0f) {
      absmax_q[i] = kNestedZero;
      continue;
    }
    const float value = (absmax[i] - offset) / scale;
    // The number of midpoints below the value is the nearest index; a tie is not below, so it takes the lower one.
    int index = 0;
    for (int step = 128; step; step /= 2) {
      const float midpoint = (kNestedCode.value[index + step - 1] + kNestedCode.value[index + step]) / 2;
      index += value > midpoint ? step : 0;
    }
    absmax_q[i] = static_cast<uint8_t>(index);
  }
}

static void absmax_dequantize(const uint8_t* absmax_q, const float* nested, float offset, int64_t begin, int64_t end,
                              float* absmax) {
  // Two roundings: this directory is compiled with -ffp-contract=off, so that no compiler fuses them into one.
  for (int64_t i = begin; i < end; ++i) {
    absmax[i] = kNestedCode.value[absmax_q[i]] * nested[i / kNestedBlocksize] + offset;
  }
}

}  // namespace nf4lora::NF4LORA_ISA
