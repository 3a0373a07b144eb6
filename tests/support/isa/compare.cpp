// Every entry of the tables of two instruction sets (csrc/cpu/isa/loops.h) beside each other: bit for bit where the
// result is defined to the bit, else within what summing in another order may change. Prints what differs.
// FIRST and SECOND are the sets' names.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa/loops.h"
#include "format.h"

#define JOIN(a, b) a##b
#define TABLE(name) JOIN(loops_, name)

namespace nf4lora {
const Loops& TABLE(FIRST)();
const Loops& TABLE(SECOND)();
}  // namespace nf4lora

using namespace nf4lora;

namespace {

const Loops* const sets[2] = {&TABLE(FIRST)(), &TABLE(SECOND)()};
const Dtype dtypes[3] = {Dtype::f32, Dtype::bf16, Dtype::f16};
const char* const dtype_names[3] = {"float32", "bfloat16", "float16"};
std::mt19937 generator(7);
int checks = 0, wrongs = 0;

void report(const std::string& name, bool right, const std::string& what) {
  ++checks;
  if (right) return;
  ++wrongs;
  std::printf("%s: %s\n", name.c_str(), what.c_str());
}

template <class T>
void expect_same(const std::string& name, const std::vector<T>& first, const std::vector<T>& second) {
  size_t at = 0;
  while (at < first.size() && !std::memcmp(&first[at], &second[at], sizeof(T))) ++at;
  report(name, at == first.size(), "differs first at " + std::to_string(at) + " of " + std::to_string(first.size()));
}

// Numbers of one dtype in memory.
struct Values {
  Values(Dtype dtype_, int64_t count) : dtype(dtype_), memory(static_cast<size_t>(count * size()), 0xFF) {}
  int64_t size() const { return dtype == Dtype::f32 ? 4 : 2; }
  void* at(int64_t i) { return memory.data() + i * size(); }
  std::vector<float> wide() const {
    std::vector<float> values(memory.size() / static_cast<size_t>(size()));
    sets[0]->widen(memory.data(), 1.0f, static_cast<int64_t>(values.size()), dtype, values.data());
    return values;
  }

  Dtype dtype;
  std::vector<uint8_t> memory;
};

std::vector<float> drawn_floats(int64_t count, float scale = 1.0f) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator) * scale;
  return values;
}
Values drawn(Dtype dtype, int64_t count, float scale = 1.0f) {
  const std::vector<float> floats = drawn_floats(count, scale);
  Values values(dtype, count);
  sets[0]->few[static_cast<int>(dtype)]->round(floats.data(), 1.0f, count, values.at(0));
  return values;
}

// Of a sum: half the distance of neighbours in the dtype, and a rounding of float32 for each term in any order.
double allowed(Dtype dtype, double value, double magnitudes, int64_t terms) {
  const double rounding = dtype == Dtype::f32 ? 0x1p-24 : dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-11;
  return std::fabs(value) * rounding + magnitudes * static_cast<double>(terms + 4) * 0x1p-23 + 0x1p-24;
}

// Sums of products in float64, and of their magnitudes.
struct Sum {
  double value = 0.0, magnitude = 0.0;
  void add(double product) { value += product, magnitude += std::fabs(product); }
  // a and b: `count` numbers, `a_step` and `b_step` apart.
  void add_products(const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t count, double scale) {
    for (int64_t i = 0; i < count; ++i) {
      add(scale * static_cast<double>(a[i * a_step]) * static_cast<double>(b[i * b_step]));
    }
  }
};

void expect_near(const std::string& name, const Values& got, const std::vector<Sum>& sums, int64_t terms) {
  const std::vector<float> values = got.wide();
  for (size_t i = 0; i < sums.size(); ++i) {
    const double value = values[i], wanted = sums[i].value;
    if (std::fabs(value - wanted) <= allowed(got.dtype, wanted, sums[i].magnitude, terms)) continue;
    return report(name, false, std::to_string(value) + " for " + std::to_string(wanted) + " at " + std::to_string(i));
  }
  report(name, true, "");
}

