// NEON of 64-bit ARM: the four lanes of scalar.h, whose vectors its instructions take as they are, 32 registers, products
// that are rounded once, floats of 16 bits, and look-ups of bytes.
#pragma once

#include <arm_neon.h>

#include "scalar.h"

namespace nf4lora::NF4LORA_ISA::neon {

using namespace scalar;

inline constexpr int kRegisters = 32;

// ---- floats

NF4LORA_INLINE Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
NF4LORA_INLINE Float fused(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
NF4LORA_INLINE Float square_root(Float v) { return vsqrtq_f32(v); }
NF4LORA_INLINE Float magnitude(Float v) { return vabsq_f32(v); }
NF4LORA_INLINE Float select(Mask mask, Float yes, Float no) {
  return vbslq_f32(reinterpret_cast<uint32x4_t>(mask), yes, no);
}
NF4LORA_INLINE int count(Mask mask) { return -vaddvq_s32(mask); }
NF4LORA_INLINE Float larger(Float a, Float b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
NF4LORA_INLINE Float lesser(Float a, Float b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
NF4LORA_INLINE float largest_lane(Float v) { return vmaxvq_f32(v); }
NF4LORA_INLINE void sum_lanes(const Float* v, int64_t stride, int count, float* out) {
  int i = 0;
  for (; i + 4 <= count; i += 4, v += 4 * stride) {
    store(out + i, vpaddq_f32(vpaddq_f32(v[0], v[stride]), vpaddq_f32(v[2 * stride], v[3 * stride])));
  }
  for (; i < count; ++i, v += stride) out[i] = vaddvq_f32(*v);
}

// ---- floats of 16 bits

NF4LORA_INLINE Float load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
NF4LORA_INLINE Float load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
NF4LORA_INLINE Float round_bf16(Float v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
  const uint32x4_t chosen = vbslq_u32(vceqq_f32(v, v), rounded, vorrq_u32(bits, vdupq_n_u32(0x00400000)));
  return vreinterpretq_f32_u32(vandq_u32(chosen, vdupq_n_u32(0xFFFF0000)));
}
NF4LORA_INLINE Float round_f16(Float v) { return vcvt_f32_f16(vcvt_f16_f32(v)); }
NF4LORA_INLINE uint16x4_t to_words_bf16(Float v) { return vshrn_n_u32(vreinterpretq_u32_f32(round_bf16(v)), 16); }
NF4LORA_INLINE uint16x4_t to_words_f16(Float v) { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }
NF4LORA_INLINE void store_bf16(uint16_t* p, Float v) { vst1_u16(p, to_words_bf16(v)); }
NF4LORA_INLINE void store_f16(uint16_t* p, Float v) { vst1_u16(p, to_words_f16(v)); }
NF4LORA_INLINE void store_part_bf16(uint16_t* p, Float v, int64_t count) {
  const uint16x4_t words = to_words_bf16(v);
  std::memcpy(p, &words, static_cast<size_t>(count) * sizeof *p);
}
NF4LORA_INLINE void store_part_f16(uint16_t* p, Float v, int64_t count) {
  const uint16x4_t words = to_words_f16(v);
  std::memcpy(p, &words, static_cast<size_t>(count) * sizeof *p);
}

// ---- bits in lanes

NF4LORA_INLINE void transpose(Int v[4]) {
  const uint32x4_t a = vtrn1q_u32(v[0], v[1]), b = vtrn2q_u32(v[0], v[1]);
  const uint32x4_t c = vtrn1q_u32(v[2], v[3]), d = vtrn2q_u32(v[2], v[3]);
  v[0] = reinterpret_cast<Int>(vtrn1q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(c)));
  v[1] = reinterpret_cast<Int>(vtrn1q_u64(vreinterpretq_u64_u32(b), vreinterpretq_u64_u32(d)));
  v[2] = reinterpret_cast<Int>(vtrn2q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(c)));
  v[3] = reinterpret_cast<Int>(vtrn2q_u64(vreinterpretq_u64_u32(b), vreinterpretq_u64_u32(d)));
}
inline constexpr int kTransposed = 4;
NF4LORA_INLINE void transpose_words(const uint8_t* const rows[8], int valid, int64_t at, uint32_t* out, int stride) {
  Int v[8];
  NF4LORA_UNROLL
  for (int r = 0; r < 8; ++r) v[r] = r < valid ? load_bits(rows[r] + 4 * at) : no_bits();
  transpose(v);
  transpose(v + 4);
  NF4LORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    std::memcpy(out + (at + i) * stride, v + i, sizeof v[i]);
    std::memcpy(out + (at + i) * stride + 4, v + 4 + i, sizeof v[i]);
  }
}

// ---- encoding NF4

// 16 floats, of which each lane looks its own up.
struct WeightTable {
  uint8x16x4_t bytes;

