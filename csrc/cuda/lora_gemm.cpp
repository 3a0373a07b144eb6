// lora_linear and its backward for CUDA tensors on tensor cores (lora_gemm.cu), and their low-rank products alone
// (lora_grad.cu), which the sliced path takes too: checks, allocation, registration. The ops are no part of the
// catalogue: dispatch.py, which chooses between kernels, calls them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

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
  product.seed = dropout.word(), product.threshold = dropout.threshold;
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
  Gradients found{torch::stable::new_empty(dy, {M, R}, dy.scalar_type()),
                  x ? torch::stable::new_empty(dy, {R, K}, A.scalar_type()) : none,
                  S ? torch::stable::new_empty(dy, {N, R}, B.scalar_type()) : none};
  TallSkinny of_dy{};
  of_dy.dtype = dtype_of(dy);
  of_dy.Z = dy.const_data_ptr();
  of_dy.F = B.const_data_ptr(), of_dy.dtype_of_F = dtype_of(B);
  of_dy.inner_scale = 1.0f, of_dy.outer_scale = static_cast<float>(scaling);
  of_dy.P = found.T.mutable_data_ptr();
  if (S) {
    of_dy.L = S->const_data_ptr();
    of_dy.G = found.dB.mutable_data_ptr(), of_dy.dtype_of_G = dtype_of(B);
  }
  of_dy.M = M, of_dy.D = N, of_dy.R = R;
  run(kBackward, of_dy, dy, stream);
  if (!x) return found;

  TallSkinny of_x{};
  of_x.dtype = dtype_of(*x);
  of_x.Z = x->const_data_ptr();
  of_x.L = found.T.const_data_ptr();
  of_x.seed = dropout.word(), of_x.threshold = dropout.threshold;
  of_x.outer_scale = static_cast<float>(scaling * dropout.inverse_keep);
  of_x.G = found.dA.mutable_data_ptr(), of_x.dtype_of_G = dtype_of(A), of_x.G_is_transposed = true;
  of_x.M = M, of_x.D = K, of_x.R = R;
  run(kBackward, of_x, dy, stream);
  return found;
}

LoraGemm gemm_of(const LinearShape& shape, const Tensor& rows, const Weight& weight, int64_t blocksize, Tensor& out) {
  LoraGemm gemm{};
  gemm.dtype = dtype_of(rows);
  gemm.rows = rows.const_data_ptr();
  weight.into(gemm);
  gemm.out = out.mutable_data_ptr();
  gemm.M = shape.M, gemm.N = shape.N, gemm.K = shape.K, gemm.R = shape.R, gemm.blocksize = blocksize;
  return gemm;
}

std::tuple<Tensor, Tensor> lora_linear_gemm(const Tensor& x, const Tensor& qweight, const Tensor& absmax,
                                            const OptionalTensor& nested, const OptionalTensor& bias,
                                            const OptionalTensor& lora_A, const OptionalTensor& lora_B, double scaling,
                                            double probability, const OptionalTensor& seed, int64_t blocksize) {
  const LinearShape shape =
      check_lora_linear(kForward, x, qweight, absmax, nested, bias, lora_A, lora_B, probability, seed, blocksize);
  const OnDeviceOf device(x);
  const Tensor in = aligned(x);
  const Weight weight(qweight, absmax, nested);
  const OptionalTensor offsets = float_bias(bias), A = contiguous(lora_A), B = contiguous(lora_B);
  Tensor y = torch::stable::new_empty(in, with_last(in, shape.N), x.scalar_type());
  Tensor S = A ? low_rank_of(in, *A, Dropout(probability, seed, shape.R), shape.M, device.stream())
               : torch::stable::new_empty(in, {shape.M, 0}, x.scalar_type());
  LoraGemm gemm = gemm_of(shape, in, weight, blocksize, y);
  gemm.bias = static_cast<const float*>(data_of(offsets));
  gemm.low_rank = S.const_data_ptr();
  gemm.factor = data_of(B);
  if (B) gemm.dtype_of_factor = dtype_of(*B);
  gemm.scaling = static_cast<float>(scaling);
  run(kForward, gemm, in, device.stream());
  return {y, S};
}