// A mode in which values below 2^-126 are zeros: what packs must not mind.
void flush_denormals(bool on) {
#if defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(on ? uint64_t{1} << 24 : 0) : "memory");
#else
  (void)on;
#endif
}

void nf4(Dtype dtype, int64_t blocksize) {
  const std::string name = std::string("nf4 ") + dtype_names[static_cast<int>(dtype)] + " " + std::to_string(blocksize);
  const int64_t blocks = 5, count = blocks * blocksize;
  for (const float scale : {1.0f, 1e-30f, 1e-39f, 0.0f}) {
    Values weight = drawn(dtype, count, scale);
    std::vector<uint8_t> codes[2];
    std::vector<float> absmax[2];
    for (const bool flush : {false, true}) {
      for (int s = 0; s < 2; ++s) {
        codes[s].assign(static_cast<size_t>(count / 2), 0xAA);
        absmax[s].assign(static_cast<size_t>(blocks), -1.0f);
        flush_denormals(flush);
        sets[s]->nf4_quantize(weight.at(0), dtype, 0, blocks, blocksize, codes[s].data(), absmax[s].data());
        flush_denormals(false);
      }
      expect_same(name + " codes", codes[0], codes[1]);
      expect_same(name + " absmax", absmax[0], absmax[1]);
    }
    for (const Dtype out : dtypes) {
      Values wide[2] = {{out, count}, {out, count}};
      for (int s = 0; s < 2; ++s) {
        sets[s]->nf4_dequantize(codes[0].data(), absmax[0].data(), 1, blocks, blocksize, out, false, wide[s].at(0));
      }
      expect_same(name + " decoded", wide[0].memory, wide[1].memory);
    }
    for (const float odd : {HUGE_VALF, -HUGE_VALF, NAN}) {
      sets[0]->few[static_cast<int>(dtype)]->round(&odd, 1.0f, 1, weight.at(3 * blocksize + 7));
      for (const Loops* set : sets) {
        const int64_t broken =
            set->nf4_quantize(weight.at(0), dtype, 0, blocks, blocksize, codes[1].data(), absmax[1].data());
        report(name + " of what is not finite", broken == 3, std::to_string(broken));
      }
    }
  }
}

// Weights half way between two codes.
void ties() {
  std::vector<float> weight(32, 1.0f);
  std::copy_n(kThresholdTree.value + 1, 15, weight.begin());
  std::vector<uint8_t> codes[2];
  for (int s = 0; s < 2; ++s) {
    float absmax = 0.0f;
    codes[s].resize(16);
    sets[s]->nf4_quantize(weight.data(), Dtype::f32, 0, 1, 32, codes[s].data(), &absmax);
  }
  expect_same("nf4 ties", codes[0], codes[1]);
}

void absmax() {
  const int64_t count = 2 * kNestedBlocksize + 77;
  for (const float scale : {1.0f, 1e-38f, 0.0f}) {
    std::vector<float> values = drawn_floats(count, scale);
    const volatile float eighth = scale / 8;
    const float offset = eighth;  // now, not while it would be a zero
    std::vector<uint8_t> codes[2];
    std::vector<float> nested[2], wide[2];
    for (int s = 0; s < 2; ++s) {
      codes[s].resize(static_cast<size_t>(count));
      nested[s].resize(4);
      flush_denormals(s == 1);
      sets[s]->absmax_quantize(values.data(), offset, 0, 3, count, nested[s].data(), codes[s].data());
      flush_denormals(false);
    }
    expect_same("absmax codes", codes[0], codes[1]);
    expect_same("absmax nested", nested[0], nested[1]);
    for (int s = 0; s < 2; ++s) {
      wide[s].assign(static_cast<size_t>(count), -1.0f);
      sets[s]->absmax_dequantize({nullptr, codes[0].data(), nested[0].data(), 0.25f}, 3, count - 2, wide[s].data());
    }
    expect_same("absmax decoded", wide[0], wide[1]);
  }
}

