// A rectangle of W for CUDA tensors: checks, registration. The kernel is in lora_slice.cu. The op is no part of the
// catalogue: sliced.py, which multiplies W a slice at a time, calls it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../check.h"
#include "launch.h"
#include "layer.h"
#include "stream.h"

namespace nf4lora::cuda {
namespace {

constexpr const char* kOp = "lora_slice";

// qweight: uint8 [N, K/2]; absmax: float32 [N, K/blocksize], or uint8 with nested; out: [rows, columns] contiguous.
void check_lora_slice(const Tensor& qweight, const Tensor& absmax, const OptionalTensor& nested, int64_t blocksize,
                      int64_t n0, int64_t k0, const Tensor& out) {
  check_blocksize(kOp, blocksize);
  check_dtype(kOp, "qweight", qweight, ScalarType::Byte);
  require_value(qweight.dim() == 2 && qweight.size(1) * 2 % blocksize == 0, kOp,
                ": qweight must be [N, K/2] with K a multiple of blocksize ", blocksize, ", got shape ",
                shape_of(qweight));
  const int64_t N = qweight.size(0), K = qweight.size(1) * 2, blocks = N * (K / blocksize);
  check_same_device(kOp, "absmax", absmax, qweight);
  require_value(absmax.numel() == blocks, kOp, ": absmax must hold ", blocks, " values (one per ", blocksize,
                " weights), got shape ", shape_of(absmax));
  if (nested) {
    check_nested(kOp, absmax, *nested);
  } else {
    require_kind(absmax.scalar_type() == ScalarType::Float, kOp, ": absmax must be float32, or uint8 with nested, got ",
                 name_of(absmax.scalar_type()));
  }
  check_float(kOp, "out", out);
  check_same_device(kOp, "out", out, qweight);
  require_value(out.dim() == 2 && out.is_contiguous(), kOp, ": out must be [rows, columns] and contiguous, got shape ",
                shape_of(out));
  require_value(k0 % kMinBlocksize == 0 && out.size(1) % kMinBlocksize == 0, kOp,
                ": k0 and the columns of out must be multiples of ", kMinBlocksize, ", got ", k0, " and ", out.size(1));
  require_value(n0 >= 0 && k0 >= 0 && n0 <= N - out.size(0) && k0 <= K - out.size(1), kOp, ": out must lie in W [", N,
                ", ", K, "], got shape ", shape_of(out), " from row ", n0, " and column ", k0);
}

void slice_into(const Tensor& qweight, const Tensor& absmax, const OptionalTensor& nested, int64_t blocksize,
                int64_t n0, int64_t k0, Tensor out) {
  check_lora_slice(qweight, absmax, nested, blocksize, n0, k0, out);
  const OnDeviceOf device(qweight);
  const Weight weight(qweight, absmax, nested);
  Slice slice{};
  slice.dtype = dtype_of(out);
  weight.into(slice);
  slice.weight = out.mutable_data_ptr();
  slice.N = qweight.size(0), slice.K = qweight.size(1) * 2, slice.blocksize = blocksize;
  slice.n0 = n0, slice.rows = out.size(0), slice.k0 = k0, slice.columns = out.size(1);
  require_launched(kOp, lora_slice(slice, device.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nf4lora_cuda, m) {
  m.def(
      "lora_slice(Tensor qweight, Tensor absmax, Tensor? nested, int blocksize, int n0, int k0, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(nf4lora_cuda, CUDA, m) { m.impl("lora_slice", TORCH_BOX(&slice_into)); }

}  // namespace nf4lora::cuda
