// What needs no vector: the bits of floats, rounding to bfloat16, and how the functions of this folder are declared.
//
// Everything here lives in namespace NF4LORA_ISA, which CMake names after the instruction set, and is forced inline: a
// function shared between two instruction sets under one name would let the linker keep the copy that the older
// processor cannot run. For the same reason no standard library template is used below this line.
#pragma once

#include <cstdint>
#include <cstring>

#define NF4LORA_INLINE static inline __attribute__((always_inline))
#define NF4LORA_UNROLL _Pragma("GCC unroll 64")

namespace nf4lora::NF4LORA_ISA {

NF4LORA_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
NF4LORA_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
NF4LORA_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// To bfloat16, nearest even, kept as float32. The carry of the addition would turn a NaN into an infinity or a zero.
NF4LORA_INLINE float to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return float_of((bits | 0x00400000) & 0xFFFF0000);
  return float_of((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000);
}

// The first `count` lanes by way of memory, for sets without masks; what is loaded has zeros in the rest.
template <int kLanes, class Vector>
NF4LORA_INLINE Vector load_first(Vector (*load)(const float*), const float* p, int64_t count) {
  float lanes[kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof lanes[0]);
  return load(lanes);
}
template <int kLanes, class Element, class Vector>
NF4LORA_INLINE void store_first(void (*store)(Element*, Vector), Element* p, Vector v, int64_t count) {
  Element lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof lanes[0]);
}

}  // namespace nf4lora::NF4LORA_ISA
