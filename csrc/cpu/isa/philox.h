// The dropout mask: Philox4x32-10 over the element's index (format.h says which word is whose).
#pragma once

#include "simd.h"

namespace nf4lora::NF4LORA_ISA {

static void dropout_mask(uint64_t seed, uint32_t threshold, int64_t begin, int64_t count, uint32_t* keep) {
  // Sixteen counters side by side: arrays that the compiler keeps in vectors.
  constexpr int kBlocks = 16;
  int64_t block = begin / 4;
  for (int64_t done = block * 4 - begin; done < count; done += 4 * kBlocks, block += kBlocks) {
    uint32_t c0[kBlocks], c1[kBlocks], c2[kBlocks] = {}, c3[kBlocks] = {};
    for (int i = 0; i < kBlocks; ++i) {
      const uint64_t counter = static_cast<uint64_t>(block + i);
      c0[i] = static_cast<uint32_t>(counter);
      c1[i] = static_cast<uint32_t>(counter >> 32);
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int i = 0; i < kBlocks; ++i) {
        const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier[0]) * c0[i];
        const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier[1]) * c2[i];
        c0[i] = static_cast<uint32_t>(product1 >> 32) ^ c1[i] ^ key0;
        c1[i] = static_cast<uint32_t>(product1);
        c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ key1;
        c3[i] = static_cast<uint32_t>(product0);
      }
      key0 += kPhiloxWeyl[0];
      key1 += kPhiloxWeyl[1];
    }
    uint32_t words[4 * kBlocks];
    for (int i = 0; i < kBlocks; ++i) {
      words[4 * i] = c0[i] >= threshold ? ~0u : 0u;
      words[4 * i + 1] = c1[i] >= threshold ? ~0u : 0u;
      words[4 * i + 2] = c2[i] >= threshold ? ~0u : 0u;
      words[4 * i + 3] = c3[i] >= threshold ? ~0u : 0u;
    }
    const int64_t skip = done < 0 ? -done : 0;  // words before `begin` in its block
    const int64_t stop = smaller(4 * kBlocks, count - done);
    if (stop > skip) std::memcpy(keep + done + skip, words + skip, static_cast<size_t>(stop - skip) * sizeof *keep);
  }
}

}  // namespace nf4lora::NF4LORA_ISA
