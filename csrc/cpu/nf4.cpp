// nf4 on the CPU: checks, allocation, threads. The loops are in isa/nf4.h.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <tuple>

#include "../check/nf4.h"
#include "instruction_set.h"
#include "memory.h"

namespace nf4lora {
namespace {

constexpr int64_t kStreamed = 16 << 20;  // bytes of a weight that would only push other things out of the caches
constexpr int64_t kGrain = 1 << 15;      // weights a thread should have before a second one is woken

std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& weight, int64_t blocksize) {
  check_nf4_quantize(weight, blocksize);
  const Tensor in = contiguous_view(weight);
  const int64_t K = last_size(in);
  Tensor qweight = empty(with_last(in, K / 2), ScalarType::Byte, in);
  Tensor absmax = empty(with_last(in, K / blocksize), ScalarType::Float, in);
  const Loops& isa = loops();
  const void* data = in.const_data_ptr();
  auto* codes = static_cast<uint8_t*>(qweight.mutable_data_ptr());
  auto* scales = static_cast<float*>(absmax.mutable_data_ptr());
  prefer_huge_pages(codes, qweight.numel());
  std::atomic<int64_t> broken{-1};
  torch::stable::parallel_for(0, absmax.numel(), kGrain / blocksize + 1, [&](int64_t begin, int64_t end) {
    const int64_t block = isa.nf4_quantize(data, dtype_of(in), begin, end, blocksize, codes, scales);
    if (block < 0) return;
    int64_t seen = broken.load();
    while ((seen < 0 || block < seen) && !broken.compare_exchange_weak(seen, block)) {
    }
  });
  if (broken >= 0) fail_nf4_quantize_finite(broken, blocksize);
  return {qweight, absmax};
}

void dequantize_into(const Tensor& qweight, const Tensor& absmax, int64_t blocksize, Tensor& out) {
  const Tensor codes = contiguous_view(qweight), scales = contiguous_view(absmax);
  const Loops& isa = loops();
  const auto* bytes = static_cast<const uint8_t*>(codes.const_data_ptr());
  const auto* scale = static_cast<const float*>(scales.const_data_ptr());
  void* weight = out.mutable_data_ptr();
  const bool stream =
      out.numel() * bytes_of(dtype_of(out)) >= kStreamed && reinterpret_cast<uintptr_t>(weight) % 64 == 0;
  torch::stable::parallel_for(0, scales.numel(), kGrain / blocksize + 1, [&](int64_t begin, int64_t end) {
    isa.nf4_dequantize(bytes, scale, begin, end, blocksize, dtype_of(out), stream, weight);
  });
}

Tensor nf4_dequantize(const Tensor& qweight, const Tensor& absmax, int64_t blocksize, ScalarType dtype) {
  check_nf4_dequantize(qweight, absmax, blocksize, dtype);
  Tensor weight = empty(with_last(qweight, last_size(qweight) * 2), dtype, qweight);
  prefer_huge_pages(weight.mutable_data_ptr(), weight.numel() * bytes_of(dtype_of(dtype)));
  dequantize_into(qweight, absmax, blocksize, weight);
  return weight;
}

void nf4_dequantize_out(const Tensor& qweight, const Tensor& absmax, int64_t blocksize, Tensor out) {
  check_nf4_dequantize(qweight, absmax, blocksize, out.scalar_type());
  check_nf4_dequantize_out(qweight, out);
  dequantize_into(qweight, absmax, blocksize, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nf4lora, CPU, m) {
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
  m.impl("nf4_dequantize.out", TORCH_BOX(&nf4_dequantize_out));
}

}  // namespace nf4lora
