// The three dtypes of memory behind one face, for loops that are written once.
#pragma once

#include "simd.h"

namespace nf4lora::NF4LORA_ISA {

// F32, Bf16 and F16 are tags; `Element` is what memory holds.
struct F32 {
  static constexpr bool kHalf = false;
  using Element = float;
  NF4LORA_INLINE Float load(const float* p) { return NF4LORA_ISA::load(p); }
  NF4LORA_INLINE void store(float* p, Float v) { NF4LORA_ISA::store(p, v); }
  NF4LORA_INLINE void store_part(float* p, Float v, int64_t count) { NF4LORA_ISA::store_part(p, v, count); }
  NF4LORA_INLINE Float round(Float v) { return v; }
};
struct Bf16 {
  static constexpr bool kHalf = false;
  using Element = uint16_t;
  NF4LORA_INLINE Float load(const uint16_t* p) { return load_bf16(p); }
  NF4LORA_INLINE void store(uint16_t* p, Float v) { store_bf16(p, v); }
  NF4LORA_INLINE void store_part(uint16_t* p, Float v, int64_t count) { store_part_bf16(p, v, count); }
  NF4LORA_INLINE Float round(Float v) { return round_bf16(v); }
};
struct F16 {
  static constexpr bool kHalf = true;
  using Element = uint16_t;
  NF4LORA_INLINE Float load(const uint16_t* p) { return load_f16(p); }
  NF4LORA_INLINE void store(uint16_t* p, Float v) { store_f16(p, v); }
  NF4LORA_INLINE void store_part(uint16_t* p, Float v, int64_t count) { store_part_f16(p, v, count); }
  NF4LORA_INLINE Float round(Float v) { return round_f16(v); }
};

// What memory holds as From, rounded to T.
template <class T, class From>
NF4LORA_INLINE Float load_as(const typename From::Element* p) {
  if constexpr (__is_same(T, From)) return From::load(p);
  return T::round(From::load(p));
}
template <class T>
NF4LORA_INLINE float rounded(float value) {
  float lanes[kLanes];
  store(lanes, T::round(broadcast(value)));
  return lanes[0];
}

// fn(tag) for the dtype's tag.
template <class Fn>
NF4LORA_INLINE auto with_dtype(Dtype dtype, Fn&& fn) {
  switch (dtype) {
    case Dtype::bf16: return fn(Bf16{});
    case Dtype::f16: return fn(F16{});
    default: return fn(F32{});
  }
}

// `count` elements of a row as floats, `begin` elements in; the tail goes through a padded vector.
template <class T>
NF4LORA_INLINE void widen(const typename T::Element* row, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) NF4LORA_ISA::store(out + i, T::load(row + i));
  if (i == count) return;
  typename T::Element padded[kLanes] = {};
  std::memcpy(padded, row + i, static_cast<size_t>(count - i) * sizeof padded[0]);
  store_part(out + i, T::load(padded), count - i);
}

template <class T>
NF4LORA_INLINE void narrow(const float* row, Float scale, int64_t count, typename T::Element* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) T::store(out + i, multiply(NF4LORA_ISA::load(row + i), scale));
  if (i < count) T::store_part(out + i, multiply(load_part(row + i, count - i), scale), count - i);
}

}  // namespace nf4lora::NF4LORA_ISA
