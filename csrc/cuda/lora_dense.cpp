// lora_linear and its backward for CUDA tensors with many rows: W is unpacked into memory, whole where it fits, and torch
// multiplies it. The kernels are in lora_slice.cu (W), lora_grad.cu (the low-rank products) and dropout.cu.
//
// The low-rank term is either multiplied beside W, by one product over [x | S] and [W | scaling B], or written first, and
// torch adds the product with W to it. (It is rounded relative to itself then, and once more with y, so that a small one is
// not lost as it would be if it were added to a rounded y.) Partial sums of a product are torch's own: float32, unless
// torch.backends.cuda.matmul allows reductions in 16 bits.
#include <algorithm>
#include <vector>

#include "dense.h"
#include "dispatch.h"
#include "kept_weights.h"
#include "launch.h"
#include "layer.h"
#include "lora.h"
#include "low_rank.h"
#include "product.h"
#include "stream.h"
#include "workspace.h"

namespace nf4lora::cuda {
namespace {

constexpr const char* kForward = "lora_linear";
constexpr const char* kBackward = "lora_linear_backward";

// How the low-rank term is computed.
enum class Term {
  none,
  beside,  // multiplied beside W
  before,  // written by a kernel before W's product is added
  torch    // written by torch's products: float32, which no kernel for tensor cores takes
};

// Beside W the rows of x (or of dy) are copied once, 2 bytes read less than the 4 bytes of an out that is written first and
// read again.
Term term_of(bool with_adapter, const Tensor& rows, const Adapter& adapter, bool drops_out, int64_t in, int64_t out) {
  if (!with_adapter) return Term::none;
  const ScalarType dtype = rows.scalar_type();
  if (dtype == ScalarType::Float) return Term::torch;
  return is_exact_beside(dtype, adapter.scaling) && !drops_out && in < 2 * out ? Term::beside : Term::before;
}

// How a call is computed: with rows of x (forward) or dy of `in` values, and of y or dx of `out` values.
struct Plan {
  Term term;
  bool copies = false;  // rows, with S or T beside them, into the work space
  int64_t depth;        // values of such a row, which are those that a product sums over
  int64_t step;         // of y's or dx's columns that one slice of W makes

