// Products of a matrix with panels that are filled while they are used, split over torch's threads.
//
// Rows are taken in chunks, so that a packed chunk and its partial sums stay in the second cache level; lanes are
// split evenly over the threads. Each result is summed by one thread in one fixed order, whatever the thread count.
#pragma once

#include <algorithm>

#include "instruction_set.h"
#include "tensors.h"

namespace nf4lora {

inline constexpr int64_t kRowChunk = 1020;   // rows of A at a time: a multiple of every tile's rows
inline constexpr int64_t kPanelSteps = 512;  // a panel of 64 lanes takes 128 KB

// Rows of a matrix, laid out as A tiles for any number of products.
class Tiles {
 public:
  enum class Source { rows, columns };

  // rows: element (i, k) is A[row + i, k]; columns: A[k, i].
  Tiles(const Gemm& gemm, const Dense& A, Source source, int64_t first, int64_t rows, int64_t depth)
      : gemm_(gemm),
        rows_(rows),
        depth_(depth),
        steps_((depth + gemm.step - 1) / gemm.step),
        stride_((steps_ + 1) * gemm.rows),
        memory_(count() * stride_) {
    torch::stable::parallel_for(0, count(), 1 + 4096 / (depth + 1), [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t row = tile * gemm.rows, valid = std::min<int64_t>(rows - row, gemm.rows);
        auto pack = source == Source::rows ? gemm.pack_rows : gemm.pack_columns;
        pack(A, source == Source::rows ? first + row : row, valid, source == Source::rows ? 0 : first, depth,
             memory_.get() + tile * stride_);
      }
    });
  }

  int64_t count() const { return (rows_ + gemm_.rows - 1) / gemm_.rows; }
  int64_t rows() const { return rows_; }
  int64_t depth() const { return depth_; }
  int64_t rows_in(int64_t tile) const { return std::min<int64_t>(rows_ - tile * gemm_.rows, gemm_.rows); }
  const uint32_t* at(int64_t tile, int64_t step) const { return memory_.get() + tile * stride_ + step * gemm_.rows; }

 private:
  const Gemm& gemm_;
  int64_t rows_, depth_, steps_, stride_;
  mutable Scratch<uint32_t> memory_;
};

// A strip of the result: all rows of the tiles, `lanes` columns from `first` on, of which `valid` exist.
struct Strip {
  float* sums;  // [tiles][gemm.rows][lanes]
  int64_t first;
  int64_t valid;
  int lanes;
};

// sums += tiles * B. `fill(first, valid, lanes, k, depth, panel)` lays out B's rows [k, k + depth).
template <class Fill>
void accumulate(const Gemm& gemm, const Tiles& tiles, const Strip& strip, uint32_t* panel, Fill&& fill) {
  const int64_t chunk = kPanelSteps * gemm.step;
  for (int64_t k = 0; k < tiles.depth(); k += chunk) {
    const int64_t depth = std::min(tiles.depth() - k, chunk);
    fill(strip.first, strip.valid, strip.lanes, k, depth, panel);
    const int64_t steps = (depth + gemm.step - 1) / gemm.step;
    for (int64_t tile = 0; tile < tiles.count(); ++tile) {
      gemm.tile(tiles.at(tile, k / gemm.step), panel, steps, strip.lanes, strip.sums + tile * gemm.rows * strip.lanes);
    }
  }
}

// Calls body(strip, panel) for strips that cover `columns`, each with zeroed sums for `tile_count` tiles.
template <class Body>
void for_strips(const Gemm& gemm, int64_t tile_count, int64_t columns, Body&& body) {
  const int64_t vectors = (columns + gemm.vector - 1) / gemm.vector, widest = gemm.max_lanes / gemm.vector;
  torch::stable::parallel_for(0, vectors, 1, [&](int64_t begin, int64_t end) {
    Scratch<float> sums(tile_count * gemm.rows * gemm.max_lanes);
    Scratch<uint32_t> panel(kPanelSteps * gemm.max_lanes);
    // Strips of equal width where one would be left over narrow: 5 vectors as 3 + 2, not 4 + 1.
    const int64_t strips = (end - begin + widest - 1) / widest;
    for (int64_t i = 0; i < strips; ++i) {
      const int64_t from = begin + (end - begin) * i / strips, to = begin + (end - begin) * (i + 1) / strips;
      Strip strip{sums.get(), from * gemm.vector, 0, static_cast<int>((to - from) * gemm.vector)};
      strip.valid = std::min<int64_t>(columns - strip.first, strip.lanes);
      std::fill_n(strip.sums, tile_count * gemm.rows * strip.lanes, 0.0f);
      body(strip, panel.get());
    }
  });
}

}  // namespace nf4lora
