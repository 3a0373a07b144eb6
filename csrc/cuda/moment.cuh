// The optimizer's moments in 8 bits on a card: codes to floats and back. ../format.h says what the bytes mean.
#pragma once

#include "../moment.h"
#include "codes.cuh"
#include "vector.cuh"
#include "warp.cuh"

namespace nf4lora::cuda {

// The maps where lanes can look up different entries at a time.
struct Tables {
  float signed_value[256], drop[256], unsigned_value[256];
  uint32_t signed_bucket[kBuckets], unsigned_bucket[kBuckets];
};
__device__ constexpr NestedCode kDeviceSquares = kSquareCode;
__device__ constexpr NestedCode kDeviceDrop = kMomentDrop;
__device__ constexpr Magnitudes kDeviceSigned = signed_magnitudes();
__device__ constexpr Magnitudes kDeviceUnsigned = unsigned_magnitudes();

// By all threads of a block, which wait for each other afterwards.
__device__ __forceinline__ void copy_tables(Tables& tables) {
  for (int i = threadIdx.x; i < 256; i += blockDim.x) {
    tables.signed_value[i] = kDeviceMap.value[i];
    tables.drop[i] = kDeviceDrop.value[i];
    tables.unsigned_value[i] = kDeviceSquares.value[i];
  }
  for (int i = threadIdx.x; i < kBuckets; i += blockDim.x) {
    tables.signed_bucket[i] = kDeviceSigned.bucket[i];
    tables.unsigned_bucket[i] = kDeviceUnsigned.bucket[i];
  }
}

constexpr int kPerLane = kMomentBlocksize / kWarp;  // neighbours that a lane of a warp steps

// The eight codes of a lane, as two words.
struct Codes {
  uint32_t word[kPerLane / 4];

  __device__ __forceinline__ uint32_t operator[](int i) const { return word[i / 4] >> i % 4 * 8 & 255; }
};
__device__ __forceinline__ Codes load_codes(const uint8_t* from, int count, bool aligned, uint8_t nothing) {
  if (aligned && count == kPerLane) {
    const auto words = *reinterpret_cast<const Vector<uint32_t, 2>*>(from);
    return {words.value[0], words.value[1]};
  }
  Codes codes{};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    codes.word[i / 4] |= static_cast<uint32_t>(i < count ? from[i] : nothing) << i % 4 * 8;
  }
  return codes;
}
__device__ __forceinline__ void store_codes(uint8_t* to, int count, bool aligned, const Codes& codes) {
  if (aligned && count == kPerLane) {
    *reinterpret_cast<Vector<uint32_t, 2>*>(to) = {{codes.word[0], codes.word[1]}};
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (i < count) to[i] = static_cast<uint8_t>(codes[i]);
  }
}

// |value| / absmax, correctly rounded: by the inverse and what its product leaves (Markstein) where absmax allows it,
// else by division (a subnormal inverse, an infinite one, the mantissa for which the method is off by one).
struct Quotient {
  float absmax, inverse;
  bool divides;

  __device__ __forceinline__ static Quotient of(float most) {
    const bool divides =
        most > 0.0f && (most < 0x1p-100f || most > 0x1p100f || (__float_as_uint(most) & 0x7FFFFF) == 0x7FFFFF);
    return {most, most > 0.0f ? __frcp_rn(most) : 0.0f, divides};
  }
  __device__ __forceinline__ float operator()(float value) const {
    return divides ? __fdiv_rn(fabsf(value), absmax) : by_inverse(value);
  }
  __device__ __forceinline__ float by_inverse(float value) const {
    const float size = fabsf(value);
    const float q = __fmul_rn(size, inverse);
    return __fmaf_rn(__fmaf_rn(-q, absmax, size), inverse, q);
  }
};

// x in (0, 1] -> the position, counted from zero, of the nearest value of a map: the upper 16 bits of the result. The lower
// 16 bits are left over from the addition and are ignored.
__device__ __forceinline__ uint32_t nearest(const uint32_t* bucket, float x) {
  const uint32_t bits = max(__float_as_uint(x), kFirstBucket << 16);
  return bucket[(bits >> 16) - kFirstBucket] + bits;
}
// The map has one value more above zero than below: for the last position below, the first code.
__device__ __forceinline__ uint32_t with_sign(uint32_t position, float value) {
  const auto at = static_cast<int>(position);
  const int up = (kNestedZero << 16) + at, down = ((kNestedZero + 1) << 16) - 1 - at;
  return static_cast<uint32_t>(value < 0.0f ? max(down, 0) : up);
}
// fminf: of a state that was damaged, NaN must not lead beyond the table.
__device__ __forceinline__ uint32_t encode_signed(const Tables& tables, float value, const Quotient& quotient) {
  return with_sign(value == 0.0f ? 0 : nearest(tables.signed_bucket, fminf(quotient(value), 1.0f)), value);
}
__device__ __forceinline__ uint32_t encode_unsigned(const Tables& tables, float value, const Quotient& quotient) {
  return value == 0.0f ? 0 : nearest(tables.unsigned_bucket, fminf(quotient(value), 1.0f));
}

// The same for values that are zero or normal, with a quotient that does not divide: the bits of a normal value are more
// than any position, those of zero are none. In the signed map zero is the nearest to itself.
__device__ __forceinline__ uint32_t encode_signed_normal(const Tables& tables, float value, const Quotient& quotient) {
  return with_sign(nearest(tables.signed_bucket, quotient.by_inverse(value)), value);
}
__device__ __forceinline__ uint32_t encode_unsigned_normal(const Tables& tables, float value,
                                                           const Quotient& quotient) {
  return min(nearest(tables.unsigned_bucket, quotient.by_inverse(value)), __float_as_uint(value));
}

// Four codes in the making, as the bytes of a word.
__device__ __forceinline__ uint32_t pack_codes(const uint32_t* made) {
  return __byte_perm(__byte_perm(made[0], made[1], 0x62), __byte_perm(made[2], made[3], 0x62), 0x5410);
}

}  // namespace nf4lora::cuda
