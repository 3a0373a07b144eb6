// Products of a matrix with panels that are filled while they are used, split over torch's threads.
//
// Lanes are split evenly over the threads, and rows taken in chunks whose packed form stays in the caches. Each result
// is summed by one thread in one fixed order, whatever the thread count.
//
// Whoever knows BLIS: a tile is packed A (MR rows), a panel packed B (NR lanes), kPanelSteps is KC, kMostRows MC, and
// Gemm::begin and Gemm::add are the micro-kernel. Here B is packed by whoever needs it next, from codes of 4 bits.
#pragma once

#include <algorithm>

#include "../ceil_div.h"
#include "../tensors.h"
#include "instruction_set.h"
#include "memory.h"

namespace nf4lora {

inline constexpr int64_t kMostRows = 1536;  // of A at a time: decoding the weight again for more costs 1 % of a product
inline constexpr int64_t kPanelSteps = 512;  // a panel of 64 lanes takes 128 KB
inline constexpr int64_t kFewSteps = 64;     // of a panel when all strips take turns at it
inline constexpr Start kFromZero = {nullptr, nullptr, 0, 1.0f, nullptr, nullptr};

// A row-major matrix that a product writes, and a later one may read.
struct Output {
  void* data;  // [rows, stride]
  Dtype dtype;
  int64_t stride;  // elements from one row to the next

  operator Dense() const { return {data, dtype, stride}; }
};

// Calls body(first, rows) for chunks of nearly equal size.
template <class Body>
void for_row_chunks(int64_t rows, int64_t tile_rows, Body&& body) {
  const int64_t chunks = ceil_div(rows, kMostRows);
  const int64_t size = chunks ? round_up(ceil_div(rows, chunks), tile_rows) : 0;
  for (int64_t first = 0; first < rows; first += size) body(first, std::min(size, rows - first));
}

// Rows of a matrix, laid out as A tiles for any number of products.
class Tiles {
 public:
  enum class Source { rows, columns };

  // rows: element (i, k) is A[first + i, k]; columns: A[first + k, i].
  Tiles(const Gemm& gemm, const Dense& A, Source source, int64_t first, int64_t rows, int64_t depth)
      : gemm_(gemm),
        rows_(rows),
        depth_(depth),
        steps_(ceil_div(depth, gemm.step)),
        stride_((round_up(steps_, gemm.tile_steps) + 1) * gemm.rows),
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

  int64_t count() const { return ceil_div(rows_, gemm_.rows); }
  int64_t rows() const { return rows_; }
  int64_t depth() const { return depth_; }
  int64_t steps() const { return steps_; }
  int64_t rows_in(int64_t tile) const { return std::min<int64_t>(rows_ - tile * gemm_.rows, gemm_.rows); }
  const uint32_t* at(int64_t tile, int64_t step = 0) const {
    return memory_.get() + tile * stride_ + step * gemm_.rows;
  }

 private:
  const Gemm& gemm_;
  int64_t rows_, depth_, steps_, stride_;
  mutable Scratch<uint32_t> memory_;
};

// `lanes` columns of a result from `first` on, of which `valid` exist.
struct Strip {
  int64_t first;
  int64_t valid;
  int lanes;
};

// Columns in vectors [begin, end) as strips of nearly equal width: 5 vectors as 3 + 2, not 4 + 1.
class Strips {
 public:
  Strips(const Gemm& gemm, int64_t columns, int64_t begin, int64_t end)
      : gemm_(gemm), columns_(columns), begin_(begin), vectors_(end - begin) {}
  int64_t count() const {
    const int64_t widest = gemm_.max_lanes / gemm_.vector;
    return ceil_div(vectors_, widest);
  }
  Strip operator[](int64_t i) const {
    const int64_t from = begin_ + vectors_ * i / count(), to = begin_ + vectors_ * (i + 1) / count();
    const int64_t first = from * gemm_.vector;
    const auto lanes = static_cast<int>((to - from) * gemm_.vector);
    return {first, std::min<int64_t>(columns_ - first, lanes), lanes};
  }

