// Any processor: vectors of four floats that the compiler maps to what it has, and a portable version of all that
// another set may do better. simd.h says what each name means.
//
// A further set is a file like this one, whose namespace begins with `using namespace` of the set it builds upon: what
// it does not define is taken from there.
#pragma once

#include "bits.h"
#include "tables.h"

namespace nf4lora::NF4LORA_ISA {

struct Bf16;  // of dtype.h, which stands upon the sets

namespace scalar {

inline constexpr int kLanes = 4;
inline constexpr int kRegisters = 16;

// ---- floats

typedef float Float __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));

NF4LORA_INLINE Float load(const float* p) {
  Float v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
NF4LORA_INLINE void store(float* p, Float v) { std::memcpy(p, &v, sizeof v); }
NF4LORA_INLINE void store_streamed(float* p, Float v) { store(p, v); }
NF4LORA_INLINE void finish_streamed() {}
NF4LORA_INLINE Float broadcast(float v) { return Float{v, v, v, v}; }
NF4LORA_INLINE Float multiply(Float a, Float b) { return a * b; }
NF4LORA_INLINE Float add(Float a, Float b) { return a + b; }
NF4LORA_INLINE Float fma(Float a, Float b, Float c) { return a * b + c; }
// libm takes the instruction of that name where the processor has it.
NF4LORA_INLINE Float fused(Float a, Float b, Float c) {
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return a;
}
NF4LORA_INLINE Float divide(Float a, Float b) { return a / b; }
NF4LORA_INLINE Float square_root(Float v) {
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
NF4LORA_INLINE Float magnitude(Float v) {
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_fabsf(v[i]);
  return v;
}
NF4LORA_INLINE Mask below(Float a, Float b) { return a < b; }
NF4LORA_INLINE Float select(Mask mask, Float yes, Float no) {
  return reinterpret_cast<Float>((mask & reinterpret_cast<Mask>(yes)) | (~mask & reinterpret_cast<Mask>(no)));
}
NF4LORA_INLINE int count(Mask mask) { return -(mask[0] + mask[1] + mask[2] + mask[3]); }
NF4LORA_INLINE Float keep_bits(Float v, const uint32_t* bits) {
  Mask mask;
  std::memcpy(&mask, bits, sizeof mask);
  return reinterpret_cast<Float>(mask & reinterpret_cast<Mask>(v));
}
NF4LORA_INLINE Float larger(Float a, Float b) { return select(a > b, a, b); }
NF4LORA_INLINE Float lesser(Float a, Float b) { return select(a < b, a, b); }
NF4LORA_INLINE float largest_lane(Float v) {
  const float low = v[0] > v[1] ? v[0] : v[1], high = v[2] > v[3] ? v[2] : v[3];
  return low > high ? low : high;
}
template <class Vector>
NF4LORA_INLINE void sum_lanes(const Vector* v, int64_t stride, int count, float* out) {
  constexpr int kWide = sizeof(Vector) / sizeof(float);
  for (int i = 0; i < count; ++i, v += stride) {
    const Vector sums = *v;
    float lanes[kWide];
    std::memcpy(lanes, &sums, sizeof lanes);
    for (int width = kWide / 2; width; width /= 2) {
      for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    out[i] = lanes[0];
  }
}

// ---- floats of 16 bits. IEEE binary16 without the instructions: exact one way, nearest even the other.

NF4LORA_INLINE float from_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7FFF;
  if (magnitude >= 0x7C00) return float_of(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  // Shifting the exponent field into place and multiplying by 2^112 also normalises the subnormals.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}
NF4LORA_INLINE uint16_t to_f16(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
  uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to 2^16 or beyond
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 puts the last half bit at the last float bit
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000));
  }
  magnitude += 0xFFF + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | ((magnitude >> 13) - (112 << 10)));
}

NF4LORA_INLINE Float load_bf16(const uint16_t* p) {
  Float v;
  for (int i = 0; i < kLanes; ++i) v[i] = float_of(static_cast<uint32_t>(p[i]) << 16);
  return v;
}
NF4LORA_INLINE Float load_f16(const uint16_t* p) {
  Float v;
  for (int i = 0; i < kLanes; ++i) v[i] = from_f16(p[i]);
  return v;
}
NF4LORA_INLINE Float round_bf16(Float v) {
  for (int i = 0; i < kLanes; ++i) v[i] = to_bf16(v[i]);
  return v;
}
NF4LORA_INLINE Float round_f16(Float v) {
  for (int i = 0; i < kLanes; ++i) v[i] = from_f16(to_f16(v[i]));
  return v;
}
NF4LORA_INLINE void store_bf16(uint16_t* p, Float v) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint16_t>(bits_of(to_bf16(v[i])) >> 16);
}
NF4LORA_INLINE void store_f16(uint16_t* p, Float v) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_f16(v[i]);
}