void adamw(Dtype dtype, bool eight_bits, int64_t count) {
  const std::string name = std::string("adamw ") + dtype_names[static_cast<int>(dtype)] + (eight_bits ? " 8" : " 32") +
                           " bits, " + std::to_string(count);
  const int64_t blocks = (count + kMomentBlocksize - 1) / kMomentBlocksize, moment = eight_bits ? 1 : 4;
  const Values param = drawn(dtype, count);
  std::vector<uint8_t> first[2], second[2];
  std::vector<float> largest[2];
  Values params[2] = {param, param};
  int64_t skipped[2] = {};
  for (int s = 0; s < 2; ++s) {
    first[s].assign(static_cast<size_t>(count * moment), eight_bits ? kNestedZero : 0);
    second[s].assign(static_cast<size_t>(count * moment), 0);
    largest[s].assign(static_cast<size_t>(2 * blocks), 0.0f);
  }
  for (int64_t step = 1; step <= 12; ++step) {
    Values grad = drawn(dtype, count, step == 5 ? 1e-20f : step > 8 ? 0.0f : 0.1f);
    const float odd = step == 3 ? HUGE_VALF : step == 4 ? NAN : 0.0f;
    if (odd != 0.0f) sets[0]->few[static_cast<int>(dtype)]->round(&odd, 1.0f, 1, grad.at(count / 2));
    const AdamW numbers = adamw_numbers(0.01, step % 2 ? 0.9 : 0.3, 0.999, 1e-8, 0.1, step);
    for (int s = 0; s < 2; ++s) {
      const AdamWValues values = {params[s].at(0),
                                  grad.at(0),
                                  first[s].data(),
                                  second[s].data(),
                                  eight_bits ? largest[s].data() : nullptr,
                                  dtype};
      skipped[s] += sets[s]->adamw_step(values, 0, count, numbers, step == 6 ? 0.3f : 1.0f);
    }
  }
  expect_same(name + " parameters", params[0].memory, params[1].memory);
  expect_same(name + " exp_avg", first[0], first[1]);
  expect_same(name + " exp_avg_sq", second[0], second[1]);
  expect_same(name + " absmax", largest[0], largest[1]);
  report(name + " skipped", skipped[0] == 2 && skipped[1] == 2, std::to_string(skipped[1]));
}

void rows(Dtype dtype, int64_t count) {
  const std::string name = std::string(dtype_names[static_cast<int>(dtype)]) + ", " + std::to_string(count);
  Values values = drawn(dtype, count, 3.0f);
  const std::vector<float> floats = drawn_floats(count, 100.0f);
  std::vector<uint32_t> keep[2];
  for (int s = 0; s < 2; ++s) {
    keep[s].assign(static_cast<size_t>(count), 5);
    sets[s]->dropout_mask(0x123456789ABCDEFull, dropout_threshold(0.3), (1ll << 34) + 3, count, keep[s].data());
  }
  expect_same("dropout_mask " + name, keep[0], keep[1]);
  std::vector<float> wide[2];
  Values kept[2] = {{dtype, count}, {dtype, count}}, rounded[2] = {{dtype, count}, {dtype, count}};
  for (int s = 0; s < 2; ++s) {
    wide[s].resize(static_cast<size_t>(count));
    sets[s]->widen(values.at(0), 0.7f, count, dtype, wide[s].data());
    sets[s]->keep(values.at(0), keep[0].data(), count, dtype, kept[s].at(0));
    sets[s]->few[static_cast<int>(dtype)]->round(floats.data(), 3e-7f, count, rounded[s].at(0));
  }
  expect_same("widen " + name, wide[0], wide[1]);
  expect_same("keep " + name, kept[0].memory, kept[1].memory);
  expect_same("round " + name, rounded[0].memory, rounded[1].memory);
  std::vector<float> halves(static_cast<size_t>(count));  // between neighbours of bfloat16, and of float16
  for (int64_t i = 0; i < count; ++i) halves[static_cast<size_t>(i)] = 2.0f + static_cast<float>(i) * 0x1p-10f;
  for (int s = 0; s < 2; ++s) {
    sets[s]->few[static_cast<int>(dtype)]->round(halves.data(), 0.5f, count, rounded[s].at(0));
  }
  expect_same("round ties " + name, rounded[0].memory, rounded[1].memory);
}

