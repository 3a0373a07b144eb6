// nf4_quantize and nf4_dequantize for CUDA tensors: checks, allocation, registration. The kernels are in nf4.cu.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../check/nf4.h"
#include "launch.h"
#include "stream.h"

namespace nf4lora::cuda {
namespace {

// Waits for the device once, to refuse NaN and Inf with the block that holds them: quantising happens while a model
// loads, where an error now is worth more than a stream that never stops. So it cannot be captured in a CUDA graph.
std::tuple<Tensor, Tensor> quantize(const Tensor& weight, int64_t blocksize) {
  check_nf4_quantize(weight, blocksize);
  const OnDeviceOf device(weight);
  const Tensor input = contiguous_view(weight);
  const int64_t K = last_size(weight);
  Tensor qweight = empty(with_last(weight, K / 2), ScalarType::Byte, input);
  Tensor absmax = empty(with_last(weight, K / blocksize), ScalarType::Float, input);
  Tensor first_bad = empty({1}, ScalarType::Long, input);

  require_launched(
      "nf4_quantize",
      nf4_quantize(input.const_data_ptr(), dtype_of(weight), static_cast<uint8_t*>(qweight.mutable_data_ptr()),
                   static_cast<float*>(absmax.mutable_data_ptr()), static_cast<uint64_t*>(first_bad.mutable_data_ptr()),
                   weight.numel(), blocksize, device.stream()));
  uint64_t block = kNoBlock;
  require_launched("nf4_quantize", read(&block, first_bad.const_data_ptr(), sizeof(block), device.stream()));
  if (block != kNoBlock) fail_nf4_quantize_finite(static_cast<int64_t>(block), blocksize);
  return {qweight, absmax};
}

void dequantize_into(const Tensor& qweight, const Tensor& absmax, int64_t blocksize, Tensor& weight) {
  const OnDeviceOf device(qweight);
  const Tensor codes = contiguous_view(qweight);
  const Tensor scales = contiguous_view(absmax);
  require_launched("nf4_dequantize",
                   nf4_dequantize(static_cast<const uint8_t*>(codes.const_data_ptr()),
                                  static_cast<const float*>(scales.const_data_ptr()), weight.mutable_data_ptr(),
                                  dtype_of(weight), weight.numel(), blocksize, device.stream()));
}

Tensor dequantize(const Tensor& qweight, const Tensor& absmax, int64_t blocksize, ScalarType dtype) {
  check_nf4_dequantize(qweight, absmax, blocksize, dtype);
  Tensor weight = empty(with_last(qweight, last_size(qweight) * 2), dtype, qweight);
  dequantize_into(qweight, absmax, blocksize, weight);
  return weight;
}

void dequantize_out(const Tensor& qweight, const Tensor& absmax, int64_t blocksize, Tensor out) {
  check_nf4_dequantize(qweight, absmax, blocksize, out.scalar_type());
  check_nf4_dequantize_out(qweight, out);
  dequantize_into(qweight, absmax, blocksize, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nf4lora, CUDA, m) {
  m.impl("nf4_quantize", TORCH_BOX(&quantize));
  m.impl("nf4_dequantize", TORCH_BOX(&dequantize));
  m.impl("nf4_dequantize.out", TORCH_BOX(&dequantize_out));
}

}  // namespace nf4lora::cuda
