// The loops that are compiled once per instruction set: plain pointers, one thread's share of the work, no torch.
// cpu/*.cpp split the work, allocate, and call them through the table of the chosen instruction set.
#pragma once

#include <cstdint>

namespace nf4lora {

enum class Dtype : int { f32, bf16, f16 };

// A row-major matrix of one dtype.
struct Dense {
  const void* data;  // [rows, stride]
  Dtype dtype;
  int64_t stride;  // elements from one row to the next
};

// A packed NF4 matrix. Panels of it hold W rounded to the dtype of the product.
struct Packed {
  const uint8_t* qweight;  // [N, K/2]
  const float* absmax;     // [N, K/blocksize], decoded
  int64_t K;
  int64_t blocksize;
};

// Matrix products C[rows, lanes] += A[rows, depth] B[depth, lanes] in tiles of kRows rows and up to `max_lanes` lanes.
// Both operands are first laid out in 32-bit elements, `step` values of the depth in each: one float32, or a pair of
// bfloat16 for the dot-product instruction. A depth that is no multiple of `step` is padded with zeros.
//
//   A tile:  [steps][kRows]      B panel: [steps][lanes]      C tile: [kRows][lanes] float32
struct Gemm {
  int step;       // depth values in one element
  int rows;       // kRows
  int vector;     // lanes come in multiples of this
  int max_lanes;  // widest panel

  // A tile from rows [row, row + rows) of A, depth [k, k + depth); rows from `valid` on become zeros. May write up to
  // one step beyond the tile, so tiles that are packed in parallel stand one step apart.
  void (*pack_rows)(const Dense& A, int64_t row, int64_t valid, int64_t k, int64_t depth, void* tile);
  // A tile from the transpose: element (i, k) is A[k, row + i].
  void (*pack_columns)(const Dense& A, int64_t row, int64_t valid, int64_t k, int64_t depth, void* tile);

  // B panels: element (k, lane) is, in this order, D[n + lane, k], D[k, n + lane], W[n + lane, k], W[k, n + lane].
  // Lanes from `valid` on become zeros.
  void (*panel_rows)(const Dense& D, int64_t n, int64_t valid, int lanes, int64_t k, int64_t depth, void* panel);
  void (*panel_columns)(const Dense& D, int64_t n, int64_t valid, int lanes, int64_t k, int64_t depth, void* panel);
  void (*panel_nf4_rows)(const Packed& W, int64_t n, int64_t valid, int lanes, int64_t k, int64_t depth, void* panel);
  void (*panel_nf4_columns)(const Packed& W, int64_t n, int64_t valid, int lanes, int64_t k, int64_t depth,
                            void* panel);

  // C += A B over `steps` elements.
  void (*tile)(const void* A, const void* B, int64_t steps, int lanes, float* C);
};

struct Loops {
  const char* name;

  // Blocks [begin, end) of a flat weight. Returns the first block that is not finite, or -1.
  int64_t (*nf4_quantize)(const void* weight, Dtype dtype, int64_t begin, int64_t end, int64_t blocksize,
                          uint8_t* qweight, float* absmax);
  void (*nf4_dequantize)(const uint8_t* qweight, const float* absmax, int64_t begin, int64_t end, int64_t blocksize,
                         Dtype dtype, void* weight);

  // Elements [begin, end). `nested` holds one value per 256 elements; the offset comes apart.
  void (*absmax_quantize)(const float* absmax, const float* nested, float offset, int64_t begin, int64_t end,
                          uint8_t* absmax_q);
  void (*absmax_dequantize)(const uint8_t* absmax_q, const float* nested, float offset, int64_t begin, int64_t end,
                            float* absmax);

  // keep[i] = 1 where element `begin + i` of the dropout mask is kept, else 0.
  void (*dropout_mask)(uint64_t seed, uint32_t threshold, int64_t begin, int64_t count, float* keep);

  // Rows of floats. `store` rounds to a dtype, scaling first; `multiply` is element by element.
  void (*store)(const float* values, float scale, int64_t count, Dtype dtype, void* out);
  void (*multiply)(const void* values, const float* factors, int64_t count, Dtype dtype, void* out);

  const Gemm* gemm[3];  // by dtype of x
};

const Loops& loops_scalar();
const Loops& loops_avx2();
const Loops& loops_avx512();
const Loops& loops_avx512bf16();

}  // namespace nf4lora
