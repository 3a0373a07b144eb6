// The matrix instruction of 16-bit values with float32 sums, on every architecture from sm_80 on.
#pragma once

#include <cstring>
#include <type_traits>

#include "vector.cuh"

namespace nf4lora::cuda {

// Two neighbours as the word that the instruction takes, the first in the lower half.
template <typename T>
__device__ __forceinline__ unsigned as_word(const T (&pair)[2]) {
  unsigned short halves[2];
  memcpy(halves, pair, sizeof halves);
  return halves[0] | static_cast<unsigned>(halves[1]) << 16;
}

// sums += A B with A [16, 16], B [16, 8] spread over a warp (PTX ISA, mma.m16n8k16): lane l holds, of rows l / 4 and
// l / 4 + 8 of A, k = 2 (l % 4) and the next, and those 8 further on; of column l / 4 of B the same k; and of the sums
// rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next. Which lane holds what, of A and of the sums:
//
//     A       k  0,1  2,3  4,5  6,7 | 8,9 10,11 12,13 14,15        sums  column  0,1  2,3  4,5  6,7
//     row  0      0    1    2    3  |  0    1     2     3          row  0          0    1    2    3
//     row  1      4    5    6    7  |  4    5     6     7          row  1          4    5    6    7
//      ...                 A[0]     |           A[2]                ...        sums[0] and sums[1]
//     row  7     28   29   30   31  | 28   29    30    31          row  7         28   29   30   31
//     row  8      0    1    2    3  |  0    1     2     3          row  8          0    1    2    3
//      ...                 A[1]     |           A[3]                ...        sums[2] and sums[3]
//     row 15     28   29   30   31  | 28   29    30    31          row 15         28   29   30   31
//
// B is held as A's upper half is, its columns in place of rows: B0 for k below 8, B1 above.
template <typename T>
__device__ __forceinline__ void mma(float (&sums)[4], const unsigned (&A)[4], unsigned B0, unsigned B1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B0), "r"(B1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B0), "r"(B1));
  }
}

}  // namespace nf4lora::cuda
