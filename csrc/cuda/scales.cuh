// The scales of W as kernels read them, whether they were quantised again or not.
#pragma once

#include "../ceil_div.h"
#include "codes.cuh"
#include "launch.h"

namespace nf4lora::cuda {

// RN(RN(map[code] * nested) + offset): two roundings, never a fused multiply-add. `map` is a copy of kDeviceMap
// in shared memory.
__device__ __forceinline__ float decode_absmax(const float* map, unsigned code, float nested, float offset) {
  return __fadd_rn(__fmul_rn(map[code], nested), offset);
}

struct Scales {
  const Packed& W;
  const float* map;
  const float offset;

  // count: N * K / blocksize.
  __device__ __forceinline__ Scales(const Packed& packed, int64_t count, const float* map_)
      : W(packed), map(map_), offset(W.absmax ? 0.0f : W.nested[ceil_div(count, kNestedBlocksize)]) {}

  __device__ __forceinline__ float scale_of(int64_t block) const {
    return W.absmax ? W.absmax[block]
                    : decode_absmax(map, W.absmax_q[block], W.nested[block / kNestedBlocksize], offset);
  }

  // The same in two parts: what memory has to bring, and what is made of it later.
  struct Stored {
    float absmax;   // with double quantisation the nested one
    unsigned code;  // of double quantisation
  };
  __device__ __forceinline__ Stored stored(int64_t block) const {
    Stored stored;
    stored.code = W.absmax ? 0 : W.absmax_q[block];
    stored.absmax = W.absmax ? W.absmax[block] : W.nested[block / kNestedBlocksize];
    return stored;
  }
  __device__ __forceinline__ float decoded(Stored stored) const {
    return W.absmax ? stored.absmax : decode_absmax(map, stored.code, stored.absmax, offset);
  }
};

}  // namespace nf4lora::cuda
