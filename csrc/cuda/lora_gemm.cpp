// lora_linear and its backward for CUDA tensors on tensor cores (lora_gemm.cu), and their low-rank products alone
// (lora_grad.cu), which the sliced path takes too: checks, allocation, registration. The ops are no part of the
// catalogue: python/nf4lora/ops/kernels calls them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../check/lora.h"
#include "layer.h"
#include "stream.h"

namespace nf4lora::cuda {
namespace {

constexpr const char* kForward = "lora_linear";
constexpr const char* kBackward = "lora_linear_backward";

void run(const char* op, TallSkinny& product, const Tensor& like, void* stream) {
  Tensor workspace = torch::stable::new_empty(like, {tall_skinny_workspace(product)}, ScalarType::Float);
  product.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  require_launched(op, tall_skinny(product, stream));
}

void run(const char* op, LoraGemm& gemm, const Tensor& like, void* stream) {
  Tensor partials = torch::stable::new_empty(like, {lora_gemm_partials(gemm)}, ScalarType::Float);
  gemm.partials = static_cast<float*>(partials.mutable_data_ptr());
  require_launched(op, lora_gemm(gemm, stream));
}

// S = dropout(x) A^T: [M, R] of x's dtype. x and A are contiguous.
Tensor low_rank_of(const Tensor& x, const Tensor& A, const Dropout& dropout, int64_t M, void* stream) {
  const int64_t R = A.size(0), K = A.size(1);
  Tensor S = torch::stable::new_empty(x, {M, R}, x.scalar_type());
  TallSkinny product{};
  product.dtype = dtype_of(x);
  product.Z = x.const_data_ptr();
  product.F = A.const_data_ptr(), product.dtype_of_F = dtype_of(A), product.F_is_transposed = true;
  product.seed = seed_of(dropout), product.threshold = dropout.threshold;
  product.inner_scale = static_cast<float>(dropout.inverse_keep);
  product.P = S.mutable_data_ptr();
  product.M = M, product.D = K, product.R = R;
  run(kForward, product, x, stream);
  return S;
}

struct Gradients {
  Tensor T, dA, dB;
};

// T = dy B, dB = scaling dy^T S in one pass over dy; dA = scaling T^T dropout(x) in one over x. All contiguous. Without x
// no dA and without S no dB: both are empty.
Gradients gradients_of(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& S, const Tensor& A,
                       const Tensor& B, double scaling, const Dropout& dropout, void* stream) {
  const int64_t M = rows_of(dy), R = A.size(0), N = B.size(0), K = A.size(1);
  const Tensor none = torch::stable::new_empty(dy, {0}, ScalarType::Float);
  Gradients gradients{torch::stable::new_empty(dy, {M, R}, dy.scalar_type()),
                      x ? torch::stable::new_empty(dy, {R, K}, A.scalar_type()) : none,
                      S ? torch::stable::new_empty(dy, {N, R}, B.scalar_type()) : none};
  TallSkinny of_dy{};
  of_dy.dtype = dtype_of(dy);
  of_dy.Z = dy.const_data_ptr();
  of_dy.F = B.const_data_ptr(), of_dy.dtype_of_F = dtype_of(B);
  of_dy.inner_scale = 1.0f, of_dy.outer_scale = static_cast<float>(scaling);
  of_dy.P = gradients.T.mutable_data_ptr();
  if (S) {
    of_dy.L = S->const_data_ptr();
    of_dy.G = gradients.dB.mutable_data_ptr(), of_dy.dtype_of_G = dtype_of(B);
  }
  of_dy.M = M, of_dy.D = N, of_dy.R = R;
  run(kBackward, of_dy, dy, stream);
  if (!x) return gradients;

  TallSkinny of_x{};
  of_x.dtype = dtype_of(*x);
  of_x.Z = x->const_data_ptr();
  of_x.L = gradients.T.const_data_ptr();
  of_x.seed = seed_of(dropout), of_x.threshold = dropout.threshold;
  of_x.outer_scale = static_cast<float>(scaling * dropout.inverse_keep);
  of_x.G = gradients.dA.mutable_data_ptr(), of_x.dtype_of_G = dtype_of(A), of_x.G_is_transposed = true;
  of_x.M = M, of_x.D = K, of_x.R = R;
  run(kBackward, of_x, dy, stream);
  return gradients;
}

LoraGemm gemm_of(const LinearShape& shape, const Tensor& rows, const Weight& weight, int64_t blocksize, Tensor& out) {
  LoraGemm gemm{};
  gemm.dtype = dtype_of(rows);
  gemm.rows = rows.const_data_ptr();
  gemm.W = weight.packed();
  gemm.out = out.mutable_data_ptr();
  gemm.M = shape.M, gemm.N = shape.N, gemm.K = shape.K, gemm.R = shape.R, gemm.blocksize = blocksize;
  return gemm;
}

std::tuple<Tensor, Tensor> lora_linear_gemm(const LoraLinear& arguments) {
  const LinearShape shape = check_lora_linear(arguments);
  const OnDeviceOf device(arguments.x);
  const Tensor in = aligned(arguments.x);
  const Weight weight(arguments.weight);
  const Adapter& adapter = arguments.adapter;
  const OptionalTensor offsets = float_bias(arguments.bias);
  const OptionalTensor A = contiguous_view(adapter.A), B = contiguous_view(adapter.B);
  Tensor y = torch::stable::new_empty(in, with_last(in, shape.N), in.scalar_type());
  Tensor S = A ? low_rank_of(in, *A, Dropout(adapter), shape.M, device.stream())
               : torch::stable::new_empty(in, {shape.M, 0}, in.scalar_type());
  LoraGemm gemm = gemm_of(shape, in, weight, arguments.weight.blocksize, y);
  gemm.bias = static_cast<const float*>(data_of(offsets));
  gemm.low_rank = S.const_data_ptr();
  gemm.factor = data_of(B);
  if (B) gemm.dtype_of_factor = dtype_of(*B);
  gemm.scaling = static_cast<float>(adapter.scaling);
  run(kForward, gemm, in, device.stream());
  return {y, S};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_gemm_backward(const LoraLinearBackward& arguments) {
  const LinearShape shape = check_lora_linear_backward(arguments);
  const OptionalTensor &x = arguments.x, &S = arguments.S;
  const OnDeviceOf device(arguments.dy);
  const Tensor dy = aligned(arguments.dy);
  const Adapter& adapter = arguments.adapter;
  const OptionalTensor A = contiguous_view(adapter.A), B = contiguous_view(adapter.B);
  const Dropout dropout(adapter);
  const Tensor none = torch::stable::new_empty(dy, {0}, ScalarType::Float);
  Gradients gradients{none, none, none};
  if (A && (arguments.need_dx || x || S)) {
    gradients = gradients_of(dy, aligned(x), contiguous_view(S), *A, *B, adapter.scaling, dropout, device.stream());
  }
  if (!arguments.need_dx) {
    return {torch::stable::new_empty(dy, {0}, dy.scalar_type()), gradients.dA, gradients.dB};
  }

  const Weight weight(arguments.weight);
  Tensor dx = torch::stable::new_empty(dy, with_last(x ? *x : dy, shape.K), dy.scalar_type());
  LoraGemm gemm = gemm_of(shape, dy, weight, arguments.weight.blocksize, dx);
  gemm.backward = true;
  gemm.low_rank = A ? gradients.T.const_data_ptr() : nullptr;
  gemm.factor = data_of(A);
  if (A) gemm.dtype_of_factor = dtype_of(*A);
  gemm.seed = seed_of(dropout), gemm.threshold = dropout.threshold;
  gemm.scaling = static_cast<float>(adapter.scaling * dropout.inverse_keep);
  run(kBackward, gemm, dy, device.stream());
  return {dx, gradients.dA, gradients.dB};
}

// The low-rank products of lora_linear's arguments, which it has checked. The weight is not read.
Tensor lora_low_rank(const LoraLinear& arguments) {
  const OnDeviceOf device(arguments.x);
  const Tensor x = aligned(arguments.x), A = contiguous_view(*arguments.adapter.A);
  const int64_t K = A.size(1), M = K ? x.numel() / K : 0;
  return low_rank_of(x, A, Dropout(arguments.adapter), M, device.stream());
}
std::tuple<Tensor, Tensor, Tensor> lora_low_rank_backward(const LoraLinearBackward& arguments) {
  const OnDeviceOf device(arguments.dy);
  const Adapter& adapter = arguments.adapter;
  const Gradients gradients = gradients_of(aligned(arguments.dy), aligned(arguments.x), contiguous_view(arguments.S),
                                           contiguous_view(*adapter.A), contiguous_view(*adapter.B), adapter.scaling,
                                           Dropout(adapter), device.stream());
  return {gradients.T, gradients.dA, gradients.dB};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nf4lora_cuda, m) {
  m.def(renamed(kLoraLinearSchema, "lora_linear_gemm").c_str());
  m.def(renamed(kLoraLinearBackwardSchema, "lora_linear_gemm_backward").c_str());
  m.def(renamed(kLoraLinearSchema, "lora_low_rank", "Tensor S").c_str());
  m.def(renamed(kLoraLinearBackwardSchema, "lora_low_rank_backward", "(Tensor T, Tensor dA, Tensor dB)").c_str());
}
STABLE_TORCH_LIBRARY_IMPL(nf4lora_cuda, CUDA, m) {
  m.impl("lora_linear_gemm", TORCH_BOX((&LoraLinear::op<&lora_linear_gemm>)));
  m.impl("lora_linear_gemm_backward", TORCH_BOX((&LoraLinearBackward::op<&lora_linear_gemm_backward>)));
  m.impl("lora_low_rank", TORCH_BOX((&LoraLinear::op<&lora_low_rank>)));
  m.impl("lora_low_rank_backward", TORCH_BOX((&LoraLinearBackward::op<&lora_low_rank_backward>)));
}

}  // namespace nf4lora::cuda
