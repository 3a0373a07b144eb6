// One step of AdamW on a run of values: ../../adamw.h has the arithmetic.
#pragma once

#include "../../adamw.h"
#include "absmax.h"
#include "dtype.h"

namespace nf4lora::NF4LORA_ISA {

inline constexpr int kMomentVectors = kMomentGroup / kLanes;

// The numbers of a step in every lane.
struct Step {
  Float weight, beta2, square_weight, decay, negative_step, correction, inverse_correction, eps, gone, scale;
  bool from_gradient;
};
NF4LORA_INLINE Step step_of(const AdamW& numbers, float scale) {
  return {broadcast(numbers.weight),
          broadcast(numbers.beta2),
          broadcast(numbers.square_weight),
          broadcast(numbers.decay),
          broadcast(numbers.negative_step),
          broadcast(numbers.correction),
          broadcast(numbers.inverse_correction),
          broadcast(numbers.eps),
          broadcast(numbers.gone),
          broadcast(scale),
          numbers.from_gradient};
}

// Moments and parameters of one vector, new where `kept` says so.
struct Moments {
  Float first, second;
};
NF4LORA_INLINE Moments moments_of(const Step& step, Float g, Float first, Float second) {
  const Float distance = add(g, multiply(first, broadcast(-1.0f)));
  return {fused(step.weight, distance, step.from_gradient ? g : first),
          fused(multiply(step.square_weight, g), g, multiply(second, step.beta2))};
}
// exp_avg in 8 bits, so that it goes down where its gradient has ended; drop: that of its code, times -absmax.
NF4LORA_INLINE Float first_of(const Step& step, Float g, Float before, Float drop, Float first) {
  const Float lowered = add(before, drop);
  const Float limited = select(below(magnitude(lowered), magnitude(first)), lowered, first);
  return select(below(magnitude(g), multiply(magnitude(before), step.gone)), limited, first);
}
// sqrt / correction by the inverse and what its product leaves (Markstein): a division less. It is rounded as the
// division is, but for two mantissas in 2^24 of the one correction whose own mantissa is all ones.
template <bool kFinite>  // the second moment is
NF4LORA_INLINE Float param_of(const Step& step, Float p, const Moments& moments) {
  const Float root = square_root(moments.second), infinity = broadcast(__builtin_inff());
  Float q = multiply(root, step.inverse_correction);
  q = fused(fused(multiply(q, broadcast(-1.0f)), step.correction, root), step.inverse_correction, q);
  const Float denominator = add(kFinite ? q : select(below(root, infinity), q, root), step.eps);
  return add(multiply(p, step.decay), divide(multiply(step.negative_step, moments.first), denominator));
}

// Lines of memory that are wanted kAhead values later: the processor's own prefetching falls behind where four arrays
// are read and three of them written (bench: adamw). The address may lie behind the last value, so it is
// computed as an integer.
template <int kAhead, class Element>
NF4LORA_INLINE void prefetch(const Element* from, int count) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from) + kAhead * sizeof *from;
  for (size_t i = 0; i < static_cast<size_t>(count) * sizeof *from; i += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(begin + i));
  }
}

// Updates the first `size` values, in whole vectors only; the moments are float32. Returns how many gradients were not
// finite.
template <class T>
NF4LORA_INLINE int64_t adamw_run(const Step& step, typename T::Element* param, const typename T::Element* grad,
                                 float* exp_avg, float* exp_avg_sq, int64_t size) {
  const Float infinity = broadcast(__builtin_inff());
  int64_t skipped = 0;
  for (int64_t i = 0; i + kLanes <= size; i += kLanes) {
    prefetch<1024>(param + i, kLanes);
    prefetch<1024>(grad + i, kLanes);
    prefetch<1024>(exp_avg + i, kLanes);
    prefetch<1024>(exp_avg_sq + i, kLanes);
    const Float g = multiply(T::load(grad + i), step.scale), p = T::load(param + i);
    const Float first = load(exp_avg + i), second = load(exp_avg_sq + i);
    const Moments moments = moments_of(step, g, first, second);
    const Mask kept = below(magnitude(g), infinity);
    skipped += kLanes - count(kept);
    store(exp_avg + i, select(kept, moments.first, first));
    store(exp_avg_sq + i, select(kept, moments.second, second));
    T::store(param + i, select(kept, param_of<false>(step, p, moments), p));
  }
  return skipped;
}