NF4LORA_INLINE Float load_part(const float* p, int64_t count) { return load_first<kLanes>(load, p, count); }
NF4LORA_INLINE void store_part(float* p, Float v, int64_t count) { store_first<kLanes>(store, p, v, count); }
NF4LORA_INLINE void store_part_bf16(uint16_t* p, Float v, int64_t count) {
  store_first<kLanes>(store_bf16, p, v, count);
}
NF4LORA_INLINE void store_part_f16(uint16_t* p, Float v, int64_t count) { store_first<kLanes>(store_f16, p, v, count); }

// ---- bits in lanes

typedef uint32_t Int __attribute__((vector_size(16)));

NF4LORA_INLINE Int no_bits() { return Int{0, 0, 0, 0}; }
NF4LORA_INLINE Int load_bits(const uint8_t* p, int64_t lanes) {
  Int v = no_bits();
  std::memcpy(&v, p, static_cast<size_t>(4 * lanes));
  return v;
}
NF4LORA_INLINE Int load_bits(const uint8_t* p) { return load_bits(p, kLanes); }
NF4LORA_INLINE Int shift_right(Int v, int bits) { return v >> static_cast<uint32_t>(bits); }
NF4LORA_INLINE void transpose(Int v[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const uint32_t kept = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = kept;
    }
  }
}
inline constexpr int kTransposed = 1;
NF4LORA_INLINE void transpose_words(const uint8_t* const rows[8], int valid, int64_t at, uint32_t* out, int stride) {
  for (int r = 0; r < 8; ++r) {
    uint32_t element = 0;
    if (r < valid) std::memcpy(&element, rows[r] + 4 * at, 4);
    out[at * stride + r] = element;
  }
}
NF4LORA_INLINE void pair_words(const uint16_t* first, const uint16_t* second, int64_t count, uint32_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<uint32_t>(first[i]) | static_cast<uint32_t>(second ? second[i] : 0) << 16;
  }
}

// ---- encoding NF4

inline constexpr int kEncoded = kLanes;

