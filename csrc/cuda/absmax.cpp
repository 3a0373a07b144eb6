// absmax_quantize and absmax_dequantize for CUDA tensors: checks, allocation, registration. Kernels: absmax.cu.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "../check/absmax.h"
#include "launch.h"
#include "stream.h"

namespace nf4lora::cuda {
namespace {

// Waits for the device once, as nf4_quantize does and for its reason: nested tells what cannot be quantised.
std::tuple<Tensor, Tensor> quantize(const Tensor& absmax) {
  check_absmax_quantize(absmax);
  const OnDeviceOf device(absmax);
  const Tensor input = contiguous_view(absmax);
  const int64_t count = absmax.numel(), nested_count = nested_size(count);
  Tensor absmax_q = empty(sizes_of(absmax), ScalarType::Byte, input);
  Tensor nested = empty({nested_count}, ScalarType::Float, input);
  Tensor block_sums = empty({nested_count - 1}, ScalarType::Double, input);

  float* const values = static_cast<float*>(nested.mutable_data_ptr());
  require_launched("absmax_quantize",
                   absmax_quantize(static_cast<const float*>(input.const_data_ptr()),
                                   static_cast<uint8_t*>(absmax_q.mutable_data_ptr()), values,
                                   static_cast<double*>(block_sums.mutable_data_ptr()), count, device.stream()));
  std::vector<float> made(static_cast<size_t>(nested_count));
  const int64_t bytes = nested_count * static_cast<int64_t>(sizeof(float));
  require_launched("absmax_quantize", read(made.data(), values, bytes, device.stream()));
  check_absmax_quantized(made.data(), nested_count);
  return {absmax_q, nested};
}

Tensor dequantize(const Tensor& absmax_q, const Tensor& nested) {
  check_absmax_dequantize(absmax_q, nested);
  const OnDeviceOf device(absmax_q);
  const Tensor codes = contiguous_view(absmax_q);
  const Tensor scales = contiguous_view(nested);
  Tensor absmax = empty(sizes_of(absmax_q), ScalarType::Float, codes);
  require_launched("absmax_dequantize",
                   absmax_dequantize(static_cast<const uint8_t*>(codes.const_data_ptr()),
                                     static_cast<const float*>(scales.const_data_ptr()),
                                     static_cast<float*>(absmax.mutable_data_ptr()), absmax.numel(), device.stream()));
  return absmax;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nf4lora, CUDA, m) {
  m.impl("absmax_quantize", TORCH_BOX(&quantize));
  m.impl("absmax_dequantize", TORCH_BOX(&dequantize));
}

}  // namespace nf4lora::cuda