// What fills a vector up has a gradient of zero. It is counted too where `scale` is not finite, which nobody asked for.
NF4LORA_INLINE int64_t without_padding(const Step& step, int64_t skipped, int64_t padding) {
  return count(below(magnitude(step.scale), broadcast(__builtin_inff()))) ? skipped : skipped - padding;
}

// A run of any length: what is left over goes through a padded vector.
template <class T>
static int64_t adamw_values(const Step& step, typename T::Element* param, const typename T::Element* grad,
                            float* exp_avg, float* exp_avg_sq, int64_t size) {
  const int64_t whole = size / kLanes * kLanes, rest = size - whole;
  int64_t skipped = adamw_run<T>(step, param, grad, exp_avg, exp_avg_sq, whole);
  if (!rest) return skipped;
  typename T::Element p[kLanes] = {}, g[kLanes] = {};
  float first[kLanes] = {}, second[kLanes] = {};
  const auto values = static_cast<size_t>(rest);
  std::memcpy(p, param + whole, values * sizeof *p);
  std::memcpy(g, grad + whole, values * sizeof *g);
  std::memcpy(first, exp_avg + whole, values * sizeof *first);
  std::memcpy(second, exp_avg_sq + whole, values * sizeof *second);
  skipped += without_padding(step, adamw_run<T>(step, p, g, first, second, kLanes), kLanes - rest);
  std::memcpy(param + whole, p, values * sizeof *p);
  std::memcpy(exp_avg + whole, first, values * sizeof *first);
  std::memcpy(exp_avg_sq + whole, second, values * sizeof *second);
  return skipped;
}

// |value| / absmax, correctly rounded: by the inverse and what its product leaves (Markstein), where absmax allows it.
struct Quotient {
  Float absmax, inverse;
  bool divides;  // a subnormal inverse, an infinite one, or the mantissa for which the method is off by one

  NF4LORA_INLINE Quotient of(float absmax) {
    const uint32_t bits = bits_of(absmax);
    const bool divides = absmax < 0x1p-100f || absmax > 0x1p100f || (bits & 0x7FFFFF) == 0x7FFFFF;
    return {broadcast(absmax), broadcast(1.0f / absmax), divides};
  }
  __attribute__((always_inline)) Float operator()(Float value) const {
    const Float size = magnitude(value);
    if (__builtin_expect(divides, 0)) return divide(size, absmax);
    const Float q = multiply(size, inverse);
    return fused(fused(multiply(q, broadcast(-1.0f)), absmax, size), inverse, q);
  }
};

// The moments of a block as codes, by their largest magnitude.
template <void (*kEncode)(uint8_t*, const Float*, const Float*)>
NF4LORA_INLINE void encode_block(const float* moments, float absmax, uint8_t zero, uint8_t* codes) {
  if (!(absmax > 0.0f)) {
    std::memset(codes, zero, kMomentBlocksize);
    return;
  }
  const Quotient quotient = Quotient::of(absmax);
  for (int group = 0; group < kMomentBlocksize; group += kMomentGroup) {
    Float value[kMomentVectors], x[kMomentVectors];
    for (int v = 0; v < kMomentVectors; ++v) {
      value[v] = load(moments + group + v * kLanes);
      x[v] = quotient(value[v]);
    }
    kEncode(codes + group, value, x);
  }
}

