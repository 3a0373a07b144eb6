// absmax on the CPU: double quantisation of the scales. The loops are in isa/absmax.h.
#include "absmax.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "instruction_set.h"

namespace nf4lora {
namespace {

constexpr int64_t kGrain = 1 << 12;  // absmax values a thread should have before a second one is woken

std::tuple<Tensor, Tensor> absmax_quantize(const Tensor& absmax) {
  check_absmax_quantize(absmax);
  const Tensor in = contiguous_view(absmax);
  const int64_t count = in.numel(), blocks = nested_size(count) - 1;
  Tensor absmax_q = torch::stable::new_empty(in, in.sizes(), ScalarType::Byte);
  Tensor nested = torch::stable::new_empty(in, {blocks + 1}, ScalarType::Float);
  const auto* values = static_cast<const float*>(in.const_data_ptr());
  auto* scales = static_cast<float*>(nested.mutable_data_ptr());

  // The mean in float64, block by block in index order: a stated order, so that every device rounds the same sum.
  double total = 0.0;
  for (int64_t block = 0; block < blocks; ++block) {
    double sum = 0.0;
    const int64_t end = std::min(count, (block + 1) * kNestedBlocksize);
    for (int64_t i = block * kNestedBlocksize; i < end; ++i) sum += static_cast<double>(values[i]);
    total += sum;
  }
  if (!std::isfinite(total)) fail_absmax_quantize_finite();
  const float offset = count ? static_cast<float>(total / static_cast<double>(count)) : 0.0f;
  scales[blocks] = offset;

  const Loops& isa = loops();
  auto* codes = static_cast<uint8_t*>(absmax_q.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks, kGrain / kNestedBlocksize, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      float largest = 0.0f;
      const int64_t begin = block * kNestedBlocksize, end = std::min(count, begin + kNestedBlocksize);
      for (int64_t i = begin; i < end; ++i) largest = std::max(largest, std::fabs(values[i] - offset));
      scales[block] = largest;
      isa.absmax_quantize(values, scales, offset, begin, end, codes);
    }
  });
  return {absmax_q, nested};
}

Tensor absmax_dequantize(const Tensor& absmax_q, const Tensor& nested) {
  check_absmax_dequantize(absmax_q, nested);
  const Tensor codes = contiguous_view(absmax_q), scales = contiguous_view(nested);
  Tensor absmax = torch::stable::new_empty(codes, codes.sizes(), ScalarType::Float);
  const int64_t count = codes.numel();
  const auto* bytes = static_cast<const uint8_t*>(codes.const_data_ptr());
  const auto* scale = static_cast<const float*>(scales.const_data_ptr());
  auto* out = static_cast<float*>(absmax.mutable_data_ptr());
  const float offset = scale[scales.numel() - 1];
  const Loops& isa = loops();
  torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    isa.absmax_dequantize(bytes, scale, offset, begin, end, out);
  });
  return absmax;
}

}  // namespace

Tensor decoded_absmax(const Tensor& absmax, const OptionalTensor& nested) {
  return nested ? absmax_dequantize(absmax, *nested) : contiguous_view(absmax);
}

STABLE_TORCH_LIBRARY_IMPL(nf4lora, CPU, m) {
  m.impl("absmax_quantize", TORCH_BOX(&absmax_quantize));
  m.impl("absmax_dequantize", TORCH_BOX(&absmax_dequantize));
}

}  // namespace nf4lora