  NF4LORA_INLINE WeightTable of(Float a, Float b, Float c, Float d) {
    return {{reinterpret_cast<uint8x16_t>(a), reinterpret_cast<uint8x16_t>(b), reinterpret_cast<uint8x16_t>(c),
             reinterpret_cast<uint8x16_t>(d)}};
  }
  NF4LORA_INLINE WeightTable of(const float* values) {
    return of(load(values), load(values + 4), load(values + 8), load(values + 12));
  }
  __attribute__((always_inline)) Float operator[](uint32x4_t index) const {  // a float's bytes are 4 index + 0 ... 3
    const uint32x4_t at = vmlaq_u32(vdupq_n_u32(0x03020100), index, vdupq_n_u32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_u32(at)));
  }
};

inline constexpr int kEncoded = 8;

template <class T>
NF4LORA_INLINE Int larger_magnitudes(const typename T::Element* weight, Int largest) {
  const uint32x4_t first = vreinterpretq_u32_f32(vabsq_f32(T::load(weight)));
  const uint32x4_t second = vreinterpretq_u32_f32(vabsq_f32(T::load(weight + 4)));
  return reinterpret_cast<Int>(vmaxq_u32(vmaxq_u32(first, second), reinterpret_cast<uint32x4_t>(largest)));
}
NF4LORA_INLINE uint32_t largest_lane(Int v) { return vmaxvq_u32(v); }
// Four steps down the tree of thresholds, as in scalar.h.
NF4LORA_INLINE uint32x4_t nearest_code(const WeightTable& tree, Float scaled) {
  uint32x4_t node = vdupq_n_u32(1);
  NF4LORA_UNROLL
  for (int depth = 0; depth < 4; ++depth) {
    node = vsubq_u32(vaddq_u32(node, node), vcgtq_f32(scaled, tree[node]));  // a true lane is -1
  }
  return vandq_u32(node, vdupq_n_u32(15));
}
template <class T>
NF4LORA_INLINE void encode_weights(const typename T::Element* weight, Float inverse, uint8_t* qweight) {
  const WeightTable tree = WeightTable::of(kTree.value);
  const uint32x4_t low = nearest_code(tree, multiply(T::load(weight), inverse));
  const uint32x4_t high = nearest_code(tree, multiply(T::load(weight + 4), inverse));
  const uint32x4_t bytes = vorrq_u32(vshlq_n_u32(vuzp1q_u32(low, high), 4), vuzp2q_u32(low, high));
  const uint16x4_t words = vmovn_u32(bytes);
  const uint8x8_t packed = vmovn_u16(vcombine_u16(words, words));
  std::memcpy(qweight, &packed, 4);
}

// ---- decoding NF4

template <class T>
NF4LORA_INLINE WeightTable weight_table(float absmax) {
  const Float scale = broadcast(absmax);
  const auto part = [&](int i) __attribute__((always_inline)) {
    return T::round(multiply(load(kCodeTable.value + i), scale));
  };
  return WeightTable::of(part(0), part(4), part(8), part(12));
}
NF4LORA_INLINE Float decode_weights(const uint8_t* qweight, const WeightTable& table) {
  uint16_t bytes;
  std::memcpy(&bytes, qweight, 2);
  const int32x4_t shift = {-4, 0, -12, -8};
  return table[vandq_u32(vshlq_u32(vdupq_n_u32(bytes), shift), vdupq_n_u32(15))];
}
NF4LORA_INLINE Float decode_lanes(Int codes, Float absmax) {
  return multiply(WeightTable::of(kCodeTable.value)[vandq_u32(codes, vdupq_n_u32(15))], absmax);
}

// The 16 weights of a block, rounded to T, byte for byte: a look-up takes one byte of 16 weights.
template <class T>
struct BytePlanesOf {
  uint8x16_t byte[4];  // of a float, the lowest first