// A weight of [N, K], packed, with float32 scales or nested ones, and what it decodes to.
struct Weight {
  Weight(int64_t N, int64_t K, int64_t blocksize, bool nest, Dtype dtype)
      : decoded(dtype, N * K), codes(static_cast<size_t>(N * K / 2)), nested(static_cast<size_t>(N * K / 8192 + 2)) {
    const std::vector<float> values = drawn_floats(N * K, 0.05f);
    const int64_t blocks = N * K / blocksize;
    scales.resize(static_cast<size_t>(blocks));
    sets[0]->nf4_quantize(values.data(), Dtype::f32, 0, blocks, blocksize, codes.data(), scales.data());
    packed = {codes.data(), {scales.data(), nullptr, nullptr, 0.0f}, K, blocksize};
    if (nest) {
      quantized.resize(scales.size());
      sets[0]->absmax_quantize(scales.data(), 0.1f, 0, (blocks + 255) / 256, blocks, nested.data(), quantized.data());
      packed.scales = {nullptr, quantized.data(), nested.data(), 0.1f};
      sets[0]->absmax_dequantize(packed.scales, 0, blocks, scales.data());
    }
    sets[0]->nf4_dequantize(codes.data(), scales.data(), 0, blocks, blocksize, dtype, false, decoded.at(0));
  }
  Packed packed;
  Values decoded;
  std::vector<uint8_t> codes, quantized;
  std::vector<float> scales, nested;
};

