// The table of loops of one instruction set. CMake compiles this file once for each, with NF4LORA_ISA as its name.
#include "loops.h"

#include "adamw.h"
#include "encode.h"
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

static void multiply_row(const void* values, const float* factors, int64_t count, Dtype dtype, void* out) {
  with_dtype(dtype, [&](auto tag) __attribute__((always_inline)) {
    using T = decltype(tag);
    const auto* in = static_cast<const typename T::Element*>(values);
    auto* result = static_cast<typename T::Element*>(out);
    float room[kPiece];
    for (int64_t i = 0; i < count; i += kPiece) {
      const int64_t piece = smaller(count - i, kPiece);
      widen<T>(in + i, piece, room);
      for (int64_t j = 0; j < piece; ++j) room[j] *= factors[i + j];
      narrow<T>(room, broadcast(1.0f), piece, result + i);
    }
  });
}

#if defined(__AVX512BF16__)
using Bf16Math = DotProduct;
using Bf16Few = Paired;
#else
using Bf16Math = Multiply<Bf16>;
using Bf16Few = Widened<Bf16>;
#endif

}  // namespace NF4LORA_ISA

#define NF4LORA_JOIN(a, b) a##b
#define NF4LORA_TABLE(isa) NF4LORA_JOIN(loops_, isa)
#define NF4LORA_TEXT(isa) #isa
#define NF4LORA_NAME(isa) NF4LORA_TEXT(isa)

const Loops& NF4LORA_TABLE(NF4LORA_ISA)() {
  using namespace NF4LORA_ISA;
  static constexpr Loops table = {
      NF4LORA_NAME(NF4LORA_ISA),
      nf4_quantize,
      nf4_dequantize,
      absmax_quantize,
      absmax_dequantize,
      adamw_step,
      dropout_mask,
      widen_row,
      multiply_row,
      {&kGemm<Multiply<F32>>, &kGemm<Bf16Math>, &kGemm<Multiply<F16>>},
      {&kFew<Widened<F32>>, &kFew<Bf16Few>, &kFew<Widened<F16>>},
  };
  return table;
}

}  // namespace nf4lora
