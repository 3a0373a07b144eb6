// Products of bfloat16 matrices in the tile registers of AMX: what gemm.h does with vectors, for an A tile of 16 rows.
//
// A register holds 16 rows of 64 bytes: 16 pairs of bfloat16, or 16 floats. One instruction adds to 16 rows of 16 sums
// the products with 16 pairs each, in 16 cycles. B's panel is what the instruction wants as it is; A is laid out apart:
//
//   A tile:  [steps / 16][16 rows][16 pairs], the last group filled up with zeros
//   B panel: [steps][lanes] pairs, of which a register takes 16 steps and 16 lanes
//
// Only the instructions of the names _tile_... are used of AMX, and of other instruction sets what simd.h has, so that
// tests can put an emulator beneath it (tests/support/amx).
#pragma once

#include "gemm.h"

namespace nf4lora::NF4LORA_ISA {

inline constexpr int kTileRows = 16, kTileSteps = 16, kTileLanes = 16;
inline constexpr int64_t kTileStride = 4 * kTileSteps;  // bytes from one row of A to the next
inline constexpr int kTileWidth = 4;                    // registers of sums; one more holds A, and two hold B in turn

// How wide the registers are: every thread says so before it uses them, and gives them back, for the system saves 8 KB
// at each switch from a thread that has them.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
inline constexpr TileConfig kTileConfig;

static void enter_tiles() { _tile_loadconfig(&kTileConfig); }
static void leave_tiles() { _tile_release(); }

// g++ does not know that the instructions read memory.
NF4LORA_INLINE void settle_memory() { asm volatile("" : : : "memory"); }

// The compilers want numbers of registers as literals.
template <int kWidth>
NF4LORA_INLINE void zero_tiles() {
  _tile_zero(0);
  if constexpr (kWidth > 1) _tile_zero(1);
  if constexpr (kWidth > 2) _tile_zero(2);
  if constexpr (kWidth > 3) _tile_zero(3);
}
template <int kWidth>
NF4LORA_INLINE void load_tiles(const float* sums) {
  constexpr int64_t kStride = 4 * kTileLanes * kWidth;
  settle_memory();
  _tile_loadd(0, sums, kStride);
  if constexpr (kWidth > 1) _tile_loadd(1, sums + 1 * kTileLanes, kStride);
  if constexpr (kWidth > 2) _tile_loadd(2, sums + 2 * kTileLanes, kStride);
  if constexpr (kWidth > 3) _tile_loadd(3, sums + 3 * kTileLanes, kStride);
}
template <int kWidth>
NF4LORA_INLINE void store_tiles(float* sums) {
  constexpr int64_t kStride = 4 * kTileLanes * kWidth;
  _tile_stored(0, sums, kStride);
  if constexpr (kWidth > 1) _tile_stored(1, sums + 1 * kTileLanes, kStride);
  if constexpr (kWidth > 2) _tile_stored(2, sums + 2 * kTileLanes, kStride);
  if constexpr (kWidth > 3) _tile_stored(3, sums + 3 * kTileLanes, kStride);
  settle_memory();
}

// The products of 16 steps.
template <int kWidth>
NF4LORA_INLINE void multiply_tiles(const uint32_t* A, const uint32_t* B) {
  constexpr int64_t kStride = 4 * kTileLanes * kWidth;
  _tile_loadd(4, A, kTileStride);
  _tile_loadd(6, B, kStride);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kWidth > 1) {
    _tile_loadd(7, B + 1 * kTileLanes, kStride);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (kWidth > 2) {
    _tile_loadd(6, B + 2 * kTileLanes, kStride);
    _tile_dpbf16ps(2, 4, 6);
  }
  if constexpr (kWidth > 3) {
    _tile_loadd(7, B + 3 * kTileLanes, kStride);
    _tile_dpbf16ps(3, 4, 7);
  }
}
template <int kWidth>
NF4LORA_INLINE void multiply_add_tiles(const void* A, const void* B, int64_t steps) {
  constexpr int kLine = kTileLanes * kWidth;
  const auto* a = static_cast<const uint32_t*>(A);
  const auto* b = static_cast<const uint32_t*>(B);
  settle_memory();
  for (; steps >= kTileSteps; steps -= kTileSteps, a += kTileRows * kTileSteps, b += kTileSteps * kLine) {
    multiply_tiles<kWidth>(a, b);
  }
  if (!steps) return;
  alignas(64) uint32_t rest[kTileSteps * kLine] = {};  // beyond the panel lies anything; zeros of A times NaN are NaN
  std::memcpy(rest, b, static_cast<size_t>(steps) * kLine * sizeof *rest);
  settle_memory();
  multiply_tiles<kWidth>(a, rest);
}

// sums[r][lane] = keep(sums * scale) + offset, as begin_tile has it.
static void adjust_sums(const Start& start, int lanes, float* sums) {
  for (int r = 0; r < kTileRows; ++r) {
    for (int lane = 0; lane < lanes; lane += kLanes) {
      Float sum = broadcast(0.0f);
      if (start.steps) {
        sum = multiply(load(sums + r * lanes + lane), broadcast(start.scale));
        if (start.keep) sum = keep_bits(sum, start.keep + r * lanes + lane);
      }
      if (start.offset) sum = add(sum, load(start.offset + lane));
      store(sums + r * lanes + lane, sum);
    }
  }
}

template <int kWidth>
static void begin_with_tiles(const Start& start, const void* A, const void* B, int64_t steps, float* sums) {
  zero_tiles<kWidth>();
  if (start.steps) {
    multiply_add_tiles<kWidth>(start.A, start.B, start.steps);
    store_tiles<kWidth>(sums);
  }
  if (start.steps || start.offset) {
    adjust_sums(start, kWidth * kTileLanes, sums);
    load_tiles<kWidth>(sums);
  }
  multiply_add_tiles<kWidth>(A, B, steps);
  store_tiles<kWidth>(sums);
}
template <int kWidth>
static void add_with_tiles(const void* A, const void* B, int64_t steps, float* sums) {
  load_tiles<kWidth>(sums);
  multiply_add_tiles<kWidth>(A, B, steps);
  store_tiles<kWidth>(sums);
}

static void begin_in_tiles(const Start& start, const void* A, const void* B, int64_t steps, int lanes, float* sums) {
  switch (lanes / kTileLanes) {
    case 1: return begin_with_tiles<1>(start, A, B, steps, sums);
    case 2: return begin_with_tiles<2>(start, A, B, steps, sums);
    case 3: return begin_with_tiles<3>(start, A, B, steps, sums);
    case 4: return begin_with_tiles<4>(start, A, B, steps, sums);
  }
}
static void add_in_tiles(const void* A, const void* B, int64_t steps, int lanes, float* sums) {
  switch (lanes / kTileLanes) {
    case 1: return add_with_tiles<1>(A, B, steps, sums);
    case 2: return add_with_tiles<2>(A, B, steps, sums);
    case 3: return add_with_tiles<3>(A, B, steps, sums);
    case 4: return add_with_tiles<4>(A, B, steps, sums);
  }
}

inline constexpr int kTileDepth = 2 * kTileSteps;  // values of a row

static void pack_tile_rows(const Dense& A, int64_t row, int64_t valid, int64_t k, int64_t depth, void* tile) {
  auto* out = static_cast<uint16_t*>(tile);
  for (int64_t done = 0; done < depth; done += kTileDepth) {
    const auto part = static_cast<size_t>(smaller(depth - done, kTileDepth));
    for (int64_t r = 0; r < kTileRows; ++r, out += kTileDepth) {
      const auto* source = static_cast<const uint16_t*>(A.data) + (row + r) * A.stride + k + done;
      if (r < valid && part == kTileDepth) {
        std::memcpy(out, source, kTileStride);
        continue;
      }
      std::memset(out, 0, kTileStride);
      if (r < valid) std::memcpy(out, source, part * sizeof *out);
    }
  }
}

static void pack_tile_columns(const Dense& A, int64_t row, int64_t valid, int64_t k, int64_t depth, void* tile) {
  const int64_t count = smaller(valid, kTileRows), groups = (depth + kTileDepth - 1) / kTileDepth;
  auto* out = static_cast<uint16_t*>(tile);
  std::memset(out, 0, static_cast<size_t>(groups * kTileRows * kTileStride));
  for (int64_t i = 0; i < depth; ++i) {
    const auto* source = static_cast<const uint16_t*>(A.data) + (k + i) * A.stride + row;
    uint16_t* to = out + i / kTileDepth * kTileRows * kTileDepth + i % kTileDepth;
    for (int64_t r = 0; r < count; ++r) to[r * kTileDepth] = source[r];
  }
}

// Math: pairs of bfloat16, whose panels are laid out by panel.h.
template <class Math>
inline constexpr Gemm kTiles = {
    Math::kStep,          kTileRows,
    kTileLanes,           kTileWidth * kTileLanes,
    pack_tile_rows,       pack_tile_columns,
    panel_rows<Math>,     panel_columns<Math>,
    panel_nf4_rows<Math>, panel_nf4_columns<Math>,
    begin_in_tiles,       add_in_tiles,
    finish<Math>,         kTileSteps,
    enter_tiles,          leave_tiles,
};

}  // namespace nf4lora::NF4LORA_ISA
