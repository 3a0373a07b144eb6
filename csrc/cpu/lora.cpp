// lora on the CPU: the frozen NF4 linear layer with its LoRA branch, forward and backward.
//
// One pass over the packed weight per chunk of rows: a panel of W is decoded into cache and used for all of them. The
// LoRA branch starts the same sums, so it costs no pass of its own over y or dx. A few rows stream the weight instead. The
// loops are in isa/gemm.h and isa/few.h.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "../check/lora.h"
#include "absmax.h"
#include "dropout.h"
#include "product.h"

namespace nf4lora {
namespace {

// Rows of dy up to which reading the weight line by line matters more than keeping sums near.
constexpr int64_t kFewGradients = 48;
constexpr int64_t kMaxFloats = 16;   // lanes of the widest instruction set
constexpr int64_t kPartDepth = 512;  // terms of a sum that several threads share

Dense dense(const Tensor& matrix) {
  return {matrix.const_data_ptr(), dtype_of(matrix), matrix.dim() ? matrix.size(matrix.dim() - 1) : 1};
}

Tensor to_dtype(const Tensor& tensor, ScalarType dtype) {
  return contiguous_view(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

// Everything forward and backward need of the arguments, in the form that the loops take.
struct Layer {
  const Loops& isa;
  const Gemm& gemm;
  const Few& few;
  LinearShape shape;
  Tensor qweight, absmax;
  OptionalTensor nested, lora_A, lora_B;
  Packed W;
  Dropout dropout;
  DropoutMask mask;

  Layer(const LinearShape& shape_, Dtype dtype, const PackedTensors& weight, const Adapter& adapter)
      : isa(loops()),
        gemm(*isa.gemm[static_cast<int>(dtype)]),
        few(*isa.few[static_cast<int>(dtype)]),
        shape(shape_),
        qweight(contiguous_view(weight.qweight)),
        absmax(contiguous_view(weight.absmax)),
        nested(contiguous_view(weight.nested)),
        lora_A(contiguous_view(adapter.A)),
        lora_B(contiguous_view(adapter.B)),
        W{static_cast<const uint8_t*>(qweight.const_data_ptr()), scales_of(absmax, nested), shape.K, weight.blocksize},
        dropout(adapter),
        mask(isa, dropout, shape.K) {}

  // A and B are rounded once to x's dtype.
  void round_lora(ScalarType dtype) {
    if (!lora_A) return;
    lora_A = to_dtype(*lora_A, dtype);
    lora_B = to_dtype(*lora_B, dtype);
  }
};

// The low-rank product that starts the sums of a wide one: scale * (A B) for tiles A and a panel B that `fill` lays out.
template <class Fill>
struct LowRankStart {
  const Gemm& gemm;
  const Tiles* tiles;  // null without LoRA
  float scale;
  Fill fill;

  int64_t room() const { return tiles ? tiles->steps() * gemm.max_lanes : 0; }
  void open(const Strip& strip, uint32_t* panel) const {
    if (tiles) fill(strip.first, strip.valid, strip.lanes, 0, tiles->depth(), panel);
  }
  Start start(int64_t tile, const uint32_t* panel) const {
    return tiles ? Start{tiles->at(tile), panel, tiles->steps(), scale, nullptr, nullptr} : kFromZero;
  }
};
template <class Fill>
LowRankStart(const Gemm&, const Tiles*, float, Fill) -> LowRankStart<Fill>;

// Few rows: x W^T with k along the lanes, every row of W streamed once.
void forward_few(const Layer& layer, const Dense& x, const Dense& masked, float scaling, const float* offsets,
                 const Output& S, const Output& y) {
  const Few& few = layer.few;
  const int64_t M = layer.shape.M, N = layer.shape.N, K = layer.shape.K, R = layer.shape.R;
  if (R) {
    torch::stable::parallel_for(0, R, 1 + (1 << 16) / (K * M + 1), [&](int64_t begin, int64_t end) {
      few.low_rank(masked, M, dense(*layer.lora_A), begin, end, K, static_cast<float>(layer.dropout.inverse_keep),
                   S.data, R);
    });
  }
  const auto rows = static_cast<int>(M);
  const int64_t stride = (R + kMaxFloats - 1) / kMaxFloats * kMaxFloats;
  Scratch<uint8_t> prepared(few.size(rows, K));
  Scratch<float> scaled(kMostFewRows * stride);
  few.prepare(x, rows, K, prepared.get());
  std::fill_n(scaled.get(), kMostFewRows * stride, 0.0f);
  for (int64_t row = 0; row < M && R; ++row) {
    const auto* values = static_cast<const uint8_t*>(S.data) + row * R * bytes_of(S.dtype);
    layer.isa.widen(values, scaling, R, S.dtype, scaled.get() + row * stride);
  }
  Scratch<float> lanes(R * kMostFewRows);
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t row = 0; row < kMostFewRows; ++row) {
      lanes.get()[r * kMostFewRows + row] = scaled.get()[row * stride + r];
    }
  }
  const LowRank low = {scaled.get(), stride, lanes.get(), R ? dense(*layer.lora_B) : Dense{}, R};
  // Every thread starts on a cache line of y, and a thread is worth waking for 2^16 weights.
  const int64_t unit = 32, grain = 1 + (1 << 16) / (unit * K + 1);
  torch::stable::parallel_for(0, (N + unit - 1) / unit, grain, [&](int64_t begin, int64_t end) {
    few.multiply(layer.W, begin * unit, std::min(end * unit, N), prepared.get(), rows, low, offsets, y.data, N);
  });
}

std::tuple<Tensor, Tensor> lora_linear(const LoraLinear& arguments) {
  const LinearShape shape = check_lora_linear(arguments);
  const int64_t M = shape.M, N = shape.N, K = shape.K, R = shape.R;
  const Tensor in = contiguous_view(arguments.x);
  const ScalarType scalar_type = in.scalar_type();
  const Dtype dtype = dtype_of(scalar_type);
  Layer layer(shape, dtype, arguments.weight, arguments.adapter);
  const Gemm& gemm = layer.gemm;
  const DropoutMask& mask = layer.mask;
  const auto scaling = static_cast<float>(arguments.adapter.scaling);

  Tensor y = empty(with_last(in, N), scalar_type, in);
  Tensor S = empty({M, R}, scalar_type, in);
  OptionalTensor bias;
  if (arguments.bias) bias = to_dtype(*arguments.bias, ScalarType::Float);
  const float* offsets = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  const Dense rows = {in.const_data_ptr(), dtype, K};
  const Output low_rank = {S.mutable_data_ptr(), dtype, R}, out = {y.mutable_data_ptr(), dtype, N};

  if (M && M <= layer.few.rows) {
    Scratch<uint8_t> masked = mask.masked_rows(rows, 0, mask.active() ? M : 0);
    const Dense kept = mask.active() ? Dense{masked.get(), dtype, K} : rows;
    forward_few(layer, rows, kept, scaling, offsets, low_rank, out);
    return {y, S};
  }

  layer.round_lora(scalar_type);
  std::unique_ptr<Panels> panels_A;
  if (R && M) {
    panels_A =
        std::make_unique<Panels>(gemm, R, K, [&](auto... where) { gemm.panel_rows(dense(*layer.lora_A), where...); });
  }
  for_row_chunks(M, gemm.rows, [&](int64_t first, int64_t count) {
    const Tiles tiles(gemm, rows, Tiles::Source::rows, first, count, K);
    std::unique_ptr<Tiles> tiles_S;
    if (R) {
      const auto inverse_keep = static_cast<float>(layer.dropout.inverse_keep);
      if (mask.active()) {
        Scratch<uint8_t> masked = mask.masked_rows(rows, first, count);
        const Tiles masked_tiles(gemm, {masked.get(), dtype, K}, Tiles::Source::rows, 0, count, K);
        panels_A->product_by_rows(masked_tiles, inverse_keep, low_rank, first);
      } else {
        panels_A->product_by_rows(tiles, inverse_keep, low_rank, first);
      }
      tiles_S = std::make_unique<Tiles>(gemm, low_rank, Tiles::Source::rows, first, count, R);
    }
    const LowRankStart low{gemm, tiles_S.get(), scaling,
                           [&](auto... where) { gemm.panel_rows(dense(*layer.lora_B), where...); }};
    product_by_strips(
        gemm, tiles, N, Order::strips, low.room() + gemm.max_lanes,
        [&](auto... where) { gemm.panel_nf4_rows(layer.W, where...); },
        [&](const Strip& strip, uint32_t* room) {
          low.open(strip, room);
          if (!offsets) return;
          auto* values = reinterpret_cast<float*>(room + low.room());
          std::fill_n(std::copy_n(offsets + strip.first, strip.valid, values), strip.lanes - strip.valid, 0.0f);
        },
        [&](const Strip&, int64_t tile, const uint32_t* room) {
          Start start = low.start(tile, room);
          if (offsets) start.offset = reinterpret_cast<const float*>(room + low.room());
          return start;
        },
        rounded_into(gemm, tiles, out, first, 1.0f));
  });
  return {y, S};
}

// out[R, columns] += scale * tiles^T-product, or its transpose into [columns, R]. `fill` lays out the wide operand.
template <class Fill>
void add_outer(const Gemm& gemm, const Tiles& tiles, int64_t columns, float scale, bool transposed, float* out,
               Fill&& fill) {
  const int64_t R = tiles.rows();
  product_by_strips(
      gemm, tiles, columns, Order::strips, 0, fill, [](const Strip&, uint32_t*) {},
      [](const Strip&, int64_t, const uint32_t*) { return kFromZero; },
      [&](const Strip& strip, int64_t tile, const float* sums) {
        for (int64_t row = 0; row < tiles.rows_in(tile); ++row) {
          const int64_t r = tile * gemm.rows + row;
          for (int64_t lane = 0; lane < strip.valid; ++lane) {
            const int64_t column = strip.first + lane;
            out[transposed ? column * R + r : r * columns + column] += scale * sums[row * strip.lanes + lane];
          }
        }
      });
}

// out = scale * A B for a few long rows of A, [rows, depth] float32, and B [depth, columns]: the depth in parts of one
// size, whatever the number of threads, each summed by one of them, and then the parts in their order.
void combine_parts(const Layer& layer, const float* A, int64_t rows, const Dense& B, int64_t depth, int64_t columns,
                   float scale, const Output& out) {
  const int64_t parts = (depth + kPartDepth - 1) / kPartDepth, size = rows * columns;
  Scratch<float> sums(parts * size);
  torch::stable::parallel_for(0, parts, 1 + (1 << 16) / (kPartDepth * size + 1), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * kPartDepth;
      const auto* data = static_cast<const uint8_t*>(B.data) + first * B.stride * bytes_of(B.dtype);
      layer.few.combine(A + first, 1, depth, {data, B.dtype, B.stride}, 0, rows, std::min(depth - first, kPartDepth),
                        columns, 1.0f, Output{sums.get() + part * size, Dtype::f32, columns});
    }
  });
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t i = 0; i < size; ++i) sums.get()[i] += sums.get()[part * size + i];
  }
  layer.few.round(sums.get(), scale, size, out.data);
}

