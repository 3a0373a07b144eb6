// lora on the CPU: the frozen NF4 linear layer with its LoRA branch, forward and backward.
//
// One pass over the packed weight per chunk of rows: a panel of W is decoded into cache and used for all of them. The
// LoRA branch starts the same sums, so it costs no pass of its own over y or dx. The loops are in isa/gemm.h.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "absmax.h"
#include "product.h"

namespace nf4lora {
namespace {

Dense dense(const Tensor& matrix) {
  return {matrix.const_data_ptr(), dtype_of(matrix), matrix.dim() ? matrix.size(matrix.dim() - 1) : 1};
}

Tensor to_dtype(const Tensor& tensor, ScalarType dtype) {
  return contiguous_view(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

// The dropout mask over [M, K]: 1 where kept. Nothing is stored; a seed and an index give every element.
struct Dropout {
  const Loops& isa;
  double probability;
  uint64_t seed;
  int64_t K;

  bool active() const { return probability > 0.0; }
  double inverse_keep() const { return active() ? 1.0 / (1.0 - probability) : 1.0; }
  void keep(int64_t row, int64_t column, int64_t count, float* out) const {
    isa.dropout_mask(seed, dropout_threshold(probability), row * K + column, count, out);
  }
};

Dropout dropout_of(const Loops& isa, double probability, const OptionalTensor& seed, const LinearShape& shape) {
  const bool active = probability > 0.0 && shape.R > 0;
  return {isa, active ? probability : 0.0,
          active ? *static_cast<const uint64_t*>(contiguous_view(*seed).const_data_ptr()) : 0, shape.K};
}

// x with the dropped elements zeroed, for rows [first, first + rows): [rows, K] of x's dtype.
Scratch<uint8_t> masked_rows(const Loops& isa, const Dropout& dropout, const Dense& x, int64_t first, int64_t rows) {
  const int64_t K = dropout.K, row_bytes = K * bytes_of(x.dtype);
  Scratch<uint8_t> out(rows * row_bytes);
  const auto* source = static_cast<const uint8_t*>(x.data) + first * row_bytes;
  uint8_t* target = out.get();
  torch::stable::parallel_for(0, rows, 1 + 4096 / K, [&](int64_t begin, int64_t end) {
    Scratch<float> keep(K);
    for (int64_t row = begin; row < end; ++row) {
      dropout.keep(first + row, 0, K, keep.get());
      isa.multiply(source + row * row_bytes, keep.get(), K, x.dtype, target + row * row_bytes);
    }
  });
  return out;
}

// All of a [depth, columns] operand as panels, for a product with few columns (the rank).
class Panels {
 public:
  template <class Fill>
  Panels(const Gemm& gemm, int64_t columns, int64_t depth, Fill&& fill) : gemm_(gemm), columns_(columns) {
    steps_ = (depth + gemm.step - 1) / gemm.step;
    const int64_t vectors = (columns + gemm.vector - 1) / gemm.vector;
    memory_ = std::make_unique<Scratch<uint32_t>>(vectors * gemm.vector * steps_);
    for (int64_t first = 0; first < columns; first += gemm.max_lanes) {
      const int64_t chunk = kPanelSteps * gemm.step;
      torch::stable::parallel_for(0, (depth + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin * chunk; k < std::min(depth, end * chunk); k += chunk) {
          fill(first, std::min<int64_t>(columns - first, lanes(first)), lanes(first), k, std::min(chunk, depth - k),
               memory_->get() + first * steps_ + k / gemm.step * lanes(first));
        }
      });
    }
  }

  int lanes(int64_t first) const {
    const int64_t rest = (columns_ - first + gemm_.vector - 1) / gemm_.vector * gemm_.vector;
    return static_cast<int>(std::min<int64_t>(rest, gemm_.max_lanes));
  }

  // out[first_row + i, :] = round(scale * tiles * panels): [rows, columns] of a dtype. Split over rows.
  void multiply(const Loops& isa, const Tiles& tiles, float scale, const Dense& out, int64_t first_row) const {
    auto* data = static_cast<uint8_t*>(const_cast<void*>(out.data));
    torch::stable::parallel_for(0, tiles.count(), 1, [&](int64_t begin, int64_t end) {
      Scratch<float> sums(gemm_.rows * gemm_.max_lanes);
      for (int64_t tile = begin; tile < end; ++tile) {
        for (int64_t first = 0; first < columns_; first += gemm_.max_lanes) {
          const int width = lanes(first);
          std::fill_n(sums.get(), gemm_.rows * width, 0.0f);
          gemm_.tile(tiles.at(tile, 0), memory_->get() + first * steps_, steps_, width, sums.get());
          for (int64_t r = 0; r < tiles.rows_in(tile); ++r) {
            const int64_t at = (first_row + tile * gemm_.rows + r) * out.stride + first;
            isa.store(sums.get() + r * width, scale, std::min<int64_t>(width, columns_ - first), out.dtype,
                      data + at * bytes_of(out.dtype));
          }
        }
      }
    });
  }

 private:
  const Gemm& gemm_;
  int64_t columns_, steps_;
  std::unique_ptr<Scratch<uint32_t>> memory_;
};

// Everything forward and backward need of the arguments, in the form that the loops take.
struct Layer {
  const Loops& isa;
  const Gemm& gemm;
  LinearShape shape;
  Tensor qweight, absmax;
  OptionalTensor lora_A, lora_B;  // rounded once to x's dtype
  Packed W;

  Layer(const LinearShape& shape_, const Tensor& x, const Tensor& qweight_, const Tensor& absmax_,
        const OptionalTensor& nested, const OptionalTensor& A, const OptionalTensor& B, int64_t blocksize)
      : isa(loops()),
        gemm(*isa.gemm[static_cast<int>(dtype_of(x))]),
        shape(shape_),
        qweight(contiguous_view(qweight_)),
        absmax(decoded_absmax(absmax_, nested)) {
    if (A) {
      lora_A = to_dtype(*A, x.scalar_type());
      lora_B = to_dtype(*B, x.scalar_type());
    }
    W = {static_cast<const uint8_t*>(qweight.const_data_ptr()), static_cast<const float*>(absmax.const_data_ptr()),
         shape.K, blocksize};
  }
};

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& qweight, const Tensor& absmax,
                                       const OptionalTensor& nested, const OptionalTensor& bias,
                                       const OptionalTensor& lora_A, const OptionalTensor& lora_B, double scaling,
                                       double probability, const OptionalTensor& seed, int64_t blocksize) {
  const LinearShape shape =
      check_lora_linear("lora_linear", x, qweight, absmax, nested, bias, lora_A, lora_B, probability, seed, blocksize);
  const int64_t M = shape.M, N = shape.N, K = shape.K, R = shape.R;
  const Tensor in = contiguous_view(x);
  const Layer layer(shape, in, qweight, absmax, nested, lora_A, lora_B, blocksize);
  const Loops& isa = layer.isa;
  const Gemm& gemm = layer.gemm;
  const Dropout dropout = dropout_of(isa, probability, seed, shape);

  std::vector<int64_t> out_shape(in.sizes().begin(), in.sizes().end());
  out_shape.back() = N;
  Tensor y = torch::stable::new_empty(in, out_shape, x.scalar_type());
  Tensor S = torch::stable::new_empty(in, {M, R}, x.scalar_type());
  const Tensor offset = bias ? to_dtype(*bias, ScalarType::Float) : S;
  const float* offsets = bias ? static_cast<const float*>(offset.const_data_ptr()) : nullptr;
  const Dense rows = {in.const_data_ptr(), dtype_of(in), K}, low_rank = {S.const_data_ptr(), dtype_of(in), R};
  auto* out = static_cast<uint8_t*>(y.mutable_data_ptr());

  std::unique_ptr<Panels> panels_A;
  if (R && M) {
    panels_A =
        std::make_unique<Panels>(gemm, R, K, [&](auto... where) { gemm.panel_rows(dense(*layer.lora_A), where...); });
  }
  for (int64_t first = 0; first < M; first += kRowChunk) {
    const int64_t count = std::min(M - first, kRowChunk);
    const Tiles tiles(gemm, rows, Tiles::Source::rows, first, count, K);
    std::unique_ptr<Tiles> tiles_S;
    if (R) {
      const auto inverse_keep = static_cast<float>(dropout.inverse_keep());
      if (dropout.active()) {
        Scratch<uint8_t> masked = masked_rows(isa, dropout, rows, first, count);
        const Tiles masked_tiles(gemm, {masked.get(), rows.dtype, K}, Tiles::Source::rows, 0, count, K);
        panels_A->multiply(isa, masked_tiles, inverse_keep, low_rank, first);
      } else {
        panels_A->multiply(isa, tiles, inverse_keep, low_rank, first);
      }
      tiles_S = std::make_unique<Tiles>(gemm, low_rank, Tiles::Source::rows, first, count, R);
    }
    for_strips(gemm, tiles.count(), N, [&](const Strip& strip, uint32_t* panel) {
      const int64_t size = tiles.count() * gemm.rows * strip.lanes;
      if (R) {
        accumulate(gemm, *tiles_S, strip, panel,
                   [&](auto... where) { gemm.panel_rows(dense(*layer.lora_B), where...); });
        for (int64_t i = 0; i < size; ++i) strip.sums[i] *= static_cast<float>(scaling);
      }
      if (offsets) {
        for (int64_t i = 0; i < size; ++i) {
          const int64_t lane = i % strip.lanes;
          if (lane < strip.valid) strip.sums[i] += offsets[strip.first + lane];
        }
      }
      accumulate(gemm, tiles, strip, panel, [&](auto... where) { gemm.panel_nf4_rows(layer.W, where...); });
      for (int64_t row = 0; row < count; ++row) {
        isa.store(strip.sums + row * strip.lanes, 1.0f, strip.valid, rows.dtype,
                  out + ((first + row) * N + strip.first) * bytes_of(rows.dtype));
      }
    });
  }
  return {y, S};
}

// out[R, columns] += scale * tiles^T-product, or its transpose into [columns, R]. `fill` lays out the wide operand.
template <class Fill>
void add_outer(const Gemm& gemm, const Tiles& tiles, int64_t columns, float scale, bool transposed, float* out,
               Fill&& fill) {
  const int64_t R = tiles.rows();
  for_strips(gemm, tiles.count(), columns, [&](const Strip& strip, uint32_t* panel) {
    accumulate(gemm, tiles, strip, panel, fill);
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t lane = 0; lane < strip.valid; ++lane) {
        const int64_t column = strip.first + lane;
        out[transposed ? column * R + r : r * columns + column] += scale * strip.sums[r * strip.lanes + lane];
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& S,
                                                        const Tensor& qweight, const Tensor& absmax,
                                                        const OptionalTensor& nested, const OptionalTensor& lora_A,
                                                        const OptionalTensor& lora_B, double scaling,
                                                        double probability, const OptionalTensor& seed,
                                                        int64_t blocksize, bool need_dx) {
  const LinearShape shape =
      check_lora_linear_backward(dy, x, S, qweight, absmax, nested, lora_A, lora_B, probability, seed, blocksize);
  const int64_t M = shape.M, N = shape.N, K = shape.K, R = shape.R;
  const Tensor grad = contiguous_view(dy), in = contiguous_view(x), low_rank = contiguous_view(S);
  const Layer layer(shape, in, qweight, absmax, nested, lora_A, lora_B, blocksize);
  const Loops& isa = layer.isa;
  const Gemm& gemm = layer.gemm;
  const Dropout dropout = dropout_of(isa, probability, seed, shape);
  const auto scale_dx = static_cast<float>(scaling * dropout.inverse_keep());

  Tensor dx = need_dx ? torch::stable::new_empty(in, in.sizes(), x.scalar_type())
                      : torch::stable::new_empty(in, {0}, x.scalar_type());
  Tensor dA = torch::stable::new_zeros(in, R ? std::vector<int64_t>{R, K} : std::vector<int64_t>{0}, ScalarType::Float);
  Tensor dB = torch::stable::new_zeros(in, R ? std::vector<int64_t>{N, R} : std::vector<int64_t>{0}, ScalarType::Float);
  const Dense rows = {in.const_data_ptr(), dtype_of(in), K}, grads = {grad.const_data_ptr(), dtype_of(in), N};
  const Dense S_rows = {low_rank.const_data_ptr(), dtype_of(in), R};
  auto* out = static_cast<uint8_t*>(dx.mutable_data_ptr());
  auto* out_A = static_cast<float*>(dA.mutable_data_ptr());
  auto* out_B = static_cast<float*>(dB.mutable_data_ptr());

  std::unique_ptr<Panels> panels_B;
  if (R && M) {
    panels_B = std::make_unique<Panels>(gemm, R, N,
                                        [&](auto... where) { gemm.panel_columns(dense(*layer.lora_B), where...); });
  }
  for (int64_t first = 0; first < M; first += kRowChunk) {
    const int64_t count = std::min(M - first, kRowChunk);
    const Tiles tiles(gemm, grads, Tiles::Source::rows, first, count, N);
    Scratch<uint8_t> T_memory(count * R * bytes_of(rows.dtype));
    const Dense T = {T_memory.get(), rows.dtype, R};
    std::unique_ptr<Tiles> tiles_T;
    if (R) {
      panels_B->multiply(isa, tiles, 1.0f, T, 0);
      tiles_T = std::make_unique<Tiles>(gemm, T, Tiles::Source::rows, 0, count, R);
    }
    if (need_dx) {
      for_strips(gemm, tiles.count(), K, [&](const Strip& strip, uint32_t* panel) {
        if (R) {
          accumulate(gemm, *tiles_T, strip, panel,
                     [&](auto... where) { gemm.panel_columns(dense(*layer.lora_A), where...); });
          for (int64_t i = 0; i < tiles.count() * gemm.rows * strip.lanes; ++i) strip.sums[i] *= scale_dx;
        }
        if (dropout.active()) {
          Scratch<float> keep(strip.lanes);
          for (int64_t row = 0; row < count; ++row) {
            dropout.keep(first + row, strip.first, strip.valid, keep.get());
            for (int64_t i = 0; i < strip.valid; ++i) strip.sums[row * strip.lanes + i] *= keep.get()[i];
          }
        }
        accumulate(gemm, tiles, strip, panel, [&](auto... where) { gemm.panel_nf4_columns(layer.W, where...); });
        for (int64_t row = 0; row < count; ++row) {
          isa.store(strip.sums + row * strip.lanes, 1.0f, strip.valid, rows.dtype,
                    out + ((first + row) * K + strip.first) * bytes_of(rows.dtype));
        }
      });
    }
    if (R) {
      const Tiles S_columns(gemm, S_rows, Tiles::Source::columns, first, R, count);
      add_outer(gemm, S_columns, N, static_cast<float>(scaling), true, out_B,
                [&](int64_t n, int64_t valid, int lanes, int64_t k, int64_t depth, void* panel) {
                  gemm.panel_columns(grads, n, valid, lanes, first + k, depth, panel);
                });
      const Tiles T_columns(gemm, T, Tiles::Source::columns, 0, R, count);
      Scratch<uint8_t> masked = dropout.active() ? masked_rows(isa, dropout, rows, first, count) : Scratch<uint8_t>(0);
      const Dense wide = dropout.active() ? Dense{masked.get(), rows.dtype, K} : rows;
      const int64_t offset = dropout.active() ? 0 : first;
      add_outer(gemm, T_columns, K, scale_dx, false, out_A,
                [&](int64_t n, int64_t valid, int lanes, int64_t k, int64_t depth, void* panel) {
                  gemm.panel_columns(wide, n, valid, lanes, offset + k, depth, panel);
                });
    }
  }
  if (!R) return {dx, dA, dB};
  return {dx, to_dtype(dA, lora_A->scalar_type()), to_dtype(dB, lora_B->scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nf4lora, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
}

}  // namespace nf4lora
