// A rectangle of W for CUDA tensors: checks, registration. The kernel is in lora_slice.cu. The op is no part of the
// catalogue: sliced.py, which multiplies W a slice at a time, calls it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../check/lora.h"
#include "launch.h"
#include "layer.h"
#include "stream.h"

namespace nf4lora::cuda {
namespace {

constexpr const char* kOp = "lora_slice";

// out: [rows, columns] contiguous, which lies in W from row n0 and column k0 on.
LinearShape check_lora_slice(const PackedTensors& weight, int64_t n0, int64_t k0, const Tensor& out) {
  const LinearShape W = check_packed(kOp, weight, weight.qweight);
  check_float(kOp, "out", out);
  check_same_device(kOp, "out", out, weight.qweight);
  require_value(out.dim() == 2 && out.is_contiguous(), kOp, ": out must be [rows, columns] and contiguous, got shape ",
                shape_of(out));
  require_value(k0 % kMinBlocksize == 0 && out.size(1) % kMinBlocksize == 0, kOp,
                ": k0 and the columns of out must be multiples of ", kMinBlocksize, ", got ", k0, " and ", out.size(1));
  require_value(n0 >= 0 && k0 >= 0 && n0 <= W.N - out.size(0) && k0 <= W.K - out.size(1), kOp, ": out must lie in W [",
                W.N, ", ", W.K, "], got shape ", shape_of(out), " from row ", n0, " and column ", k0);
  return W;
}

void slice_into(const Tensor& qweight, const Tensor& absmax, const OptionalTensor& nested, int64_t blocksize,
                int64_t n0, int64_t k0, Tensor out) {
  const PackedTensors tensors{qweight, absmax, nested, blocksize};
  const LinearShape shape = check_lora_slice(tensors, n0, k0, out);
  const OnDeviceOf device(qweight);
  const Weight weight(tensors);
  Slice slice{};
  slice.dtype = dtype_of(out);
  slice.W = weight.packed();
  slice.weight = out.mutable_data_ptr();
  slice.N = shape.N, slice.K = shape.K, slice.blocksize = blocksize;
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
