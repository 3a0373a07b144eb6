// The instructions of AMX that csrc/cpu/isa/amx.h uses, acted out in plain C++ as Intel's manual defines them: registers
// are a thread's own, sums are float32 with subnormal numbers as zeros, pairs are summed apart and then together. What a
// processor would answer with an exception is counted in `wrongs`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>  // so that what it defines under these names comes before what stands below
#endif

namespace amx_emulated {

struct Register {
  int rows = 0, bytes = 0;
  uint8_t data[16][64] = {};
};
inline thread_local Register registers[8];
inline thread_local bool configured = false;
inline int64_t wrongs = 0;

inline Register& at(int number) {
  if (!configured || number < 0 || number > 7 || !registers[number].rows) ++wrongs;
  return registers[number & 7];
}

inline void loadconfig(const void* memory) {
  uint8_t config[64];
  std::memcpy(config, memory, sizeof config);
  if (config[0] != 1 || config[1] != 0) ++wrongs;  // palette, first row
  for (int i = 2; i < 16; ++i) wrongs += config[i] != 0;
  for (int i = 0; i < 8; ++i) {
    uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * i, sizeof bytes);
    registers[i] = {};
    registers[i].rows = config[48 + i];
    registers[i].bytes = bytes;
    if (registers[i].rows > 16 || bytes > 64) ++wrongs;
  }
  for (int i = 8; i < 16; ++i) wrongs += config[48 + i] != 0 || config[16 + 2 * i] != 0;
  configured = true;
}
inline void release() { configured = false; }
inline void zero(int to) { std::memset(at(to).data, 0, sizeof at(to).data); }
inline void loadd(int to, const void* from, int64_t stride) {
  Register& tile = at(to);
  for (int row = 0; row < tile.rows; ++row) {
    std::memcpy(tile.data[row], static_cast<const uint8_t*>(from) + row * stride, static_cast<size_t>(tile.bytes));
  }
}
inline void stored(int from, void* to, int64_t stride) {
  const Register& tile = at(from);
  for (int row = 0; row < tile.rows; ++row) {
    std::memcpy(static_cast<uint8_t*>(to) + row * stride, tile.data[row], static_cast<size_t>(tile.bytes));
  }
}

inline float flushed(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }
inline float bf16(const uint8_t* memory) {
  uint16_t half;
  std::memcpy(&half, memory, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return flushed(value);
}
inline void dpbf16ps(int to, int first, int second) {
  Register &sums = at(to), &a = at(first), &b = at(second);
  if (to == first || to == second || first == second) ++wrongs;
  if (a.rows != sums.rows || b.bytes != sums.bytes || a.bytes != 4 * b.rows) ++wrongs;
  for (int m = 0; m < sums.rows; ++m) {
    for (int n = 0; n < sums.bytes / 4; ++n) {
      float even = 0.0f, odd = 0.0f, sum;
      for (int k = 0; k < b.rows; ++k) {
        even = flushed(std::fma(bf16(a.data[m] + 4 * k), bf16(b.data[k] + 4 * n), even));
        odd = flushed(std::fma(bf16(a.data[m] + 4 * k + 2), bf16(b.data[k] + 4 * n + 2), odd));
      }
      std::memcpy(&sum, sums.data[m] + 4 * n, sizeof sum);
      sum = flushed(flushed(sum) + flushed(even + odd));
      std::memcpy(sums.data[m] + 4 * n, &sum, sizeof sum);
    }
  }
}

}  // namespace amx_emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig ::amx_emulated::loadconfig
#define _tile_release ::amx_emulated::release
#define _tile_zero ::amx_emulated::zero
#define _tile_loadd ::amx_emulated::loadd
#define _tile_stored ::amx_emulated::stored
#define _tile_dpbf16ps ::amx_emulated::dpbf16ps