  Plan(Term wanted, const LinearShape& shape, int64_t size, int64_t in, int64_t out) : term(wanted), depth(in) {
    const int64_t most = workspace_bytes(), beside = in + round_up(shape.R, kChunk), copied = size * shape.M * beside;
    copies = term == Term::beside && copied + size * beside * kStep <= most;
    if (copies) depth = beside;
    if (term == Term::beside && !copies) term = Term::before;
    step = step_of(out, size * depth, copies ? most - copied : most);
  }
  bool has_pass() const { return term == Term::beside || term == Term::before; }
  bool adds() const { return term == Term::before || term == Term::torch; }  // W's product to the low-rank term
};

// gradient [rows, columns] = alpha * left right, in the gradient's own dtype; the product is in float32.
void product_into(const Tensor& gradient, int64_t rows, int64_t columns, const Matrix& left, const Matrix& right,
                  double alpha) {
  const bool is_float = gradient.scalar_type() == ScalarType::Float;
  Tensor sums = is_float ? gradient : empty({rows, columns}, ScalarType::Float, gradient);
  const Matrix out{sums, rows, columns, columns};
  add_product(out, 0.0, out, left, right, alpha);
  if (!is_float) torch::stable::copy_(const_cast<Tensor&>(gradient), sums);
}

// x with zeros where dropout leaves values out, as [M, K]: in the work space, at `offset`; x itself without dropout.
Matrix dropped(const char* op, const Tensor& x, const Dropout& dropout, const LinearShape& shape,
               const Workspace& workspace, int64_t offset, void* stream) {
  if (!dropout.seed) return {x, shape.M, shape.K, shape.K};
  const Dtype dtype = dtype_of(x);
  require_launched(op, cuda::dropout(x.const_data_ptr(), workspace.at<void>(offset), dtype, seed_of(dropout),
                                     dropout.threshold, x.numel(), stream));
  return {workspace.memory(), shape.M, shape.K, shape.K, 1, offset / bytes_of(dtype)};
}

}  // namespace

Outputs lora_linear_dense(const LoraLinear& arguments, const LinearShape& shape, void* stream, bool keeps) {
  const auto [M, N, K, R] = shape;
  const Tensor x = aligned(arguments.x);
  const ScalarType dtype = x.scalar_type();
  const int64_t size = bytes_of(dtype_of(x));
  const Adapter& adapter = arguments.adapter;
  const Dropout dropout(adapter);
  const Weight weight(arguments.weight);
  const OptionalTensor A = contiguous_view(adapter.A), B = contiguous_view(adapter.B);
  Tensor y = empty(with_last(x, N), dtype, x), S = empty({M, R}, dtype, x);
  if (M == 0) return {y, S};

  const Plan plan(term_of(A.has_value(), x, adapter, false, K, N), shape, size, K, N);
  TallSkinny pass{};
  if (plan.has_pass()) pass = pass_for_S(x, *A, dropout, shape, S.mutable_data_ptr());
  const OptionalTensor bias = plan.term == Term::before ? std::nullopt : in_dtype(arguments.bias, dtype);
  const OptionalTensor offsets = plan.term == Term::before ? float_bias(arguments.bias) : std::nullopt;
  if (plan.term == Term::before) pass.expansion = expansion_of(*B, true, offsets, adapter.scaling, y);
  std::optional<KeptWeight> kept;
  if (keeps && plan.step >= N) kept = room_to_keep(x, shape, R);
  Workspace workspace;
  const int64_t at_W = workspace.add(kept ? 0 : size * std::min(plan.step, N) * plan.depth);
  const int64_t at_x =
      workspace.add(plan.copies || (plan.term == Term::torch && dropout.seed) ? size * M * plan.depth : 0);
  const int64_t at_sums = workspace.add(plan.has_pass() ? 4 * tall_skinny_workspace(pass) : 0);
  workspace.allocate(x);

  const Matrix out{y, M, N, N};
  if (plan.has_pass()) {
    pass.workspace = workspace.at<float>(at_sums);
    if (plan.copies) pass.copy = workspace.at<void>(at_x), pass.copy_stride = plan.depth;
    require_launched(kForward, tall_skinny(pass, stream));
  } else if (plan.term == Term::torch) {
    const Tensor float_A = in_dtype(*A, dtype), float_B = in_dtype(*B, dtype);
    const Matrix low_rank{S, M, R, R}, kept = dropped(kForward, x, dropout, shape, workspace, at_x, stream);
    add_product(low_rank, 0.0, low_rank, kept, {float_A, K, R, 1, K}, dropout.inverse_keep);
    add_product(out, bias ? 1.0 : 0.0, bias ? Matrix(*bias, N, 0) : out, low_rank, {float_B, R, N, 1, R},
                adapter.scaling);
  }

  const Matrix rows =
      plan.copies ? Matrix(workspace.memory(), M, plan.depth, plan.depth, 1, at_x / size) : Matrix(x, M, K, K);
  Slice slice = slice_of(x, weight, shape, arguments.weight.blocksize);
  slice.weight = kept ? kept->memory.mutable_data_ptr() : workspace.at<void>(at_W);
  slice.stride = kept ? kept->stride : plan.depth;
  if (plan.copies) add_factor(slice, *B, adapter.scaling, R, false);
  for (int64_t n = 0; n < N; n += plan.step) {
    slice.n0 = n, slice.rows = std::min(plan.step, N - n);
    require_launched(kForward, lora_slice(slice, stream));
    const Matrix columns{y, M, slice.rows, N, 1, n};
    const Matrix W{
        kept ? kept->memory : workspace.memory(), plan.depth, slice.rows, 1, slice.stride, kept ? 0 : at_W / size};
    const bool adds_bias = bias && !plan.adds();
    add_product(columns, plan.adds() || adds_bias ? 1.0 : 0.0, adds_bias ? Matrix(*bias, slice.rows, n) : columns, rows,
                W);
  }
  if (kept) keep_weight(arguments.weight, *kept, stream);
  return {y, S};
}

Gradients lora_linear_backward_dense(const LoraLinearBackward& arguments, const LinearShape& shape, void* stream) {
  const auto [M, N, K, R] = shape;
  const Tensor dy = aligned(arguments.dy);
  const ScalarType dtype = dy.scalar_type();
  const int64_t size = bytes_of(dtype_of(dy));
  const Adapter& adapter = arguments.adapter;
  const Dropout dropout(adapter);
  const Weight weight(arguments.weight);
  const OptionalTensor A = contiguous_view(adapter.A), B = contiguous_view(adapter.B);
  const OptionalTensor x = A ? aligned(arguments.x) : std::nullopt, S = A ? contiguous_view(arguments.S) : std::nullopt;
  const bool need_dx = arguments.need_dx;
  const double scaling = adapter.scaling * dropout.inverse_keep;
  Tensor dx = empty(need_dx ? with_last(arguments.x ? *arguments.x : dy, K) : std::vector<int64_t>{0}, dtype, dy);
  const Tensor dA = gradient_of(A, x.has_value(), dy);
  Tensor dB = gradient_of(B, S.has_value(), dy);

  Term term = term_of(A && (need_dx || x || S), dy, adapter, dropout.seed.has_value(), N, K);
  const bool is_ragged = N % kChunk != 0;
  if (term == Term::beside && (is_ragged || !need_dx || M == 0)) term = Term::before;
  const Plan plan(term, shape, size, N, K);
  const Tensor T = empty({plan.term == Term::none ? 0 : M, R}, dtype, dy);
  TallSkinny over_dy{}, for_dA{};
  Tensor grads = dy, factor_B = B ? *B : dy, padded_dB = dB;
  if (plan.has_pass()) {
    if (is_ragged) {  // the kernel copies 8 columns at a time
      const int64_t missing = kChunk - N % kChunk;
      grads = torch::stable::pad(dy, {0, missing}), factor_B = torch::stable::pad(*B, {0, 0, 0, missing});
      if (S) padded_dB = empty({N + missing, R}, dB.scalar_type(), dB);
    }
    over_dy = pass_over_dy(grads, factor_B, adapter.scaling, shape, T.mutable_data_ptr(), S, padded_dB);
    if (plan.term == Term::before && need_dx) {
      over_dy.expansion = expansion_of(*A, false, std::nullopt, scaling, dx);
      over_dy.expansion.seed = seed_of(dropout), over_dy.expansion.threshold = dropout.threshold;
    }
    if (x) for_dA = pass_for_dA(*x, T.const_data_ptr(), adapter.scaling, dropout, shape, dA);
  }
  Workspace workspace;
  std::optional<KeptWeight> kept;
  if (need_dx && M > 0) kept = take_kept_weight(arguments.weight, plan.copies ? round_up(R, kChunk) : 0, dtype, stream);
  const int64_t at_W = workspace.add(need_dx && M > 0 && !kept ? size * std::min(plan.step, K) * plan.depth : 0);
  const int64_t at_rows = workspace.add(plan.copies                                     ? size * M * plan.depth
                                        : plan.term == Term::torch && dropout.seed && x ? size * M * K
                                                                                        : 0);
  const int64_t at_sums = workspace.add(4 * std::max(plan.has_pass() ? tall_skinny_workspace(over_dy) : 0,
                                                     plan.has_pass() && x ? tall_skinny_workspace(for_dA) : 0));
  workspace.allocate(dy);

  if (plan.has_pass()) {
    over_dy.workspace = for_dA.workspace = workspace.at<float>(at_sums);
    if (plan.copies) over_dy.copy = workspace.at<void>(at_rows), over_dy.copy_stride = plan.depth;
    require_launched(kBackward, tall_skinny(over_dy, stream));
    if (x) require_launched(kBackward, tall_skinny(for_dA, stream));
    if (is_ragged && S) dB = torch::stable::clone(torch::stable::narrow(padded_dB, 0, 0, N));
  } else if (plan.term == Term::torch) {
    const Tensor float_A = in_dtype(*A, dtype), float_B = in_dtype(*B, dtype);
    const Matrix grad{dy, M, N, N}, low_rank{T, M, R, R};
    add_product(low_rank, 0.0, low_rank, grad, {float_B, N, R, R});
    if (x) {
      const Matrix kept = dropped(kBackward, *x, dropout, shape, workspace, at_rows, stream);
      product_into(dA, R, K, {T, R, M, 1, R}, kept, scaling);
    }
    if (S) product_into(dB, N, R, {dy, N, M, 1, N}, {*S, M, R, R}, adapter.scaling);
    if (need_dx) {
      const Matrix term_of_dx{dx, M, K, K};
      add_product(term_of_dx, 0.0, term_of_dx, low_rank, {float_A, R, K, K}, scaling);
      if (dropout.seed) {
        require_launched(kBackward, cuda::dropout(dx.const_data_ptr(), dx.mutable_data_ptr(), dtype_of(dx),
                                                  seed_of(dropout), dropout.threshold, dx.numel(), stream));
      }
    }
  }
  if (!need_dx || M == 0) return {dx, dA, dB};

  const Matrix rows =
      plan.copies ? Matrix(workspace.memory(), M, plan.depth, plan.depth, 1, at_rows / size) : Matrix(dy, M, N, N);
  Slice slice = slice_of(dy, weight, shape, arguments.weight.blocksize);
  if (plan.copies) add_factor(slice, *A, adapter.scaling, R, true);
  if (kept) {  // all that is missing is the factor below W
    slice.rows = 0, slice.stride = kept->stride;
    slice.weight = static_cast<char*>(kept->memory.mutable_data_ptr()) + size * N * kept->stride;
    if (plan.copies) require_launched(kBackward, lora_slice(slice, stream));
    const Matrix out{dx, M, K, K}, W{kept->memory, plan.depth, K, kept->stride};
    add_product(out, plan.adds() ? 1.0 : 0.0, out, rows, W);
    return {dx, dA, dB};
  }
  slice.weight = workspace.at<void>(at_W);
  for (int64_t k = 0; k < K; k += plan.step) {
    slice.k0 = k, slice.columns = slice.stride = std::min(plan.step, K - k);
    require_launched(kBackward, lora_slice(slice, stream));
    const Matrix columns{dx, M, slice.columns, K, 1, k};
    const Matrix W{workspace.memory(), plan.depth, slice.columns, slice.columns, 1, at_W / size};
    add_product(columns, plan.adds() ? 1.0 : 0.0, columns, rows, W);
  }
  return {dx, dA, dB};
}

}  // namespace nf4lora::cuda
