// A group of layers with one x, by the dense kernel (lora_dense.cpp): what they share is made once.
//
// Forward, one pass over x makes S of all adapters, and the copy of x with all S beside it if the low-rank terms are
// multiplied beside W: a layer's factor is then surrounded by zeros for the ranks of the others. (So an S that is not
// finite makes the outputs of the whole group not finite.) Backward, T of all adapters is one matrix: one kernel writes the
// low-rank term of dx from it, one pass over x makes all dA, and every product with a W is added to dx.
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

constexpr const char* kForward = "lora_linear_group";
constexpr const char* kBackward = "lora_linear_group_backward";

// The tensors of one of the lists in the form that launchers take, and the shape of all layers together: N and R are sums.
struct Layers {
  std::vector<Weight> weights;
  Tensors A, B;
  std::vector<int64_t> first_rank;
  LinearShape all{};

  template <class Group>
  Layers(const Group& group, const std::vector<LinearShape>& shapes) {
    all.M = shapes[0].M, all.K = shapes[0].K;
    for (size_t i = 0; i < group.size(); ++i) {
      weights.emplace_back(PackedTensors{group.qweight[i], group.absmax[i], group.nested[i], group.blocksize});
      A.push_back(contiguous_view(group.lora_A[i])), B.push_back(contiguous_view(group.lora_B[i]));
      first_rank.push_back(all.R);
      all.N += shapes[i].N, all.R += shapes[i].R;
    }
  }
  size_t size() const { return weights.size(); }

  // Tells a pass where the ranks of each adapter begin.
  void divide(TallSkinny& pass) const { std::copy(first_rank.begin(), first_rank.end(), pass.first_rank); }
};

PackedTensors weight_of(const LoraLinearGroup& group, size_t i) { return group.layer(i).weight; }
PackedTensors weight_of(const LoraLinearGroupBackward& group, size_t i) { return group.layer(i).weight; }

}  // namespace

bool is_one_dense_group(const Tensor& rows, const Tensors& lora_A, const std::vector<LinearShape>& shapes) {
  const bool sixteen_bits = rows.scalar_type() != ScalarType::Float;
  const auto fills_chunks = [](const LinearShape& shape) { return shape.N % kChunk == 0; };
  const auto is_alike = [&](const Tensor& A) { return A.scalar_type() == lora_A[0].scalar_type(); };
  return shapes.size() > 1 && sixteen_bits && shapes[0].M > 0 &&
         std::all_of(shapes.begin(), shapes.end(), fills_chunks) && std::all_of(lora_A.begin(), lora_A.end(), is_alike);
}

GroupOutputs lora_linear_group_dense(const LoraLinearGroup& group, const std::vector<LinearShape>& shapes, void* stream,
                                     bool keeps) {
  const Tensor x = aligned(group.x);
  const ScalarType dtype = x.scalar_type();
  const int64_t size = bytes_of(dtype_of(x));
  const Layers layers(group, shapes);
  const auto [M, all_N, K, R] = layers.all;
  Tensors y, S;
  for (const LinearShape& shape : shapes) {
    y.push_back(empty(with_last(x, shape.N), dtype, x));
    S.push_back(empty({M, shape.R}, dtype, x));
  }

  // As in lora_dense.cpp: x is copied once, where the outputs would be written first and read again.
  const int64_t most = workspace_bytes(), beside = K + padded_rank(R), copied = size * M * beside;
  const bool copies = is_exact_beside(dtype, group.scaling) && K < 2 * all_N && copied + size * beside * kStep <= most;
  const int64_t depth = copies ? beside : K;
  std::vector<int64_t> steps;
  std::vector<std::optional<KeptWeight>> kept;
  int64_t bytes_of_W = 0;
  for (const LinearShape& shape : shapes) {
    steps.push_back(step_of(shape.N, size * depth, copies ? most - copied : most));
    kept.emplace_back();
    if (keeps && steps.back() >= shape.N) {
      kept.back() = room_to_keep(x, shape, R);
    } else {
      bytes_of_W = std::max(bytes_of_W, size * std::min(steps.back(), shape.N) * depth);
    }
  }

  TallSkinny pass = pass_for_S(x, layers.A[0], Dropout(Adapter{}), layers.all, nullptr);
  layers.divide(pass);
  for (size_t i = 0; i < layers.size(); ++i) {
    pass.F[i] = layers.A[i].const_data_ptr(), pass.P[i] = S[i].mutable_data_ptr();
  }
  Workspace workspace;
  const int64_t at_W = workspace.add(bytes_of_W), at_x = workspace.add(copies ? copied : 0);
  const int64_t at_sums = workspace.add(4 * tall_skinny_workspace(pass));
  workspace.allocate(x);
  pass.workspace = workspace.at<float>(at_sums);
  if (copies) pass.copy = workspace.at<void>(at_x), pass.copy_stride = depth;
  require_launched(kForward, tall_skinny(pass, stream));

  const Matrix rows = copies ? Matrix(workspace.memory(), M, depth, depth, 1, at_x / size) : Matrix(x, M, K, K);
  for (size_t i = 0; i < layers.size(); ++i) {
    const int64_t N = shapes[i].N;
    if (!copies) {
      const OptionalTensor offsets = float_bias(group.bias[i]);
      TallSkinny term = pass_for_S(x, layers.A[i], Dropout(Adapter{}), shapes[i], S[i].mutable_data_ptr());
      term.expansion = expansion_of(layers.B[i], true, offsets, group.scaling, y[i]);
      require_launched(kForward, expand(term, stream));
    }
    const OptionalTensor bias = copies ? in_dtype(group.bias[i], dtype) : std::nullopt;
    Slice slice = slice_of(x, layers.weights[i], shapes[i], group.blocksize);
    slice.weight = kept[i] ? kept[i]->memory.mutable_data_ptr() : workspace.at<void>(at_W);
    slice.stride = kept[i] ? kept[i]->stride : depth;
    if (copies) {
      add_factor(slice, layers.B[i], group.scaling, shapes[i].R, false);
      slice.first_rank = layers.first_rank[i], slice.all_ranks = R;
    }
    for (int64_t n = 0; n < N; n += steps[i]) {
      slice.n0 = n, slice.rows = std::min(steps[i], N - n);
      require_launched(kForward, lora_slice(slice, stream));
      const Matrix columns{y[i], M, slice.rows, N, 1, n};
      const Matrix W{kept[i] ? kept[i]->memory : workspace.memory(),
                     depth,
                     slice.rows,
                     1,
                     slice.stride,
                     kept[i] ? 0 : at_W / size};
      add_product(columns, bias || !copies ? 1.0 : 0.0, bias ? Matrix(*bias, slice.rows, n) : columns, rows, W);
    }
    if (kept[i]) keep_weight(weight_of(group, i), *kept[i], stream);
  }
  return {y, S};
}

