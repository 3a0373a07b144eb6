// lora_linear and its backward for CUDA tensors on tensor cores: allocation. The kernels are in lora_gemm.cu, and in
// lora_grad.cu those of the low-rank products.
#include <algorithm>

#include "launch.h"
#include "layer.h"
#include "lora.h"
#include "low_rank.h"
#include "stream.h"
#include "workspace.h"

namespace nf4lora::cuda {
namespace {

int64_t bytes_for(const TallSkinny& pass) { return 4 * tall_skinny_workspace(pass); }
int64_t bytes_for(const LoraGemm& gemm) { return 4 * lora_gemm_partials(gemm); }

LoraGemm gemm_of(const LinearShape& shape, const Tensor& rows, const Weight& weight, int64_t blocksize, void* out) {
  LoraGemm gemm{};
  gemm.dtype = dtype_of(rows);
  gemm.rows = rows.const_data_ptr();
  gemm.W = weight.packed();
  gemm.out = out;
  gemm.M = shape.M, gemm.N = shape.N, gemm.K = shape.K, gemm.R = shape.R, gemm.blocksize = blocksize;
  return gemm;
}

}  // namespace

Outputs lora_linear_fused(const LoraLinear& arguments, const LinearShape& shape, void* stream) {
  constexpr const char* op = "lora_linear";
  const Tensor x = aligned(arguments.x);
  const Weight weight(arguments.weight);
  const Adapter& adapter = arguments.adapter;
  const Dropout dropout(adapter);
  const OptionalTensor offsets = float_bias(arguments.bias);
  const OptionalTensor A = contiguous_view(adapter.A), B = contiguous_view(adapter.B);
  Tensor y = empty(with_last(x, shape.N), x.scalar_type(), x);
  Tensor S = empty({shape.M, shape.R}, x.scalar_type(), x);

  TallSkinny pass{};
  if (A) pass = pass_for_S(x, *A, dropout, shape, S.mutable_data_ptr());
  LoraGemm gemm = gemm_of(shape, x, weight, arguments.weight.blocksize, y.mutable_data_ptr());
  gemm.bias = static_cast<const float*>(data_of(offsets));
  gemm.low_rank = S.const_data_ptr();
  gemm.factor = data_of(B);
  if (B) gemm.dtype_of_factor = dtype_of(*B);
  gemm.scaling = static_cast<float>(adapter.scaling);

  Workspace workspace;
  const auto sums = workspace.add(std::max(A ? bytes_for(pass) : 0, bytes_for(gemm)));  // one after the other
  workspace.allocate(x);
  pass.workspace = gemm.partials = workspace.at<float>(sums);
  if (A) require_launched(op, tall_skinny(pass, stream));
  require_launched(op, lora_gemm(gemm, stream));
  return {y, S};
}

Gradients lora_linear_backward_fused(const LoraLinearBackward& arguments, const LinearShape& shape, void* stream) {
  constexpr const char* op = "lora_linear_backward";
  const Tensor dy = aligned(arguments.dy);
  const Adapter& adapter = arguments.adapter;
  const OptionalTensor A = contiguous_view(adapter.A), B = contiguous_view(adapter.B);
  const OptionalTensor x = A ? aligned(arguments.x) : std::nullopt;
  const OptionalTensor S = A ? contiguous_view(arguments.S) : std::nullopt;
  const Dropout dropout(adapter);
  const Weight weight(arguments.weight);
  Tensor dx = empty(arguments.need_dx ? with_last(arguments.x ? *arguments.x : dy, shape.K) : std::vector<int64_t>{0},
                    dy.scalar_type(), dy);
  const Tensor dA = gradient_of(A, x.has_value(), dy), dB = gradient_of(B, S.has_value(), dy);
  const bool low_rank = A && (arguments.need_dx || x || S);

  const Tensor T = empty({low_rank ? shape.M : 0, shape.R}, dy.scalar_type(), dy);
  LoraGemm gemm = gemm_of(shape, dy, weight, arguments.weight.blocksize, dx.mutable_data_ptr());
  gemm.backward = true;
  gemm.low_rank = A ? T.const_data_ptr() : nullptr;
  gemm.factor = data_of(A);
  if (A) gemm.dtype_of_factor = dtype_of(*A);
  gemm.seed = seed_of(dropout), gemm.threshold = dropout.threshold;
  gemm.scaling = static_cast<float>(adapter.scaling * dropout.inverse_keep);
  TallSkinny over_dy{}, for_dA{};
  if (low_rank) over_dy = pass_over_dy(dy, *B, adapter.scaling, shape, T.mutable_data_ptr(), S, dB);
  if (x) for_dA = pass_for_dA(*x, T.const_data_ptr(), adapter.scaling, dropout, shape, dA);

  Workspace workspace;  // one after the other takes it
  const auto sums = workspace.add(std::max(
      {low_rank ? bytes_for(over_dy) : 0, x ? bytes_for(for_dA) : 0, arguments.need_dx ? bytes_for(gemm) : 0}));
  workspace.allocate(dy);
  over_dy.workspace = for_dA.workspace = gemm.partials = workspace.at<float>(sums);
  if (low_rank) require_launched(op, tall_skinny(over_dy, stream));
  if (x) require_launched(op, tall_skinny(for_dA, stream));
  if (arguments.need_dx) require_launched(op, lora_gemm(gemm, stream));
  return {dx, dA, dB};
}

}  // namespace nf4lora::cuda
