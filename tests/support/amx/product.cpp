// Products through the table of csrc/cpu/isa/amx.h, over emulated instructions, walked as csrc/cpu/product.h walks them.
#include "tiles.h"

#define NF4LORA_ISA scalar
#include "cpu/isa/amx.h"

#include <algorithm>
#include <vector>

using namespace nf4lora;

namespace {

// Of a panel's elements as far as they do not come from a packed weight.
struct Pair {
  using Tag = scalar::Bf16;
  static constexpr int kStep = 2;
  template <class... Any>
  static void decode_rows(Any...) {}
  template <class... Any>
  static void decode_pair(Any...) {}
};
const Gemm& gemm = scalar::kTiles<Pair>;

// Memory in which nothing is a number.
template <class T>
std::vector<T> garbage(int64_t count) {
  std::vector<T> memory(static_cast<size_t>(count));
  std::fill_n(reinterpret_cast<uint8_t*>(memory.data()), sizeof(T) * memory.size(), uint8_t{0xFF});
  return memory;
}

Dense dense(const uint16_t* data, int64_t stride) { return {data, Dtype::bf16, stride}; }

// Rows of a left operand as tiles.
struct Tiles {
  Tiles(const uint16_t* A, bool transposed, int64_t rows, int64_t depth) : depth(depth) {
    const int64_t steps = (depth + gemm.step - 1) / gemm.step;
    stride = ((steps + gemm.tile_steps - 1) / gemm.tile_steps * gemm.tile_steps + 1) * gemm.rows;
    const int64_t count = (rows + gemm.rows - 1) / gemm.rows;
    memory = garbage<uint32_t>(count * stride);
    for (int64_t tile = 0; tile < count; ++tile) {
      const int64_t row = tile * gemm.rows, valid = std::min<int64_t>(rows - row, gemm.rows);
      (transposed ? gemm.pack_columns : gemm.pack_rows)(dense(A, transposed ? rows : depth), row, valid, 0, depth,
                                                        memory.data() + tile * stride);
    }
  }
  const uint32_t* at(int64_t tile, int64_t step) const { return memory.data() + tile * stride + step * gemm.rows; }

  int64_t depth, stride;
  std::vector<uint32_t> memory;
};

}  // namespace

// out [M, N] = keep(scale * (A_low B_low)) + offset + A B. A: [M, K], or [K, M] where a_transposed; B: [N, K], or
// [K, N] where b_columns, and so A_low [M, R] and B_low. A chunk is as many steps of the depth as are multiplied at once.
// Returns how often the instructions were used wrongly.
extern "C" int64_t product(const uint16_t* A, int a_transposed, const uint16_t* B, int b_columns, int64_t M, int64_t N,
                           int64_t K, const uint16_t* A_low, const uint16_t* B_low, int64_t R, float scale,
                           const uint32_t* keep, const float* offset, int64_t chunk_steps, uint16_t* out) {
  const int64_t before = amx_emulated::wrongs;
  const Tiles tiles(A, a_transposed, M, K), low(A_low, false, R ? M : 0, R);
  const auto fill = [&](const uint16_t* D, int64_t depth_of_D, int64_t n, int64_t valid, int lanes, int64_t k,
                        int64_t depth, uint32_t* panel) {
    if (b_columns) {
      gemm.panel_columns(dense(D, N), n, valid, lanes, k, depth, panel);
    } else {
      gemm.panel_rows(dense(D, depth_of_D), n, valid, lanes, k, depth, panel);
    }
  };
  const int64_t chunk = chunk_steps * gemm.step, tile_count = (M + gemm.rows - 1) / gemm.rows;
  for (int64_t n = 0; n < N; n += gemm.max_lanes) {
    const int64_t valid = std::min<int64_t>(N - n, gemm.max_lanes);
    const auto lanes = static_cast<int>((valid + gemm.vector - 1) / gemm.vector * gemm.vector);
    auto panel = garbage<uint32_t>(chunk_steps * gemm.max_lanes);
    auto low_panel = garbage<uint32_t>((R + 1) / 2 * gemm.max_lanes);
    if (R) fill(B_low, R, n, valid, lanes, 0, R, low_panel.data());
    std::vector<float> line(static_cast<size_t>(lanes));
    std::vector<uint32_t> bits(static_cast<size_t>(gemm.rows * lanes));
    if (offset) std::copy_n(offset + n, valid, line.begin());
    auto sums = garbage<float>(tile_count * gemm.rows * lanes);
    const Entered entered(gemm);
    for (int64_t k = 0; k == 0 || k < K; k += chunk) {
      const int64_t depth = std::min(K - k, chunk), steps = (depth + gemm.step - 1) / gemm.step;
      fill(B, K, n, valid, lanes, k, depth, panel.data());
      for (int64_t tile = 0; tile < tile_count; ++tile) {
        float* own = sums.data() + tile * gemm.rows * lanes;
        const int64_t rows = std::min<int64_t>(M - tile * gemm.rows, gemm.rows);
        if (k == 0) {
          for (int64_t row = 0; keep && row < rows; ++row) {
            std::copy_n(keep + (tile * gemm.rows + row) * N + n, valid, bits.begin() + row * lanes);
          }
          gemm.begin({low.at(R ? tile : 0, 0), low_panel.data(), (R + 1) / 2, scale, keep ? bits.data() : nullptr,
                      offset ? line.data() : nullptr},
                     tiles.at(tile, 0), panel.data(), steps, lanes, own);
        } else {
          gemm.add(tiles.at(tile, k / gemm.step), panel.data(), steps, lanes, own);
        }
        if (k + depth >= K) gemm.finish({out + tile * gemm.rows * N + n, N, rows, valid, 1.0f}, lanes, own);
      }
    }
  }
  return amx_emulated::wrongs - before + amx_emulated::configured;
}

// How often an instruction on registers that nobody has configured is found to be wrong.
extern "C" int64_t without_entering() {
  const int64_t before = amx_emulated::wrongs;
  float sums[256] = {};
  gemm.add(sums, sums, 0, 16, sums);
  return amx_emulated::wrongs - before;
}