void many_rows(Dtype dtype, int64_t blocksize, bool nest, int64_t depth) {
  const std::string name = std::string("gemm ") + dtype_names[static_cast<int>(dtype)] + ", " + std::to_string(depth);
  const int64_t N = 224, K = 224, first = 32, at = 32;
  const int d = static_cast<int>(dtype);
  Weight weight(N, K, blocksize, nest, dtype);
  Values A = drawn(dtype, N * K);
  const Dense dense = {A.at(0), dtype, K};
  const std::vector<float> values_of_A = A.wide();
  const float* const wide_A = values_of_A.data();
  for (int64_t valid : {1, 5, 8, 16}) {
    // [depth][16] of each set, put together of its widest panels.
    std::vector<float> panels[2][4], tiles[2][2], sums[2];
    for (int s = 0; s < 2; ++s) {
      const Gemm& gemm = *sets[s]->gemm[d];
      const int lanes = gemm.max_lanes < 16 ? gemm.max_lanes : 16, height = gemm.rows;
      report(name + " geometry", gemm.step == 1 && height == 6 && 16 % lanes == 0 && lanes % gemm.vector == 0, "");
      std::vector<float> panel(static_cast<size_t>(depth * lanes + 64)),
          tile(static_cast<size_t>((depth + 1) * 6 + 64));
      for (int kind = 0; kind < 4; ++kind) {
        panels[s][kind].assign(static_cast<size_t>(depth * 16), -1.0f);
        for (int lane = 0; lane < 16; lane += lanes) {
          const int64_t n = first + lane, exist = valid - lane < 0 ? 0 : std::min<int64_t>(valid - lane, lanes);
          if (kind == 0) gemm.panel_rows(dense, n, exist, lanes, at, depth, panel.data());
          if (kind == 1) gemm.panel_columns(dense, n, exist, lanes, at, depth, panel.data());
          // Columns of a packed weight come in blocks of 32, of which a strip has whole vectors.
          if (kind == 2 && depth % 32 == 0)
            gemm.panel_nf4_rows(weight.packed, n, exist, lanes, at, depth, panel.data());
          if (kind == 3) {
            gemm.panel_nf4_columns(weight.packed, n, exist / 8 * 8, lanes, at, depth, panel.data());
          }
          for (int64_t k = 0; k < depth; ++k) {
            for (int i = 0; i < lanes; ++i) {
              panels[s][kind][static_cast<size_t>(k * 16 + lane + i)] = panel[static_cast<size_t>(k * lanes + i)];
            }
          }
        }
      }
      const int64_t exist = std::min<int64_t>(valid, 6);
      for (int kind = 0; kind < 2; ++kind) {
        (kind ? gemm.pack_columns : gemm.pack_rows)(dense, 3, exist, at, depth, tile.data());
        tiles[s][kind].assign(tile.begin(), tile.begin() + depth * 6);
      }
      // What a tile begins with, and two halves of the depth one after the other, into `valid` lanes.
      std::vector<float> own(static_cast<size_t>(6 * lanes), -1.0f), offset(16);
      std::vector<uint32_t> keep(static_cast<size_t>(6 * lanes));
      for (size_t i = 0; i < keep.size(); ++i) keep[i] = i % 3 ? ~0u : 0u;
      for (size_t i = 0; i < 16; ++i) offset[i] = static_cast<float>(i) - 4.0f;
      gemm.pack_rows(dense, 3, 6, at, depth, tile.data());
      gemm.panel_rows(dense, first, lanes, lanes, at, depth, panel.data());
      const int64_t half = depth / 2;
      gemm.begin({tile.data(), panel.data(), depth, 0.5f, keep.data(), offset.data()}, tile.data(), panel.data(), half,
                 lanes, own.data());
      gemm.add(tile.data() + half * 6, panel.data() + half * lanes, depth - half, lanes, own.data());
      Values out(dtype, 6 * lanes);
      std::vector<Sum> wanted(static_cast<size_t>(6 * lanes));
      gemm.finish({out.at(0), lanes, 6, lanes, 2.0f}, lanes, own.data());
      for (int r = 0; r < 6; ++r) {
        for (int lane = 0; lane < lanes; ++lane) {
          Sum& sum = wanted[static_cast<size_t>(r * lanes + lane)];
          const double share = 1.0 + (keep[static_cast<size_t>(r * lanes + lane)] ? 0.5 : 0.0);
          sum.add_products(&wide_A[(3 + r) * K + at], 1, &wide_A[(first + lane) * K + at], 1, depth, 2 * share);
          sum.add(2.0 * offset[static_cast<size_t>(lane)]);
        }
      }
      expect_near(name + " of " + sets[s]->name, out, wanted, 2 * depth);
    }
    const char* const kinds[4] = {" panel_rows", " panel_columns", " panel_nf4_rows", " panel_nf4_columns"};
    for (int kind = 0; kind < 4; ++kind) {
      if (kind != 2 || depth % 32 == 0) expect_same(name + kinds[kind], panels[0][kind], panels[1][kind]);
    }
    for (int kind = 0; kind < 2; ++kind) expect_same(name + " tiles", tiles[0][kind], tiles[1][kind]);
  }
}