 private:
  const Gemm& gemm_;
  int64_t columns_, begin_, vectors_;
};

// How the depth is walked. strips: a strip is finished before the next one begins; its sums stay near. depth: all strips
// take turns at a shallow slice, so that a weight whose rows run along the strips is read line by line.
enum class Order { strips, depth };

// tiles * B, column by column. For each strip
//   fill(first, valid, lanes, k, depth, panel)   lays out B's rows [k, k + depth),
//   open(strip, room)                            comes once, before the next two; `room` has `room_size` elements,
//   start(strip, tile, room)                     says what a tile's sums begin with,
//   finish(strip, tile, sums)                    gets them: [gemm.rows][strip.lanes].
template <class Fill, class Open, class Begin, class End>
void product_by_strips(const Gemm& gemm, const Tiles& tiles, int64_t columns, Order order, int64_t room_size,
                       Fill&& fill, Open&& open, Begin&& start, End&& finish) {
  const int64_t chunk = (order == Order::depth ? kFewSteps : kPanelSteps) * gemm.step;
  const bool once = tiles.depth() <= chunk;  // no sums wait for a second chunk: those of one tile are enough
  const int64_t strip_sums = (once ? 1 : tiles.count()) * gemm.rows * gemm.max_lanes;
  const int64_t vectors = ceil_div(columns, gemm.vector);
  torch::stable::parallel_for(0, vectors, 1, [&](int64_t begin, int64_t end) {
    const Strips strips(gemm, columns, begin, end);
    const int64_t together = order == Order::depth ? strips.count() : 1;
    Scratch<float> sums(together * strip_sums);
    Scratch<uint32_t> panel(chunk / gemm.step * gemm.max_lanes), room(room_size);
    const Entered entered(gemm);
    for (int64_t group = 0; group < strips.count(); group += together) {
      for (int64_t k = 0; k == 0 || k < tiles.depth(); k += chunk) {
        const int64_t depth = std::min(tiles.depth() - k, chunk), steps = ceil_div(depth, gemm.step);
        for (int64_t i = 0; i < together; ++i) {
          const Strip strip = strips[group + i];
          if (depth) fill(strip.first, strip.valid, strip.lanes, k, depth, panel.get());  // none in an empty row
          if (k == 0) open(strip, room.get());
          for (int64_t tile = 0; tile < tiles.count(); ++tile) {
            float* own = sums.get() + i * strip_sums + (once ? 0 : tile * gemm.rows * strip.lanes);
            const uint32_t* A = tiles.at(tile, k / gemm.step);
            if (k == 0) {
              gemm.begin(start(strip, tile, room.get()), A, panel.get(), steps, strip.lanes, own);
            } else {
              gemm.add(A, panel.get(), steps, strip.lanes, own);
            }
            if (k + depth == tiles.depth()) finish(strip, tile, own);
          }
        }
      }
    }
  });
}

// Rounds tiles into a matrix of the product's dtype, whose row `first_row` is row 0 of the tiles.
inline auto rounded_into(const Gemm& gemm, const Tiles& tiles, const Output& out, int64_t first_row, float scale) {
  return [&gemm, &tiles, out, first_row, scale](const Strip& strip, int64_t tile, const float* sums) {
    const int64_t at = (first_row + tile * gemm.rows) * out.stride + strip.first;
    void* data = static_cast<uint8_t*>(out.data) + at * bytes_of(out.dtype);
    gemm.finish({data, out.stride, tiles.rows_in(tile), strip.valid, scale}, strip.lanes, sums);
  };
}

// All of a [depth, columns] operand as panels, for a product with few columns (the rank).
class Panels {
 public:
  template <class Fill>
  Panels(const Gemm& gemm, int64_t columns, int64_t depth, Fill&& fill)
      : gemm_(gemm),
        columns_(columns),
        steps_(ceil_div(depth, gemm.step)),
        memory_(round_up(columns, gemm.vector) * steps_) {
    const int64_t chunk = kPanelSteps * gemm.step;
    torch::stable::parallel_for(0, ceil_div(depth, chunk), 1, [&](int64_t begin, int64_t end) {
      for (int64_t first = 0; first < columns; first += gemm.max_lanes) {
        for (int64_t k = begin * chunk; k < std::min(depth, end * chunk); k += chunk) {
          fill(first, std::min<int64_t>(columns - first, lanes(first)), lanes(first), k, std::min(chunk, depth - k),
               memory_.get() + first * steps_ + k / gemm.step * lanes(first));
        }
      }
    });
  }

  // Row first_row + i of `out` = round(scale * tiles * panels): [rows, columns] of the product's dtype. Split over rows.
  void product_by_rows(const Tiles& tiles, float scale, const Output& out, int64_t first_row) {
    const auto round = rounded_into(gemm_, tiles, out, first_row, scale);
    torch::stable::parallel_for(0, tiles.count(), 1 + 8192 / (steps_ + 1), [&](int64_t begin, int64_t end) {
      Scratch<float> sums(gemm_.rows * gemm_.max_lanes);
      const Entered entered(gemm_);
      for (int64_t tile = begin; tile < end; ++tile) {
        for (int64_t first = 0; first < columns_; first += gemm_.max_lanes) {
          const Strip strip{first, std::min<int64_t>(lanes(first), columns_ - first), lanes(first)};
          gemm_.begin(kFromZero, tiles.at(tile), memory_.get() + first * steps_, steps_, strip.lanes, sums.get());
          round(strip, tile, sums.get());
        }
      }
    });
  }

 private:
  int lanes(int64_t first) const {
    const int64_t rest = round_up(columns_ - first, gemm_.vector);
    return static_cast<int>(std::min<int64_t>(rest, gemm_.max_lanes));
  }

  const Gemm& gemm_;
  int64_t columns_, steps_;
  Scratch<uint32_t> memory_;
};

}  // namespace nf4lora