OptionalTensor aligned_if_given(const OptionalTensor& tensor) {
  if (!tensor) return std::nullopt;
  return aligned(*tensor);
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_gemm_backward(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& S, const Tensor& qweight, const Tensor& absmax,
    const OptionalTensor& nested, const OptionalTensor& lora_A, const OptionalTensor& lora_B, double scaling,
    double probability, const OptionalTensor& seed, int64_t blocksize, bool need_dx) {
  const LinearShape shape =
      check_lora_linear_backward(dy, x, S, qweight, absmax, nested, lora_A, lora_B, probability, seed, blocksize);
  const OnDeviceOf device(dy);
  const Tensor grad = aligned(dy);
  const OptionalTensor A = contiguous(lora_A), B = contiguous(lora_B);
  const Dropout dropout(probability, seed, shape.R);
  const Tensor none = torch::stable::new_empty(grad, {0}, ScalarType::Float);
  Gradients found{none, none, none};
  if (A && (need_dx || x || S)) {
    found = gradients_of(grad, aligned_if_given(x), contiguous(S), *A, *B, scaling, dropout, device.stream());
  }
  if (!need_dx) return {torch::stable::new_empty(grad, {0}, dy.scalar_type()), found.dA, found.dB};

  const Weight weight(qweight, absmax, nested);
  Tensor dx = torch::stable::new_empty(grad, with_last(x ? *x : dy, shape.K), dy.scalar_type());
  LoraGemm gemm = gemm_of(shape, grad, weight, blocksize, dx);
  gemm.backward = true;
  gemm.low_rank = A ? found.T.const_data_ptr() : nullptr;
  gemm.factor = data_of(A);
  if (A) gemm.dtype_of_factor = dtype_of(*A);
  gemm.seed = dropout.word(), gemm.threshold = dropout.threshold;
  gemm.scaling = static_cast<float>(scaling * dropout.inverse_keep);
  run(kBackward, gemm, grad, device.stream());
  return {dx, found.dA, found.dB};
}

// The low-rank products of arguments that lora_linear has checked.
Tensor lora_low_rank(const Tensor& x, const Tensor& lora_A, double probability, const OptionalTensor& seed) {
  const OnDeviceOf device(x);
  const Tensor in = aligned(x);
  const int64_t M = lora_A.size(1) ? in.numel() / lora_A.size(1) : 0;
  return low_rank_of(in, torch::stable::contiguous(lora_A), Dropout(probability, seed, lora_A.size(0)), M,
                     device.stream());
}
std::tuple<Tensor, Tensor, Tensor> lora_low_rank_backward(const Tensor& dy, const OptionalTensor& x,
                                                          const OptionalTensor& S, const Tensor& lora_A,
                                                          const Tensor& lora_B, double scaling, double probability,
                                                          const OptionalTensor& seed) {
  const OnDeviceOf device(dy);
  const Gradients found = gradients_of(aligned(dy), aligned_if_given(x), contiguous(S),
                                       torch::stable::contiguous(lora_A), torch::stable::contiguous(lora_B), scaling,
                                       Dropout(probability, seed, lora_A.size(0)), device.stream());
  return {found.T, found.dA, found.dB};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nf4lora_cuda, m) {
  m.def(
      "lora_linear_gemm(Tensor x, Tensor qweight, Tensor absmax, Tensor? nested, Tensor? bias, Tensor? lora_A, "
      "Tensor? lora_B, float scaling, float dropout, Tensor? seed, int blocksize) -> (Tensor y, Tensor S)");
  m.def(
      "lora_linear_gemm_backward(Tensor dy, Tensor? x, Tensor? S, Tensor qweight, Tensor absmax, Tensor? nested, "
      "Tensor? lora_A, Tensor? lora_B, float scaling, float dropout, Tensor? seed, int blocksize, bool need_dx) -> "
      "(Tensor dx, Tensor dA, Tensor dB)");
  m.def("lora_low_rank(Tensor x, Tensor lora_A, float dropout, Tensor? seed) -> Tensor S");
  m.def(
      "lora_low_rank_backward(Tensor dy, Tensor? x, Tensor? S, Tensor lora_A, Tensor lora_B, float scaling, "
      "float dropout, Tensor? seed) -> (Tensor T, Tensor dA, Tensor dB)");
}
STABLE_TORCH_LIBRARY_IMPL(nf4lora_cuda, CUDA, m) {
  m.impl("lora_linear_gemm", TORCH_BOX(&lora_linear_gemm));
  m.impl("lora_linear_gemm_backward", TORCH_BOX(&lora_linear_gemm_backward));
  m.impl("lora_low_rank", TORCH_BOX(&lora_low_rank));
  m.impl("lora_low_rank_backward", TORCH_BOX(&lora_low_rank_backward));
}

}  // namespace nf4lora::cuda
