// What the bytes mean: the NF4 code, the 8-bit map of double quantisation, blocksizes, nibble order, the dropout
// counter. Every other file, in C++, CUDA or Python, takes these from here. No torch and no CUDA headers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define NF4LORA_HOST_DEVICE __host__ __device__
#else
#define NF4LORA_HOST_DEVICE
#endif

namespace nf4lora {

inline constexpr int kFormatVersion = 1;  // of the native checkpoint

// Weights that share one absmax: a power of two. K must be a multiple of it, so that no block straddles two rows.
inline constexpr int kBlocksize = 64;
inline constexpr int kMinBlocksize = 32;
inline constexpr int kMaxBlocksize = 4096;
// absmax values that share one nested absmax. Blocks run over the flattened absmax; the last may be short.
inline constexpr int kNestedBlocksize = 256;
// An all-zero block divides by this instead of by zero; the stored absmax stays zero.
inline constexpr float kMinAbsmax = 1e-38f;

constexpr bool is_blocksize(int64_t value) {
  return value >= kMinBlocksize && value <= kMaxBlocksize && (value & (value - 1)) == 0;
}

struct Code {
  float value[16];
};

// Quantiles of N(0, 1) scaled to [-1, 1] (QLoRA, arXiv:2305.14314, appendix E), ascending.
inline constexpr Code kCode = {{
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
}};

// The thresholds between neighbouring codes as a search tree: node 1 is the root, node i has children 2i and 2i + 1.
// Going right when x > node lands, after four steps, on 16 + the index of the nearest code; ties go to the lower one.
constexpr Code threshold_tree() {
  Code tree{};
  for (int depth = 0; depth < 4; ++depth) {
    const int nodes = 1 << depth, stride = 16 >> depth;
    for (int i = 0; i < nodes; ++i) {
      const int right = i * stride + stride / 2;  // the first code to the right of this threshold
      tree.value[nodes + i] = (kCode.value[right - 1] + kCode.value[right]) / 2;
    }
  }
  return tree;
}
inline constexpr Code kThresholdTree = threshold_tree();

// Two codes share a byte; the first of the pair, the lower k, is the high nibble.
NF4LORA_HOST_DEVICE constexpr uint8_t pack(uint8_t first, uint8_t second) {
  return static_cast<uint8_t>(first << 4 | second);
}
NF4LORA_HOST_DEVICE constexpr uint8_t first_code(uint8_t byte) { return byte >> 4; }
NF4LORA_HOST_DEVICE constexpr uint8_t second_code(uint8_t byte) { return byte & 0x0F; }
static_assert(first_code(pack(3, 9)) == 3 && second_code(pack(3, 9)) == 9);

struct NestedCode {
  float value[256];
};
inline constexpr int kNestedZero = 127;  // index of 0 in the map; what a block of equal absmax gets

// Value i of a level of the dynamic maps below: the midpoint of part i of `parts` equal parts of [0.1, 1], times
// 10^(level - 6). In float32, rounded as torch.linspace rounds (one fused multiply-add, the upper half counted from its
// end), so that the bits are those of bitsandbytes.
constexpr float dynamic_value(int level, int parts, int i) {
  constexpr float kPower[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  const double step =
      (1.0f - 0.1f) / static_cast<float>(parts);  // float64 holds step * i exactly: one rounding remains
  auto bound = [&](int at) {
    return static_cast<float>(at < (parts + 1) / 2 ? 0.1f + step * at : 1.0f - step * (parts - at));
  };
  return kPower[level] * ((bound(i) + bound(i + 1)) / 2);
}

// The signed dynamic map (Dettmers, arXiv:2110.02861, section 1.3; bitsandbytes `create_dynamic_map`), ascending:
// 127 negative values, zero, 127 positive values, one. Level i has 2^i parts.
constexpr NestedCode nested_code() {
  NestedCode code{};
  int next = kNestedZero + 1;
  for (int level = 0; level < 7; ++level) {
    for (int i = 0; i < 1 << level; ++i, ++next) {
      code.value[next] = dynamic_value(level, 1 << level, i);
      code.value[2 * kNestedZero - next] = -code.value[next];
    }
  }
  code.value[255] = 1.0f;
  return code;
}
inline constexpr NestedCode kNestedCode = nested_code();
static_assert(kNestedCode.value[kNestedZero] == 0.0f && kNestedCode.value[254] < 1.0f);

// The unsigned dynamic map (the same paper), for what is never negative: zero, 254 values, one. Level i has 2^(i + 1)
// parts.
constexpr NestedCode square_code() {
  NestedCode code{};
  int next = 1;
  for (int level = 0; level < 7; ++level) {
    for (int i = 0; i < 2 << level; ++i, ++next) code.value[next] = dynamic_value(level, 2 << level, i);
  }
  code.value[255] = 1.0f;
  return code;
}
inline constexpr NestedCode kSquareCode = square_code();
static_assert(kSquareCode.value[0] == 0.0f && kSquareCode.value[254] < 1.0f);

// The optimizer's moments in 8 bits: blocks of 256 values, each of which share one absmax per moment. exp_avg takes the
// index of the nearest value of the signed map (kNestedCode), exp_avg_sq of the unsigned one (kSquareCode); a tie takes the
// smaller magnitude. An exp_avg_sq that is not zero is never stored as zero, so that no root of a zero divides a step.
inline constexpr int kMomentBlocksize = 256;

// An exp_avg whose gradient has ended shrinks by a factor of beta1 a step. Where two values of the map lie further apart
// than that, the nearest is the one it had, and it would move its parameter for ever. So adamw.h takes at least this
// share of absmax away, by code, with the sign of the code's value: half of what lies between it and the next smaller
// magnitude, and a sixteenth more, so that the smaller one is nearer. Of float32 only the upper 16 bits are used.
constexpr NestedCode moment_drop() {
  NestedCode drop{};
  for (int i = 0; i < 256; ++i) {
    if (i == kNestedZero) continue;
    const int smaller = i < kNestedZero ? i + 1 : i - 1;
    const float half = (kNestedCode.value[i] - kNestedCode.value[smaller]) / 2;
    const auto bits = __builtin_bit_cast(uint32_t, half * 1.0625f);
    drop.value[i] = __builtin_bit_cast(float, bits & 0xFFFF0000u);
  }
  return drop;
}
inline constexpr NestedCode kMomentDrop = moment_drop();
static_assert(kMomentDrop.value[255] < 1.0f / 256 && kMomentDrop.value[kNestedZero] == 0.0f);

// Dropout keeps element i of a [M, K] matrix (i = row * K + column) when word i of Philox4x32-10 (Salmon et al.,
// SC'11) is not below the threshold. Word i is word i % 4 of the block with counter (i / 4 as 64 bits, 0, 0) and the
// seed's two halves as key, low half first.
inline constexpr uint32_t kPhiloxMultiplier[2] = {0xD2511F53u, 0xCD9E8D57u};
inline constexpr uint32_t kPhiloxWeyl[2] = {0x9E3779B9u, 0xBB67AE85u};
inline constexpr int kPhiloxRounds = 10;

// round(dropout * 2^32), for 0 <= dropout < 1.
constexpr uint32_t dropout_threshold(double dropout) {
  const double scaled = dropout * 4294967296.0 + 0.5;
  return scaled >= 4294967295.0 ? 0xFFFFFFFFu : static_cast<uint32_t>(scaled);
}

}  // namespace nf4lora
