// absmax on the CPU: double quantisation of the scales. The loops are in isa/absmax.h.
#include "absmax.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../check/absmax.h"
#include "instruction_set.h"
#include "memory.h"

namespace nf4lora {
namespace {

constexpr int64_t kGrain = 1 << 12;  // absmax values a thread should have before a second one is woken

// sums[block] of each block in [begin, end), in index order. Four blocks side by side hide the latency of the addition.
void sum_blocks(const float* values, int64_t count, int64_t begin, int64_t end, double* sums) {
  int64_t block = begin;
  for (; block + 4 <= end && (block + 4) * kNestedBlocksize <= count; block += 4) {
    const float* first = values + block * kNestedBlocksize;
    double four[4] = {};
    for (int i = 0; i < kNestedBlocksize; ++i) {
      for (int j = 0; j < 4; ++j) four[j] += static_cast<double>(first[j * kNestedBlocksize + i]);
    }
    std::copy_n(four, 4, sums + block);
  }
  for (; block < end; ++block) {
    sums[block] = 0.0;
    const int64_t stop = std::min(count, (block + 1) * kNestedBlocksize);
    for (int64_t i = block * kNestedBlocksize; i < stop; ++i) sums[block] += static_cast<double>(values[i]);
  }
}

std::tuple<Tensor, Tensor> absmax_quantize(const Tensor& absmax) {
  check_absmax_quantize(absmax);
  const Tensor in = contiguous_view(absmax);
  const int64_t count = in.numel(), blocks = nested_size(count) - 1;
  Tensor absmax_q = empty(sizes_of(in), ScalarType::Byte, in);
  Tensor nested = empty({blocks + 1}, ScalarType::Float, in);
  const auto* values = static_cast<const float*>(in.const_data_ptr());
  auto* scales = static_cast<float*>(nested.mutable_data_ptr());

  // The mean in float64, block by block in index order: a stated order, so that every device rounds the same sum.
  Scratch<double> sums(blocks);
  torch::stable::parallel_for(0, blocks, kGrain / kNestedBlocksize,
                              [&](int64_t first, int64_t last) { sum_blocks(values, count, first, last, sums.get()); });
  double total = 0.0;
  for (int64_t block = 0; block < blocks; ++block) total += sums.get()[block];
  const float offset = count ? static_cast<float>(total / static_cast<double>(count)) : 0.0f;
  scales[blocks] = offset;

  const Loops& isa = loops();
  auto* codes = static_cast<uint8_t*>(absmax_q.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks, kGrain / kNestedBlocksize, [&](int64_t first, int64_t last) {
    isa.absmax_quantize(values, offset, first, last, count, scales, codes);
  });
  check_absmax_quantized(scales, blocks + 1);
  return {absmax_q, nested};
}

Tensor absmax_dequantize(const Tensor& absmax_q, const Tensor& nested) {
  check_absmax_dequantize(absmax_q, nested);
  const Tensor codes = contiguous_view(absmax_q), scales = contiguous_view(nested);
  Tensor absmax = empty(sizes_of(codes), ScalarType::Float, codes);
  auto* out = static_cast<float*>(absmax.mutable_data_ptr());
  const Scales packed = scales_of(codes, scales);
  const Loops& isa = loops();
  torch::stable::parallel_for(0, codes.numel(), kGrain,
                              [&](int64_t begin, int64_t end) { isa.absmax_dequantize(packed, begin, end, out); });
  return absmax;
}

}  // namespace

Scales scales_of(const Tensor& absmax, const OptionalTensor& nested) {
  if (!nested) return {static_cast<const float*>(absmax.const_data_ptr()), nullptr, nullptr, 0.0f};
  const auto* values = static_cast<const float*>(nested->const_data_ptr());
  return {nullptr, static_cast<const uint8_t*>(absmax.const_data_ptr()), values, values[nested->numel() - 1]};
}

STABLE_TORCH_LIBRARY_IMPL(nf4lora, CPU, m) {
  m.impl("absmax_quantize", TORCH_BOX(&absmax_quantize));
  m.impl("absmax_dequantize", TORCH_BOX(&absmax_dequantize));
}

}  // namespace nf4lora