template <class T>
NF4LORA_INLINE Int larger_magnitudes(const typename T::Element* weight, Int largest) {
  const Float v = T::load(weight);
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t magnitude = bits_of(v[i]) & 0x7FFFFFFF;
    if (magnitude > largest[i]) largest[i] = magnitude;
  }
  return largest;
}
NF4LORA_INLINE uint32_t largest_lane(Int v) {
  uint32_t largest = v[0];
  for (int i = 1; i < kLanes; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}
// Four steps down the tree of thresholds. 16 is added to the index, which is dropped when nibbles are packed.
NF4LORA_INLINE Int nearest_code(Float scaled) {
  Int node = Int{1, 1, 1, 1};
  for (int i = 0; i < kLanes; ++i) {
    for (int depth = 0; depth < 4; ++depth) node[i] = 2 * node[i] + (scaled[i] > kTree.value[node[i]] ? 1 : 0);
  }
  return node;
}
template <class T>
NF4LORA_INLINE void encode_weights(const typename T::Element* weight, Float inverse, uint8_t* qweight) {
  const Int node = nearest_code(multiply(T::load(weight), inverse));
  for (int i = 0; i < kLanes; i += 2) {
    qweight[i / 2] = pack(static_cast<uint8_t>(node[i] & 15), static_cast<uint8_t>(node[i + 1] & 15));
  }
}

// ---- decoding NF4

struct WeightTable {
  float value[16];
};
template <class T>
NF4LORA_INLINE WeightTable weight_table(float absmax) {
  const Float scale = broadcast(absmax);
  WeightTable table;
  for (int i = 0; i < 16; i += kLanes) store(table.value + i, T::round(multiply(load(kCodeTable.value + i), scale)));
  return table;
}
NF4LORA_INLINE Float decode_weights(const uint8_t* qweight, const WeightTable& table) {
  Float v;
  for (int i = 0; i < kLanes; i += 2) {
    v[i] = table.value[first_code(qweight[i / 2])];
    v[i + 1] = table.value[second_code(qweight[i / 2])];
  }
  return v;
}
NF4LORA_INLINE Float decode_lanes(Int codes, Float absmax) {
  Float v;
  for (int i = 0; i < kLanes; ++i) v[i] = kCodeTable.value[codes[i] & 15];
  return multiply(v, absmax);
}

template <class T>
struct WordTable {
  static constexpr bool kExists = false;
};

template <class T>
struct Chunk {
  static constexpr int column(int i) { return i; }

  template <bool kSmall, class Each>
  NF4LORA_INLINE void decode(const uint8_t* bytes, const float* scales, Each&& each) {
    constexpr int kVectors = 64 / kLanes;
    const WeightTable table = weight_table<T>(scales[0]), other = weight_table<T>(scales[kSmall ? 1 : 0]);
    NF4LORA_UNROLL
    for (int part = 0; part < kVectors; ++part) {
      each(part, decode_weights(bytes + part * kLanes / 2, part < kVectors / 2 ? table : other));
    }
  }
};

// ---- products

inline constexpr int kFewTileRows = 2;
inline constexpr int kFewTiles = 16;
using PairProduct = void;
using PairRow = void;

// ---- the maps of 8 bits. Loop by loop, so that the compiler makes vectors of all but the look-ups.

inline constexpr int kLookedUp = 1;
NF4LORA_INLINE void look_up_nested(const uint8_t* codes, float* out) {
  uint32_t code = *codes;
  asm("" : "+r"(code));  // or g++ would take vectors apart to look their lanes up, which is slower
  *out = kNestedTable.value[code];
}

inline constexpr int kMomentGroup = 128;  // 64 and 256 are slower

NF4LORA_INLINE void nearest_positions(const Magnitudes& table, const float* x, const float* values, int32_t* k) {
  int32_t bits[kMomentGroup], to_add[kMomentGroup];
  for (int i = 0; i < kMomentGroup; ++i) {
    bits[i] = in_buckets(x[i]);
    k[i] = (bits[i] >> 16) - kFirst;
  }
  for (int i = 0; i < kMomentGroup; ++i) to_add[i] = static_cast<int32_t>(table.bucket[k[i]]);
  for (int i = 0; i < kMomentGroup; ++i) k[i] = values[i] == 0.0f ? 0 : (to_add[i] + bits[i]) >> 16;
}
template <class Vector>
NF4LORA_INLINE void encode_signed(uint8_t* codes, const Vector* value, const Vector* x) {
  const auto* const values = reinterpret_cast<const float*>(value);
  int32_t k[kMomentGroup];
  nearest_positions(kSigned, reinterpret_cast<const float*>(x), values, k);
  for (int i = 0; i < kMomentGroup; ++i) {
    const int32_t sign = static_cast<int32_t>(bits_of(values[i])) >> 31, moved = (k[i] ^ sign) - sign;
    codes[i] = static_cast<uint8_t>(kNestedZero + (moved > -kNestedZero ? moved : -kNestedZero));
  }
}
template <class Vector>
NF4LORA_INLINE void encode_unsigned(uint8_t* codes, const Vector* value, const Vector* x) {
  int32_t k[kMomentGroup];
  nearest_positions(kUnsigned, reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(value), k);
  for (int i = 0; i < kMomentGroup; ++i) codes[i] = static_cast<uint8_t>(k[i]);
}

template <class Vector>
NF4LORA_INLINE void decode_map(const float* map, const uint8_t* codes, Vector* value) {
  auto* const values = reinterpret_cast<float*>(value);
  for (int i = 0; i < kMomentGroup; ++i) values[i] = map[codes[i]];
}
template <class Vector>
NF4LORA_INLINE void decode_signed(const uint8_t* codes, Vector* value) {
  decode_map(kNestedTable.value, codes, value);
}
template <class Vector>
NF4LORA_INLINE void decode_unsigned(const uint8_t* codes, Vector* value) {
  decode_map(kUnsigned.value, codes, value);
}
template <class Vector>
NF4LORA_INLINE void decode_drop(const uint8_t* codes, Vector* drop) {
  decode_map(kDropTable.value, codes, drop);
}

}  // namespace scalar
}  // namespace nf4lora::NF4LORA_ISA