  NF4LORA_INLINE BytePlanesOf of(float absmax) {
    const uint8x16x4_t floats = weight_table<T>(absmax).bytes;
    const uint8x16_t even0 = vuzp1q_u8(floats.val[0], floats.val[1]), odd0 = vuzp2q_u8(floats.val[0], floats.val[1]);
    const uint8x16_t even1 = vuzp1q_u8(floats.val[2], floats.val[3]), odd1 = vuzp2q_u8(floats.val[2], floats.val[3]);
    return {{vuzp1q_u8(even0, even1), vuzp1q_u8(odd0, odd1), vuzp2q_u8(even0, even1), vuzp2q_u8(odd0, odd1)}};
  }
};

// The lower and the upper bytes of the 16 weights as words.
template <class T>
struct WordTable {
  static constexpr bool kExists = sizeof(typename T::Element) == 2;
  static constexpr int kWeights = 32;
  uint8x16_t low, high;

  NF4LORA_INLINE WordTable of(float absmax) {
    uint8x16_t half[2];
    for (int i = 0; i < 2; ++i) {
      uint16x4_t words[2];
      for (int j = 0; j < 2; ++j) {
        const Float weight = multiply(load(kCodeTable.value + 8 * i + 4 * j), broadcast(absmax));
        words[j] = T::kHalf ? to_words_f16(weight) : to_words_bf16(weight);
      }
      half[i] = vreinterpretq_u8_u16(vcombine_u16(words[0], words[1]));
    }
    return {vuzp1q_u8(half[0], half[1]), vuzp2q_u8(half[0], half[1])};
  }
  __attribute__((always_inline)) void decode(const uint8_t* qweight, bool, uint16_t* out) const {
    const uint8x16_t bytes = vld1q_u8(qweight);
    const uint8x16x2_t codes = vzipq_u8(vshrq_n_u8(bytes, 4), vandq_u8(bytes, vdupq_n_u8(15)));
    for (int i = 0; i < 2; ++i) {
      const uint8x16x2_t words = {{vqtbl1q_u8(low, codes.val[i]), vqtbl1q_u8(high, codes.val[i])}};
      vst2q_u8(reinterpret_cast<uint8_t*>(out + 16 * i), words);
    }
  }
};

// The upper nibbles of 16 bytes, then their lower ones, then those of the next 16 bytes.
template <class T>
struct Chunk {
  static constexpr int column(int i) { return i / 32 * 32 + i % 16 * 2 + i / 16 % 2; }

  template <bool kSmall, class Each>
  NF4LORA_INLINE void decode(const uint8_t* bytes, const float* scales, Each&& each) {
    const BytePlanesOf<T> table = BytePlanesOf<T>::of(scales[0]);
    const BytePlanesOf<T> other = kSmall ? BytePlanesOf<T>::of(scales[1]) : table;
    NF4LORA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint8x16_t packed = vld1q_u8(bytes + 16 * half);
      NF4LORA_UNROLL
      for (int nibble = 0; nibble < 2; ++nibble) {
        const uint8x16_t codes = nibble ? vandq_u8(packed, vdupq_n_u8(15)) : vshrq_n_u8(packed, 4);
        const auto words = [&](int byte) __attribute__((always_inline)) {
          const auto* planes = half ? other.byte : table.byte;
          return vzipq_u8(vqtbl1q_u8(planes[byte], codes), vqtbl1q_u8(planes[byte + 1], codes));
        };
        const uint8x16x2_t upper = words(2);  // of bfloat16 the lower word is zero
        const uint8x16x2_t lower = __is_same(T, Bf16) ? uint8x16x2_t{} : words(0);
        NF4LORA_UNROLL
        for (int i = 0; i < 2; ++i) {
          const uint16x8x2_t floats = vzipq_u16(vreinterpretq_u16_u8(lower.val[i]), vreinterpretq_u16_u8(upper.val[i]));
          each(8 * half + 4 * nibble + 2 * i, Float(vreinterpretq_f32_u16(floats.val[0])));
          each(8 * half + 4 * nibble + 2 * i + 1, Float(vreinterpretq_f32_u16(floats.val[1])));
        }
      }
    }
  }
};

// ---- products

inline constexpr int kFewTileRows = 6;
inline constexpr int kFewTiles = 5;

}  // namespace nf4lora::NF4LORA_ISA::neon
