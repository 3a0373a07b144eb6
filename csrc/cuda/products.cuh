// The sixteen products code * absmax of a block, rounded to 16 bits, in eight registers; a weight is looked up by picking
// two bytes. It is exact, and touches neither memory nor the pipe that shuffles and loads share.
#pragma once

#include <cuda_runtime.h>

#include "../format.h"
#include "matrix.cuh"
#include "vector.cuh"

namespace nf4lora::cuda {

template <typename T>
class Products {
 public:
  __device__ __forceinline__ explicit Products(float absmax) {
    constexpr Code code = kCode;
    unsigned pairs[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      T pair[2];
      round_pair(__fmul_rn(code.value[2 * i], absmax), __fmul_rn(code.value[2 * i + 1], absmax), pair);
      pairs[i] = as_word(pair);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low_[i] = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x6420);
      high_[i] = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x7531);
    }
  }

  // Eight weights from four bytes of codes, in the order of k.
  //
  // A nibble chooses one of eight bytes; its uppermost bit, which the instruction would take for "repeat the sign", is
  // masked, and chooses between the results for the lower and the upper eight codes.
  __device__ __forceinline__ uint4 look_up(unsigned codes) const {
    const unsigned among_eight = codes & 0x77777777u;
    const unsigned which_eight = (codes >> 1 & 0x44444444u) | 0x32103210u;
    uint4 weights;
    look_up_four(among_eight, which_eight, weights.x, weights.y);
    look_up_four(among_eight >> 16, which_eight >> 16, weights.z, weights.w);
    return weights;
  }

 private:
  // The lower nibble of a byte is the later weight of its pair (format.h), so that the bytes come out as 1, 0, 3, 2.
  __device__ __forceinline__ void look_up_four(unsigned among_eight, unsigned which_eight, unsigned& first,
                                               unsigned& second) const {
    const auto pick = [&](const unsigned (&bytes)[4]) {
      return __byte_perm(__byte_perm(bytes[0], bytes[1], among_eight), __byte_perm(bytes[2], bytes[3], among_eight),
                         which_eight);
    };
    const unsigned low = pick(low_), high = pick(high_);
    first = __byte_perm(low, high, 0x4051);
    second = __byte_perm(low, high, 0x6273);
  }

  unsigned low_[4], high_[4];  // the lower and the upper bytes of the products, four to a register
};

}  // namespace nf4lora::cuda
