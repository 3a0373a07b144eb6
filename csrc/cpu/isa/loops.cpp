// The table of loops of one instruction set. CMake compiles this file once for each, with NF4LORA_ISA as its name.
#include "loops.h"

#include "adamw.h"
#include "few.h"
#include "gemm.h"
#include "philox.h"

namespace nf4lora {
namespace NF4LORA_ISA {

static void widen_row(const void* values, float scale, int64_t count, Dtype dtype, float* out) {
  with_dtype(dtype, [&](auto tag) __attribute__((always_inline)) {
    using T = decltype(tag);
    widen<T>(static_cast<const typename T::Element*>(values), count, out);
  });
  for (int64_t i = 0; i < count; ++i) out[i] *= scale;
}

static void keep_row(const void* values, const uint32_t* keep, int64_t count, Dtype dtype, void* out) {
  const auto select = [&](const auto* in, auto* result) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; ++i) result[i] = keep[i] ? in[i] : 0;
  };
  if (dtype == Dtype::f32) return select(static_cast<const uint32_t*>(values), static_cast<uint32_t*>(out));
  select(static_cast<const uint16_t*>(values), static_cast<uint16_t*>(out));
}

// What a set has of its own, or else what any has.
template <class Own, class Any>
struct Prefer {
  using Math = Own;
};
template <class Any>
struct Prefer<void, Any> {
  using Math = Any;
};
using Bf16Product = Prefer<PairProduct, FloatProduct<Bf16>>::Math;
using Bf16Row = Prefer<PairRow, Widened<Bf16>>::Math;

}  // namespace NF4LORA_ISA

#define NF4LORA_JOIN(a, b) a##b
#define NF4LORA_TABLE(isa) NF4LORA_JOIN(loops_, isa)

const Loops& NF4LORA_TABLE(NF4LORA_ISA)() {
  using namespace NF4LORA_ISA;
  static constexpr Loops table = {
      NF4LORA_EXPANDED(NF4LORA_ISA),
      nf4_quantize,
      nf4_dequantize,
      absmax_quantize,
      absmax_dequantize,
      adamw_step,
      dropout_mask,
      widen_row,
      keep_row,
      {&kGemm<FloatProduct<F32>>, &kGemm<Bf16Product>, &kGemm<FloatProduct<F16>>},
      {&kFew<Widened<F32>>, &kFew<Bf16Row>, &kFew<Widened<F16>>},
  };
  return table;
}

}  // namespace nf4lora