GroupGradients lora_linear_group_backward_dense(const LoraLinearGroupBackward& group,
                                                const std::vector<LinearShape>& shapes, void* stream) {
  const Layers layers(group, shapes);
  const auto [M, all_N, K, R] = layers.all;
  const size_t count = layers.size();
  Tensors dy;
  for (const Tensor& each : group.dy) dy.push_back(aligned(each));
  const OptionalTensor x = aligned(group.x);
  const ScalarType dtype = dy[0].scalar_type();
  const int64_t size = bytes_of(dtype_of(dtype)), most = workspace_bytes();
  const bool need_dx = group.need_dx, need_dB = !group.S.empty();
  Tensor dx = empty(need_dx ? with_last(x ? *x : dy[0], K) : std::vector<int64_t>{0}, dtype, dy[0]);
  Tensors dA, dB;
  const Tensor T = empty({M, R}, dtype, dy[0]);

  std::vector<TallSkinny> over_dy;
  std::vector<OptionalTensor> S(count);
  int64_t floats = 0;
  for (size_t i = 0; i < count; ++i) {
    dA.push_back(gradient_of(layers.A[i], x.has_value(), dy[i]));
    dB.push_back(gradient_of(layers.B[i], need_dB, dy[i]));
    if (need_dB) S[i] = contiguous_view(group.S[i]);
    void* const own = static_cast<char*>(T.mutable_data_ptr()) + size * layers.first_rank[i];
    over_dy.push_back(pass_over_dy(dy[i], layers.B[i], group.scaling, shapes[i], own, S[i], dB[i]));
    over_dy[i].P_stride = R;
    floats = std::max(floats, tall_skinny_workspace(over_dy[i]));
  }
  TallSkinny for_dA{};
  if (x) {
    for_dA = pass_for_dA(*x, T.const_data_ptr(), group.scaling, Dropout(Adapter{}), layers.all, dA[0]);
    layers.divide(for_dA);
    for (size_t i = 0; i < count; ++i) for_dA.G[i] = dA[i].mutable_data_ptr();
    floats = std::max(floats, tall_skinny_workspace(for_dA));
  }

  std::vector<int64_t> steps;
  std::vector<std::optional<KeptWeight>> kept;
  int64_t bytes_of_W = 0;
  for (size_t i = 0; i < count && need_dx; ++i) {
    kept.push_back(take_kept_weight(weight_of(group, i), 0, dtype, stream));
    steps.push_back(step_of(K, size * shapes[i].N, most));
    if (!kept[i]) bytes_of_W = std::max(bytes_of_W, size * shapes[i].N * std::min(steps[i], K));
  }
  Workspace workspace;
  const int64_t at_W = workspace.add(bytes_of_W), at_sums = workspace.add(4 * floats);
  workspace.allocate(dy[0]);

  for (TallSkinny& pass : over_dy) {
    pass.workspace = workspace.at<float>(at_sums);
    require_launched(kBackward, tall_skinny(pass, stream));
  }
  if (x) {
    for_dA.workspace = workspace.at<float>(at_sums);
    require_launched(kBackward, tall_skinny(for_dA, stream));
  }
  if (!need_dx) return {dx, dA, dB};

  TallSkinny term{};
  term.dtype = dtype_of(dtype), term.P[0] = T.mutable_data_ptr();
  term.M = M, term.R = R;
  layers.divide(term);
  term.expansion = expansion_of(layers.A[0], false, std::nullopt, group.scaling, dx);
  for (size_t i = 0; i < count; ++i) term.expansion.E[i] = layers.A[i].const_data_ptr();
  require_launched(kBackward, expand(term, stream));
  for (size_t i = 0; i < count; ++i) {
    const int64_t N = shapes[i].N;
    const Matrix rows(dy[i], M, N, N);
    if (kept[i]) {
      const Matrix out{dx, M, K, K}, W{kept[i]->memory, N, K, kept[i]->stride};
      add_product(out, 1.0, out, rows, W);
      continue;
    }
    Slice slice = slice_of(dy[i], layers.weights[i], shapes[i], group.blocksize);
    slice.weight = workspace.at<void>(at_W);
    for (int64_t k = 0; k < K; k += steps[i]) {
      slice.k0 = k, slice.columns = slice.stride = std::min(steps[i], K - k);
      require_launched(kBackward, lora_slice(slice, stream));
      const Matrix columns{dx, M, slice.columns, K, 1, k};
      const Matrix W{workspace.memory(), N, slice.columns, slice.columns, 1, at_W / size};
      add_product(columns, 1.0, columns, rows, W);
    }
  }
  return {dx, dA, dB};
}

}  // namespace nf4lora::cuda