// One block of 256 values in 8 bits; absmax [2].
template <class T>
NF4LORA_INLINE int64_t adamw_block(const Step& step, typename T::Element* param, const typename T::Element* grad,
                                   uint8_t* exp_avg, uint8_t* exp_avg_sq, float* absmax) {
  alignas(64) float firsts[kMomentBlocksize], seconds[kMomentBlocksize];
  const Float infinity = broadcast(__builtin_inff()), most = broadcast(__FLT_MAX__);
  const Float least = multiply(most, broadcast(-1.0f));
  const Float first_absmax = broadcast(absmax[0]), second_absmax = broadcast(absmax[1]);
  const Float negative_absmax = broadcast(-absmax[0]);
  // Gradients below it make nothing infinite.
  const Float small = broadcast(absmax[0] < 0x1p100f && absmax[1] < 0x1p100f ? 0x1p60f : 0.0f);
  Float first_peak = broadcast(0.0f), second_peak = broadcast(0.0f);
  int64_t skipped = 0;
  for (int group = 0; group < kMomentBlocksize; group += kMomentGroup) {
    prefetch<kMomentBlocksize>(param + group, kMomentGroup);
    prefetch<kMomentBlocksize>(grad + group, kMomentGroup);
    prefetch<kMomentBlocksize>(exp_avg + group, kMomentGroup);
    prefetch<kMomentBlocksize>(exp_avg_sq + group, kMomentGroup);
    Float first[kMomentVectors], second[kMomentVectors], drop[kMomentVectors];
    decode_signed(exp_avg + group, first);
    decode_drop(exp_avg + group, drop);
    decode_unsigned(exp_avg_sq + group, second);
    for (int v = 0; v < kMomentVectors; ++v) {
      const int i = group + v * kLanes;
      const Float g = multiply(T::load(grad + i), step.scale), p = T::load(param + i);
      const Moments before{multiply(first[v], first_absmax), multiply(second[v], second_absmax)};
      Moments moments = moments_of(step, g, before.first, before.second);
      moments.first = first_of(step, g, before.first, multiply(drop[v], negative_absmax), moments.first);
      if (__builtin_expect(count(below(magnitude(g), small)) == kLanes, 1)) {
        T::store(param + i, param_of<true>(step, p, moments));
      } else {
        moments = {larger(lesser(moments.first, most), least), lesser(moments.second, most)};  // an absmax is finite
        const Mask kept = below(magnitude(g), infinity);
        skipped += kLanes - count(kept);
        T::store(param + i, select(kept, param_of<false>(step, p, moments), p));
        moments = {select(kept, moments.first, before.first), select(kept, moments.second, before.second)};
      }
      store(firsts + i, moments.first);
      store(seconds + i, moments.second);
      first_peak = larger(first_peak, magnitude(moments.first));
      second_peak = larger(second_peak, moments.second);
    }
  }
  absmax[0] = largest_lane(first_peak);
  absmax[1] = largest_lane(second_peak);
  encode_block<encode_signed>(firsts, absmax[0], kNestedZero, exp_avg);
  encode_block<encode_unsigned>(seconds, absmax[1], 0, exp_avg_sq);
  return skipped;
}

// A run of any length that begins with a block.
template <class T>
static int64_t adamw_blocks(const Step& step, typename T::Element* param, const typename T::Element* grad,
                            uint8_t* exp_avg, uint8_t* exp_avg_sq, float* absmax, int64_t size) {
  int64_t skipped = 0, i = 0;
  for (; i + kMomentBlocksize <= size; i += kMomentBlocksize, absmax += 2) {
    skipped += adamw_block<T>(step, param + i, grad + i, exp_avg + i, exp_avg_sq + i, absmax);
  }
  if (i == size) return skipped;
  typename T::Element p[kMomentBlocksize] = {}, g[kMomentBlocksize] = {};
  uint8_t first[kMomentBlocksize], second[kMomentBlocksize] = {};
  std::memset(first, kNestedZero, sizeof first);
  const auto values = static_cast<size_t>(size - i);
  std::memcpy(p, param + i, values * sizeof *p);
  std::memcpy(g, grad + i, values * sizeof *g);
  std::memcpy(first, exp_avg + i, values);
  std::memcpy(second, exp_avg_sq + i, values);
  skipped += without_padding(step, adamw_block<T>(step, p, g, first, second, absmax), kMomentBlocksize - (size - i));
  std::memcpy(param + i, p, values * sizeof *p);
  std::memcpy(exp_avg + i, first, values);
  std::memcpy(exp_avg_sq + i, second, values);
  return skipped;
}

// Values [begin, end) of one tensor; begin is a multiple of 256.
static int64_t adamw_step(const AdamWValues& values, int64_t begin, int64_t end, const AdamW& numbers, float scale) {
  const Step step = step_of(numbers, scale);
  return with_dtype(values.dtype, [&](auto tag) __attribute__((always_inline)) -> int64_t {
    using T = decltype(tag);
    auto* param = static_cast<typename T::Element*>(values.param) + begin;
    const auto* grad = static_cast<const typename T::Element*>(values.grad) + begin;
    if (!values.absmax) {
      return adamw_values<T>(step, param, grad, static_cast<float*>(values.exp_avg) + begin,
                             static_cast<float*>(values.exp_avg_sq) + begin, end - begin);
    }
    return adamw_blocks<T>(step, param, grad, static_cast<uint8_t*>(values.exp_avg) + begin,
                           static_cast<uint8_t*>(values.exp_avg_sq) + begin,
                           values.absmax + begin / kMomentBlocksize * 2, end - begin);
  });
}

}  // namespace nf4lora::NF4LORA_ISA
