// The loops that are compiled once per instruction set: plain pointers, one thread's share of the work, no torch.
// cpu/*.cpp split the work, allocate, and call them through the table of the chosen instruction set.
#pragma once

#include <cstdint>

#include "../../adamw.h"
#include "../../dtype.h"

namespace nf4lora {

// A row-major matrix of one dtype.
struct Dense {
  const void* data;  // [rows, stride]
  Dtype dtype;
  int64_t stride;  // elements from one row to the next
};

// The scales of a weight, flat: float32, or quantised again.
struct Scales {
  const float* absmax;      // [count], null with double quantisation
  const uint8_t* absmax_q;  // [count]
  const float* nested;      // [ceil(count / 256)]
  float offset;
};

// A packed NF4 matrix. Whoever decodes it rounds W to the dtype of the product.
struct Packed {
  const uint8_t* qweight;  // [N, K/2]
  Scales scales;           // of N * K / blocksize blocks
  int64_t K;
  int64_t blocksize;
};

// What the sums of a product begin with: keep(scale * (A_low B_low)) + offset.
struct Start {
  const void* A;         // A tile of `steps`, of the low-rank product
  const void* B;         // B panel
  int64_t steps;         // 0: no such product
  float scale;           //
  const uint32_t* keep;  // [rows][lanes] as dropout_mask writes them, or null to keep all
  const float* offset;   // [lanes], or null for zeros
};

// Where a product goes: rounded to the dtype of its operands.
struct Finish {
  void* out;       // row 0, lane 0
  int64_t stride;  // elements from one row to the next
  int64_t rows;    // that exist, at most `Gemm::rows`
  int64_t lanes;   // that exist
  float scale;     // applied before rounding
};

// Matrix products C[rows, lanes] = A[rows, depth] B[depth, lanes] in tiles of kRows rows and up to `max_lanes` lanes.
// Both operands are first laid out in 32-bit elements, `step` values of the depth in each: one float32, or a pair of
// bfloat16 for the dot-product instruction. A depth that is no multiple of `step` is padded with zeros.
//
//   A tile:  [steps][kRows]      B panel: [steps][lanes]      C tile: [kRows][lanes] float32
//
// (amx.h lays an A tile out otherwise, and as long.)
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

  // sums = what `start` says + A B over `steps` elements;  sums += A B;  rounds them to where `finish` says.
  void (*begin)(const Start& start, const void* A, const void* B, int64_t steps, int lanes, float* sums);
  void (*add)(const void* A, const void* B, int64_t steps, int lanes, float* sums);
  void (*finish)(const Finish& finish, int lanes, const float* sums);

  int tile_steps = 1;  // an A tile is filled up to a multiple of this
  void (*enter)() =
      nullptr;  // what a thread calls before `begin` and `add`, and when it is done with them; null: nothing
  void (*leave)() = nullptr;
};

// Of a thread that multiplies, as long as it does.
class Entered {
 public:
  explicit Entered(const Gemm& gemm) : leave_(gemm.leave) {
    if (gemm.enter) gemm.enter();
  }
  ~Entered() {
    if (leave_) leave_();
  }
  Entered(const Entered&) = delete;
  Entered& operator=(const Entered&) = delete;

 private:
  void (*leave_)();
};

inline constexpr int kMostFewRows = 16;

// The low-rank part of a product with few rows.
struct LowRank {
  const float* S;        // [kMostFewRows][stride], scaled; zeros beyond what exists
  int64_t stride;        // R rounded up to a multiple of 16
  const float* S_lanes;  // [R][kMostFewRows], the same transposed
  Dense B;               // [N, R], rounded to the dtype of the product when read
  int64_t R;             // 0 without LoRA
};

// y = x W^T + S B^T + bias for few rows of x: every row of W is streamed once and multiplied as it is decoded.
struct Few {
  int rows;  // of x at most, kMostFewRows or fewer: for more, laying out panels pays

  // Bytes that rows of x take when prepared.
  int64_t (*size)(int rows, int64_t K);
  // x in the order in which `multiply` wants it.
  void (*prepare)(const Dense& x, int rows, int64_t K, void* out);
  // Columns [begin, end) of y, [rows, stride] of x's dtype.
  void (*multiply)(const Packed& W, int64_t begin, int64_t end, const void* x, int rows, const LowRank& low,
                   const float* bias, void* y, int64_t stride);
  // Columns [begin, end) of S = round(scale * x A^T), A [R, K] rounded to x's dtype when read.
  void (*low_rank)(const Dense& x, int64_t rows, const Dense& A, int64_t begin, int64_t end, int64_t K, float scale,
                   void* S, int64_t stride);
  // Rows [begin, end) of out[p, q] = scale * sum over i < depth of A[i * along + p * across] B[i, q], B rounded to x's
  // dtype when read: T = dy B, dA = T^T x, dB = dy^T S.
  void (*combine)(const float* A, int64_t along, int64_t across, const Dense& B, int64_t begin, int64_t end,
                  int64_t depth, int64_t columns, float scale, const Dense& out);
  // out = round(scale * values), of x's dtype.
  void (*round)(const float* values, float scale, int64_t count, void* out);
};

// One parameter and its moments, flat.
struct AdamWValues {
  void* param;
  const void* grad;  // of param's dtype
  void* exp_avg;     // float32, or uint8 with
  void* exp_avg_sq;
  float* absmax;  // [ceil(n / 256), 2]; null: float32
  Dtype dtype;
};

struct Loops {
  const char* name;

  // Blocks [begin, end) of a flat weight. Returns the first block that is not finite, or -1.
  int64_t (*nf4_quantize)(const void* weight, Dtype dtype, int64_t begin, int64_t end, int64_t blocksize,
                          uint8_t* qweight, float* absmax);
  // `stream`: past the caches, where the weight is too large to stay there; it must then be aligned to 64 bytes.
  void (*nf4_dequantize)(const uint8_t* qweight, const float* absmax, int64_t begin, int64_t end, int64_t blocksize,
                         Dtype dtype, bool stream, void* weight);

  // Nested blocks [begin, end) of `count` scales; writes `nested` and the codes.
  void (*absmax_quantize)(const float* absmax, float offset, int64_t begin, int64_t end, int64_t count, float* nested,
                          uint8_t* absmax_q);
  // Scales [begin, end), into absmax[begin ...].
  void (*absmax_dequantize)(const Scales& scales, int64_t begin, int64_t end, float* absmax);

  // One step of values [begin, end), begin a multiple of kMomentBlocksize. Returns how many gradients were not finite.
  int64_t (*adamw_step)(const AdamWValues& values, int64_t begin, int64_t end, const AdamW& numbers, float scale);

  // keep[i] = all bits where element `begin + i` of the dropout mask is kept, else 0.
  void (*dropout_mask)(uint64_t seed, uint32_t threshold, int64_t begin, int64_t count, uint32_t* keep);
  // out = scale * values, widened.
  void (*widen)(const void* values, float scale, int64_t count, Dtype dtype, float* out);
  // out = values where kept, else zero. A factor of zero would make NaN of an infinity that is dropped.
  void (*keep)(const void* values, const uint32_t* keep, int64_t count, Dtype dtype, void* out);

  const Gemm* gemm[3];  // by dtype of x
  const Few* few[3];
};

const Gemm& gemm_amx();  // of bfloat16

}  // namespace nf4lora
