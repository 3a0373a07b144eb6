// The CUDA kernels as plain functions: device pointers, sizes, a stream. No torch and no CUDA headers, so that the ops
// (.cpp, torch) and the kernels (.cu, nvcc) meet here and nowhere else. Every launcher is asynchronous unless it says
// otherwise and returns nullptr, or what CUDA said went wrong. The caller has made the stream's device current.
#pragma once

#include <cstdint>

#include "../adamw.h"
#include "../ceil_div.h"
#include "../dtype.h"
#include "../siblings.h"

namespace nf4lora::cuda {

using Error = const char*;

// What nf4_quantize leaves in first_bad where every weight is finite.
inline constexpr uint64_t kNoBlock = ~uint64_t{0};

// weight [count] -> qweight [count / 2], absmax [count / blocksize], and in first_bad [1] the lowest block that holds NaN
// or Inf. count is a multiple of blocksize.
Error nf4_quantize(const void* weight, Dtype dtype, uint8_t* qweight, float* absmax, uint64_t* first_bad, int64_t count,
                   int64_t blocksize, void* stream);

// qweight [count / 2], absmax [count / blocksize] -> weight [count]
Error nf4_dequantize(const uint8_t* qweight, const float* absmax, void* weight, Dtype dtype, int64_t count,
                     int64_t blocksize, void* stream);

// absmax [count] -> absmax_q [count], nested [ceil(count / 256) + 1]; block_sums [ceil(count / 256)] is work space.
Error absmax_quantize(const float* absmax, uint8_t* absmax_q, float* nested, double* block_sums, int64_t count,
                      void* stream);

// absmax_q [count], nested [ceil(count / 256) + 1] -> absmax [count]
Error absmax_dequantize(const uint8_t* absmax_q, const float* nested, float* absmax, int64_t count, void* stream);

// 16-bit values that are copied at a time, as 16 bytes: rows which the kernels for tensor cores copy are a multiple of it.
inline constexpr int kChunk = 8;
// Columns that a low-rank factor takes where it lengthens rows of W, of x or of dy: zeros fill them up.
constexpr int64_t padded_rank(int64_t R) { return round_up(R, kChunk); }

// W as it is stored.
struct Packed {
  const uint8_t* qweight;   // [N, K / 2]
  const float* absmax;      // [N, K / blocksize], or null and
  const uint8_t* absmax_q;  // [N, K / blocksize] with
  const float* nested;      // [ceil(N * K / blocksize / 256) + 1], the offset last
};

// lora_linear for at most kMostFewRows rows of x: S [M, R], then y [M, N]. Everything is on the device, contiguous.
inline constexpr int64_t kMostFewRows = 16;
struct FewRows {
  Dtype dtype;    // of x, S and y
  const void* x;  // [M, K]
  Packed W;
  const float* bias;   // [N] or null
  const void* lora_A;  // [R, K], of its own dtype
  const void* lora_B;  // [N, R]
  Dtype dtype_of_A, dtype_of_B;
  const uint64_t* seed;  // [1], null without dropout
  uint32_t threshold;    // of dropout
  float inverse_keep;    // 1 / (1 - dropout)
  float scaling;
  void* S;  // [M, R]
  void* y;  // [M, N]
  int64_t M, N, K, R, blocksize;
};
// Refuses, before it launches anything, float32, more rows, and x or qweight that do not begin at a multiple of 16 bytes.
Error lora_few(const FewRows& few, void* stream);

// out = bias + scale * drop(P E), from the low-rank product P [M, R] of TallSkinny: what the product with W is added to.
struct Expansion {
  void* out = nullptr;                // [M, columns], of the dtype of P; null for no expansion
  const void* E[kMostSiblings] = {};  // [R, columns], of its own dtype; of the ranks of each adapter
  Dtype dtype_of_E = Dtype::f32;
  bool E_is_transposed = false;    // E is [columns, R], of one adapter
  const float* bias = nullptr;     // [columns] or null
  const uint64_t* seed = nullptr;  // [1], null without dropout: elements of out that it leaves out have bias alone
  uint32_t threshold = 0;          // of dropout
  float scale = 1.0f;
  int64_t columns = 0;
};

// The tall and skinny products of LoRA in 16 bits, one pass over Z [M, D] for either or both, with Z under dropout:
// P = inner_scale * Z F and G = outer_scale * Z^T L. The pass can also leave a copy of Z in longer rows, which P
// continues, and P can be expanded at once. Everything is on the device, contiguous.
//
// Adapters of a group are computed as one of all their ranks: those of adapter i begin with first_rank[i], and its part of
// F, P, G and E is a matrix of its own.
inline constexpr int64_t kNoRank = INT64_MAX;
struct TallSkinny {
  Dtype dtype;                   // of Z, L and P
  const void* Z;                 // x [M, K] or dy [M, N]
  const void* F[kMostSiblings];  // [D, R], of its own dtype
  Dtype dtype_of_F;
  bool F_is_transposed;  // F is [R, D]; always of more adapters than one
  const void* L;         // [M, R], of all ranks
  const uint64_t* seed;  // [1], null without dropout
  uint32_t threshold;    // of dropout
  float inner_scale, outer_scale;
  void* P[kMostSiblings];  // [M, R], or null
  void* G[kMostSiblings];  // [D, R], of its own dtype, or null
  Dtype dtype_of_G;
  bool G_is_transposed;  // G is [R, D]; always of more adapters than one
  float* workspace;      // [tall_skinny_workspace()]
  int64_t M, D, R;
  int64_t first_rank[kMostSiblings] = {0, kNoRank, kNoRank, kNoRank};
  int64_t P_stride = 0;                    // values from one row of P to the next; 0: as many as it has columns
  int64_t most_inner = int64_t{64} << 20;  // bytes of work space for P, where 256 rows need no more
  void* copy = nullptr;                    // [M, copy_stride]: Z before dropout, then P, then zeros; null for no copy
  int64_t copy_stride = 0;                 // at least D + R, a multiple of 8
  Expansion expansion = {};
  bool adds_as_both = false;  // without G too P is added in the order that it has with G: it has the same bits then
};
// Floats of work space: sums of parts, which are added in order. For P at most most_inner bytes, or what 256 rows need;
// for G its size in float32 and that of what all blocks of two rounds keep in registers, 512 columns and 32 ranks each. So
// it stays small however many rows there are.
int64_t tall_skinny_workspace(const TallSkinny& product);
// Refuses, before it launches anything, float32, a D that is no multiple of 8, Z or copy that do not begin at a multiple
// of 16 bytes, a copy or an expansion of no P, both at a time, a copy_stride that is too short or no multiple of 8, and
// dropout of an out whose columns are no multiple of 8.
Error tall_skinny(const TallSkinny& product, void* stream);
// The expansion alone, of a P [M, R] of all ranks that is there.
Error expand(const TallSkinny& product, void* stream);

// lora_linear for any number of rows in 16 bits, or with `backward` its dx. Everything is on the device, contiguous.
struct LoraGemm {
  Dtype dtype;       // of rows, low_rank and out
  bool backward;     // out = rows W, not rows W^T
  const void* rows;  // x [M, K]; backward dy [M, N]
  Packed W;
  const float* bias;     // [N] or null; forward only
  const void* low_rank;  // S, backward T [M, R]
  const void* factor;    // lora_B [N, R], backward lora_A [R, K], of its own dtype
  Dtype dtype_of_factor;
  const uint64_t* seed;  // [1], null without dropout; backward only
  uint32_t threshold;    // of dropout
  float scaling;         // of the low-rank term; backward with dropout it holds 1 / (1 - dropout)
  void* out;             // y [M, N]; backward dx [M, K]
  float* partials;       // [lora_gemm_partials()], work space
  int64_t M, N, K, R, blocksize;
};
// Values of work space: sums of parts, where a card is filled only by splitting the summed index.
int64_t lora_gemm_partials(const LoraGemm& gemm);
// Refuses, before it launches anything, float32, rows or qweight that do not begin at a multiple of 16 bytes, and
// backwards an N that is no multiple of 8.
Error lora_gemm(const LoraGemm& gemm, void* stream);

// A rectangle of W: rows [n0, n0 + rows) and columns [k0, k0 + columns). Where there is a factor, P = padded_rank(R)
// columns more on its right hold round(round(lora_B[n0 + r, j]) * scaling), or P rows more below it that of
// lora_A[j, k0 + c], rounded to dtype, zero from R on. lora_B may have only some of the ranks that the columns on its right
// stand for: zeros surround it then. Everything is on the device, contiguous.
struct Slice {
  Dtype dtype;  // of weight
  Packed W;
  void* weight;  // [rows, columns + P], or [rows + P, columns]
  int64_t N, K, n0, rows, k0, columns, blocksize;
  int64_t stride = 0;            // values from one row of weight to the next; 0: as many as it has columns
  const void* factor = nullptr;  // lora_B [N, R], below lora_A [R, K], of its own dtype; null for none
  Dtype dtype_of_factor = Dtype::f32;
  bool factor_is_below = false;
  float scaling = 1.0f;
  int64_t R = 0;           // of factor
  int64_t first_rank = 0;  // of factor among all_ranks
  int64_t all_ranks = 0;   // R for the width on the right; 0: R
};
// Refuses, before it launches anything, k0 or columns off a multiple of 32, what lies outside W, and a stride that is
// shorter than a row.
Error lora_slice(const Slice& slice, void* stream);

// to [count] = from [count], zero where dropout of these values leaves one out; `to` may be `from`. Nothing is scaled.
// Refuses, before it launches anything, a count that is no multiple of 4.
Error dropout(const void* from, void* to, Dtype dtype, const uint64_t* seed, uint32_t threshold, int64_t count,
              void* stream);

// One tensor of adamw_step_, or a part of one that begins at a multiple of kMomentBlocksize values.
struct AdamWTensor {
  void* param;
  const void* grad;  // of param's dtype
  void* exp_avg;     // float32, or uint8 with
  void* exp_avg_sq;
  float* absmax;  // [ceil(count / 256), 2], of exp_avg and exp_avg_sq; null: float32
  int64_t count;
};
// One step of tensors [count] that share a dtype and the bits of their moments, in as few launches as fit their
// addresses. scale [1] multiplies gradients, null for one; what is not finite is added to skipped [1].
Error adamw_step(const AdamWTensor* tensors, int64_t count, Dtype dtype, bool eight_bits, const AdamW& numbers,
                 const float* scale, int64_t* skipped, void* stream);

// What CUDA says of the launches just made. The text is static; an earlier error of the stream may surface here too.
Error launched();

// Copies bytes from the device and waits for everything before it in the stream.
Error read(void* host, const void* device, int64_t bytes, void* stream);

}  // namespace nf4lora::cuda