// combine() of a matrix with few rows, on torch's threads: of A's columns, or with `transposed` of its rows.
void combine_few(const Layer& layer, const Dense& A, int64_t rows, bool transposed, const Dense& B, int64_t columns,
                 float scale, const Output& out) {
  Scratch<float> wide(rows * A.stride);
  layer.isa.widen(A.data, 1.0f, rows * A.stride, A.dtype, wide.get());
  const int64_t depth = transposed ? A.stride : rows, along = transposed ? 1 : A.stride, across = A.stride + 1 - along;
  if (transposed && depth > kPartDepth) {
    combine_parts(layer, wide.get(), rows, B, depth, columns, scale, out);
    return;
  }
  const int64_t grain = 1 + (1 << 16) / (depth * columns + 1);
  torch::stable::parallel_for(0, transposed ? rows : A.stride, grain, [&](int64_t begin, int64_t end) {
    layer.few.combine(wide.get(), along, across, B, begin, end, depth, columns, scale, out);
  });
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(const LoraLinearBackward& arguments) {
  const LinearShape shape = check_lora_linear_backward(arguments);
  const int64_t M = shape.M, N = shape.N, K = shape.K, R = shape.R;
  const OptionalTensor &x = arguments.x, &S = arguments.S;
  const Tensor& dy = arguments.dy;
  const bool need_dx = arguments.need_dx;
  const bool need_dA = R && x, need_dB = R && S, need_T = R && (need_dx || need_dA);
  const Tensor grad = contiguous_view(dy);
  const Tensor in = need_dA ? contiguous_view(*x) : grad, low_rank = need_dB ? contiguous_view(*S) : grad;
  const Dtype dtype = dtype_of(grad);
  Layer layer(shape, dtype, arguments.weight, arguments.adapter);
  layer.round_lora(dy.scalar_type());
  const Gemm& gemm = layer.gemm;
  const DropoutMask& mask = layer.mask;
  const double scaling = arguments.adapter.scaling;
  const auto scale_dx = static_cast<float>(scaling * layer.dropout.inverse_keep);

  const auto dx_shape = need_dx ? with_last(x ? *x : dy, K) : std::vector<int64_t>{0};
  Tensor dx = empty(dx_shape, dy.scalar_type(), grad);
  const auto zeros = [&](bool needed, int64_t rows, int64_t columns) {
    return torch::stable::new_zeros(grad, needed ? std::vector<int64_t>{rows, columns} : std::vector<int64_t>{0},
                                    ScalarType::Float);
  };
  Tensor dA = zeros(need_dA, R, K), dB = zeros(need_dB, N, R);
  const Dense rows = {in.const_data_ptr(), dtype, K}, grads = {grad.const_data_ptr(), dtype, N};
  const Dense S_rows = {low_rank.const_data_ptr(), dtype, R};
  const Output out = {dx.mutable_data_ptr(), dtype, K};
  auto* out_A = static_cast<float*>(dA.mutable_data_ptr());
  auto* out_B = static_cast<float*>(dB.mutable_data_ptr());

  const bool few = M <= layer.few.rows;
  std::unique_ptr<Panels> panels_B;
  if (need_T && M && !few) {
    panels_B = std::make_unique<Panels>(gemm, R, N,
                                        [&](auto... where) { gemm.panel_columns(dense(*layer.lora_B), where...); });
  }
  for_row_chunks(M, gemm.rows, [&](int64_t first, int64_t count) {
    const bool wanted = need_dx || (need_T && !few);
    const Tiles tiles(gemm, grads, Tiles::Source::rows, first, wanted ? count : 0, N);
    Scratch<uint8_t> T_memory(need_T ? count * R * bytes_of(dtype) : 0);
    const Output T = {T_memory.get(), dtype, R};
    if (need_T && few) combine_few(layer, grads, M, true, dense(*layer.lora_B), R, 1.0f, T);
    if (need_T && !few) panels_B->product_by_rows(tiles, 1.0f, T, 0);
    if (need_dx) {
      std::unique_ptr<Tiles> tiles_T;
      if (R) tiles_T = std::make_unique<Tiles>(gemm, T, Tiles::Source::rows, 0, count, R);
      const LowRankStart low{gemm, tiles_T.get(), scale_dx,
                             [&](auto... where) { gemm.panel_columns(dense(*layer.lora_A), where...); }};
      product_by_strips(
          gemm, tiles, K, count <= kFewGradients ? Order::depth : Order::strips,
          low.room() + gemm.rows * gemm.max_lanes, [&](auto... where) { gemm.panel_nf4_columns(layer.W, where...); },
          [&](const Strip& strip, uint32_t* room) { low.open(strip, room); },
          [&](const Strip& strip, int64_t tile, uint32_t* room) {
            Start start = low.start(tile, room);
            if (!mask.active()) return start;
            uint32_t* keep = room + low.room();
            std::fill_n(keep, gemm.rows * strip.lanes, 0u);
            for (int64_t row = 0; row < tiles.rows_in(tile); ++row) {
              mask.keep(first + tile * gemm.rows + row, strip.first, strip.valid, keep + row * strip.lanes);
            }
            start.keep = keep;
            return start;
          },
          rounded_into(gemm, tiles, out, first, 1.0f));
    }
    if (need_dB && few) {
      combine_few(layer, grads, M, false, S_rows, R, static_cast<float>(scaling), {out_B, Dtype::f32, R});
    } else if (need_dB) {
      const Tiles S_columns(gemm, S_rows, Tiles::Source::columns, first, R, count);
      add_outer(gemm, S_columns, N, static_cast<float>(scaling), true, out_B,
                [&](int64_t n, int64_t valid, int lanes, int64_t k, int64_t depth, void* panel) {
                  gemm.panel_columns(grads, n, valid, lanes, first + k, depth, panel);
                });
    }
    if (!need_dA) return;
    Scratch<uint8_t> masked = mask.masked_rows(rows, first, mask.active() ? count : 0);
    const Dense wide = mask.active() ? Dense{masked.get(), dtype, K} : rows;
    const int64_t offset = mask.active() ? 0 : first;
    if (few) {
      combine_few(layer, T, M, false, wide, K, scale_dx, {out_A, Dtype::f32, K});
      return;
    }
    const Tiles T_columns(gemm, T, Tiles::Source::columns, 0, R, count);
    add_outer(gemm, T_columns, K, scale_dx, false, out_A,
              [&](int64_t n, int64_t valid, int lanes, int64_t k, int64_t depth, void* panel) {
                gemm.panel_columns(wide, n, valid, lanes, offset + k, depth, panel);
              });
  });
  if (need_dA) dA = to_dtype(dA, arguments.adapter.A->scalar_type());
  if (need_dB) dB = to_dtype(dB, arguments.adapter.B->scalar_type());
  return {dx, dA, dB};
}

// A group is each of its layers in turn.
std::tuple<Tensors, Tensors> lora_linear_group(const LoraLinearGroup& group) {
  check_lora_linear_group(group);
  Tensors ys, Ss;
  for (size_t i = 0; i < group.size(); ++i) {
    const auto [y, S] = lora_linear(group.layer(i));
    ys.push_back(y), Ss.push_back(S);
  }
  return {ys, Ss};
}

// dx is summed as autograd sums it: the gradient of the layer that was called last comes first.
std::tuple<Tensor, Tensors, Tensors> lora_linear_group_backward(const LoraLinearGroupBackward& group) {
  check_lora_linear_group_backward(group);
  const size_t count = group.size();
  Tensors dAs(count), dBs(count);
  OptionalTensor sum;
  for (size_t i = count; i-- > 0;) {
    const auto [dx, dA, dB] = lora_linear_backward(group.layer(i));
    dAs[i] = dA, dBs[i] = dB;
    sum = sum && group.need_dx ? sum_of(*sum, dx) : dx;
  }
  return {*sum, dAs, dBs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nf4lora, CPU, m) {
  m.impl("lora_linear", TORCH_BOX((&LoraLinear::op<&lora_linear>)));
  m.impl("lora_linear_backward", TORCH_BOX((&LoraLinearBackward::op<&lora_linear_backward>)));
  m.impl("lora_linear_group", TORCH_BOX((&LoraLinearGroup::op<&lora_linear_group>)));
  m.impl("lora_linear_group_backward", TORCH_BOX((&LoraLinearGroupBackward::op<&lora_linear_group_backward>)));
}

}  // namespace nf4lora