void few_rows(Dtype dtype, int64_t K, int64_t blocksize, bool nest, int M, int64_t R, bool with_bias) {
  const int d = static_cast<int>(dtype);
  const std::string name = std::string("few ") + dtype_names[d] + ", " + std::to_string(M) + " rows, K " +
                           std::to_string(K) + ", R " + std::to_string(R);
  const int64_t N = 37, stride = (R + 15) / 16 * 16;
  Weight weight(N, K, blocksize, nest, dtype);
  Values x = drawn(dtype, M * K), B = drawn(Dtype::f32, N * R + 1), A = drawn(Dtype::bf16, R * K + 1);
  std::vector<float> bias = drawn_floats(N), S(static_cast<size_t>(16 * stride)), S_lanes(static_cast<size_t>(16 * R));
  for (int64_t r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) {
      const float value = drawn_floats(1)[0];
      S[static_cast<size_t>(m * stride + r)] = S_lanes[static_cast<size_t>(r * 16 + m)] = value;
    }
  }
  const LowRank low = {S.data(), stride, S_lanes.data(), {B.at(0), Dtype::f32, R}, R};
  const Dense of_x = {x.at(0), dtype, K};
  const std::vector<float> wide_x = x.wide(), wide_W = weight.decoded.wide();
  for (const Loops* set : sets) {
    const Few& few = *set->few[d];
    std::vector<uint8_t> prepared(static_cast<size_t>(few.size(M, K)) + 64);
    void* aligned = prepared.data() + (64 - reinterpret_cast<uintptr_t>(prepared.data()) % 64) % 64;
    few.prepare(of_x, M, K, aligned);
    Values y(dtype, M * N), low_rank(dtype, M * R);
    for (const int64_t begin : {int64_t{0}, int64_t{32}}) {
      few.multiply(weight.packed, begin, begin ? N : 32, aligned, M, low, with_bias ? bias.data() : nullptr, y.at(0),
                   N);
    }
    std::vector<Sum> wanted(static_cast<size_t>(M * N)), wanted_low(static_cast<size_t>(M * R));
    Values rounded_B(dtype, N * R + 1), rounded_A(dtype, R * K + 1);

    few.round(B.wide().data(), 1.0f, N * R, rounded_B.at(0));
    few.round(A.wide().data(), 1.0f, R * K, rounded_A.at(0));
    const std::vector<float> wide_A = rounded_A.wide(), wide_B = rounded_B.wide();
    for (int m = 0; m < M; ++m) {
      for (int64_t n = 0; n < N; ++n) {
        Sum& sum = wanted[static_cast<size_t>(m * N + n)];
        sum.add_products(wide_x.data() + m * K, 1, wide_W.data() + n * K, 1, K, 1.0);
        sum.add_products(S.data() + m * stride, 1, wide_B.data() + n * R, 1, R, 1.0);
        if (with_bias) sum.add(bias[static_cast<size_t>(n)]);
      }
      for (int64_t r = 0; r < R; ++r) {
        Sum& sum = wanted_low[static_cast<size_t>(m * R + r)];
        sum.add_products(wide_x.data() + m * K, 1, wide_A.data() + r * K, 1, K, 0.5);
      }
    }
    expect_near(name + " of " + set->name, y, wanted, K + R);
    few.low_rank(of_x, M, {A.at(0), Dtype::bf16, K}, 0, R, K, 0.5f, low_rank.at(0), R);
    expect_near(name + " low_rank of " + set->name, low_rank, wanted_low, K);

    // T = x^T x of some columns, whose number is odd.
    const int64_t columns = K - 3;

    Values out(Dtype::f32, 3 * columns);
    few.combine(wide_x.data(), K, 1, of_x, 0, 3, M, columns, 0.25f, {out.at(0), Dtype::f32, columns});
    std::vector<Sum> wanted_T(static_cast<size_t>(3 * columns));
    for (int64_t p = 0; p < 3; ++p) {
      for (int64_t q = 0; q < columns; ++q) {
        wanted_T[static_cast<size_t>(p * columns + q)].add_products(wide_x.data() + p, K, wide_x.data() + q, K, M,
                                                                    0.25);
      }
    }
    expect_near(name + " combine of " + set->name, out, wanted_T, M);
  }
}

}  // namespace

int main() {
  ties();
  absmax();
  for (const Dtype dtype : dtypes) {
    for (const int64_t blocksize : {32, 64, 128, 4096}) nf4(dtype, blocksize);
    for (const int64_t count : {1, 3, 4, 17, 64, 511}) rows(dtype, count);
    for (const int64_t count : {1, 7, 256, 300, 1029}) {
      adamw(dtype, false, count);
      adamw(dtype, true, count);
    }
    for (const int64_t depth : {1, 7, 32, 64, 129, 160}) many_rows(dtype, 32, depth % 3 == 0, depth);
    for (const int M : {1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16}) {
      few_rows(dtype, 96, 32, M % 2, M, M % 3 ? 5 : 0, M % 2 == 0);
      few_rows(dtype, 320, 64, M % 2 == 0, M, M % 3 ? 0 : 16, M % 2);
    }
    few_rows(dtype, 8448, 256, true, 1, 3, true);
    few_rows(dtype, 8448, 256, false, 12, 17, true);
  }
  std::printf("%d comparisons, %d differ\n", checks, wrongs);
  return wrongs != 0;
}
