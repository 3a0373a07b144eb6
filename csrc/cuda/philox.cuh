// The words behind dropout (format.h): Philox4x32-10, four at a time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../format.h"

namespace nf4lora::cuda {

struct Words {
  uint32_t value[4];
};

__device__ __forceinline__ Words philox(uint64_t seed, uint64_t block) {
  constexpr uint32_t kMultiplier0 = kPhiloxMultiplier[0], kMultiplier1 = kPhiloxMultiplier[1];
  constexpr uint32_t kWeyl0 = kPhiloxWeyl[0], kWeyl1 = kPhiloxWeyl[1];
  uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t low0 = kMultiplier0 * c[0], high0 = __umulhi(kMultiplier0, c[0]);
    const uint32_t low1 = kMultiplier1 * c[2], high1 = __umulhi(kMultiplier1, c[2]);
    c[0] = high1 ^ c[1] ^ key[0];
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ key[1];
    c[3] = low0;
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

}  // namespace nf4lora::cuda
