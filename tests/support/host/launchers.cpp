// The launchers of csrc/cuda/launch.h as plain loops over the host's memory, for the code of csrc/cuda that calls them.
// They do what launch.h says, in the simplest way, and refuse what it says they refuse. `launches` says which ran.
#include "launchers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/card.h"
#include "cuda/launch.h"
#include "format.h"

std::vector<std::string> launches;

namespace nf4lora::cuda {
namespace {

float widen(uint16_t bits, bool is_bf16) {
  if (is_bf16) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}
uint16_t narrow(float value, bool is_bf16) {
  uint16_t bits;
  if (is_bf16) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if (std::isnan(value)) return 0x7FC0;
    word += 0x7FFF + (word >> 16 & 1);
    return static_cast<uint16_t>(word >> 16);
  }
  const auto half = static_cast<_Float16>(value);
  std::memcpy(&bits, &half, 2);
  return bits;
}
float get(const void* data, Dtype dtype, int64_t at) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[at];
  return widen(static_cast<const uint16_t*>(data)[at], dtype == Dtype::bf16);
}
void put(void* data, Dtype dtype, int64_t at, float value) {
  if (dtype == Dtype::f32) {
    static_cast<float*>(data)[at] = value;
  } else {
    static_cast<uint16_t*>(data)[at] = narrow(value, dtype == Dtype::bf16);
  }
}
float rounded(float value, Dtype dtype) {
  return dtype == Dtype::f32 ? value : widen(narrow(value, dtype == Dtype::bf16), dtype == Dtype::bf16);
}
bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

uint32_t word(uint64_t seed, int64_t at) {
  const auto block = static_cast<uint64_t>(at) / 4;
  uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * c[0], second = uint64_t{0xCD9E8D57} * c[2];
    c[0] = static_cast<uint32_t>(second >> 32) ^ c[1] ^ key[0];
    c[1] = static_cast<uint32_t>(second);
    c[2] = static_cast<uint32_t>(first >> 32) ^ c[3] ^ key[1];
    c[3] = static_cast<uint32_t>(first);
    key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
  }
  return c[at % 4];
}
bool is_dropped(const uint64_t* seed, uint32_t threshold, int64_t at) { return seed && word(*seed, at) < threshold; }

float weight_at(const Packed& W, int64_t N, int64_t K, int64_t blocksize, int64_t n, int64_t k, Dtype dtype) {
  const int64_t at = n * K + k, block = at / blocksize;
  float scale = 0.0f;
  if (W.absmax) {
    scale = W.absmax[block];
  } else {
    const int64_t blocks = N * K / blocksize;
    scale = kNestedCode.value[W.absmax_q[block]] * W.nested[block / 256];
    scale += W.nested[(blocks + 255) / 256];
  }
  const uint8_t byte = W.qweight[at / 2];
  return rounded(kCode.value[at % 2 ? byte & 15 : byte >> 4] * scale, dtype);
}

}  // namespace

Card current_card() { return {2, 164 << 10, 90}; }

Error dropout(const void* from, void* to, Dtype dtype, const uint64_t* seed, uint32_t threshold, int64_t count, void*) {
  launches.push_back("dropout");
  if (count % 4 != 0) return "a count that is no multiple of 4";
  for (int64_t i = 0; i < count; ++i) put(to, dtype, i, is_dropped(seed, threshold, i) ? 0.0f : get(from, dtype, i));
  return nullptr;
}

Error lora_slice(const Slice& s, void*) {
  launches.push_back("lora_slice");
  if (s.k0 % 32 || s.columns % 32) return "columns off a multiple of 32";
  if (s.n0 < 0 || s.n0 + s.rows > s.N || s.k0 < 0 || s.k0 + s.columns > s.K) return "a rectangle outside W";
  const int64_t all = s.all_ranks ? s.all_ranks : s.R, padded = (all + 7) / 8 * 8;
  if (s.stride < s.columns + (s.factor && !s.factor_is_below ? padded : 0)) return "a stride that is too short";
  const auto scaled = [&](int64_t at) {
    return rounded(rounded(get(s.factor, s.dtype_of_factor, at), s.dtype) * s.scaling, s.dtype);
  };
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t c = 0; c < s.columns; ++c) {
      put(s.weight, s.dtype, r * s.stride + c, weight_at(s.W, s.N, s.K, s.blocksize, s.n0 + r, s.k0 + c, s.dtype));
    }
    if (!s.factor || s.factor_is_below) continue;
    for (int64_t j = 0; j < padded; ++j) {
      const int64_t rank = j - s.first_rank;
      const bool exists = rank >= 0 && rank < s.R;
      put(s.weight, s.dtype, r * s.stride + s.columns + j, exists ? scaled((s.n0 + r) * s.R + rank) : 0.0f);
    }
  }
  if (!s.factor || !s.factor_is_below) return nullptr;
  for (int64_t j = 0; j < padded; ++j) {
    for (int64_t c = 0; c < s.columns; ++c) {
      put(s.weight, s.dtype, (s.rows + j) * s.stride + c, j < s.R ? scaled(j * s.K + s.k0 + c) : 0.0f);
    }
  }
  return nullptr;
}

int64_t tall_skinny_workspace(const TallSkinny&) { return 1; }

namespace {

// Rank r of all ranks: the adapter that it belongs to, which rank it is there, and how many that one has.
struct Place {
  int adapter;
  int64_t rank, ranks;
};
Place place_of(const TallSkinny& t, int64_t r) {
  int i = 0;
  while (i + 1 < kMostSiblings && r >= t.first_rank[i + 1]) ++i;
  const int64_t end = i + 1 < kMostSiblings ? std::min(t.first_rank[i + 1], t.R) : t.R;
  return {i, r - t.first_rank[i], end - t.first_rank[i]};
}
// Value (d, r) of F, G or E [D, R], or of its transpose.
int64_t at_of(const Place& place, bool is_transposed, int64_t D, int64_t d) {
  return is_transposed ? place.rank * D + d : d * place.ranks + place.rank;
}
int64_t at_of_P(const TallSkinny& t, const Place& place, int64_t m) {
  return m * (t.P_stride ? t.P_stride : place.ranks) + place.rank;
}

void expand_all(const TallSkinny& t) {
  const Expansion& e = t.expansion;
  for (int64_t m = 0; m < t.M; ++m) {
    for (int64_t d = 0; d < e.columns; ++d) {
      double sum = 0.0;
      for (int64_t r = 0; r < t.R && !is_dropped(e.seed, e.threshold, m * e.columns + d); ++r) {
        const Place place = place_of(t, r);
        const float P = get(t.P[0], t.dtype, m * (t.P_stride ? t.P_stride : t.R) + r);
        const int64_t at = at_of(place, !e.E_is_transposed, e.columns, d);
        sum += P * rounded(get(e.E[place.adapter], e.dtype_of_E, at), t.dtype);
      }
      put(e.out, t.dtype, m * e.columns + d, static_cast<float>(sum * e.scale) + (e.bias ? e.bias[d] : 0.0f));
    }
  }
}

}  // namespace

Error expand(const TallSkinny& t, void*) {
  launches.push_back("expand");
  if (!t.expansion.out || !t.P[0] || t.R < 1) return "no expansion, or one of no product";
  expand_all(t);
  return nullptr;
}

Error tall_skinny(const TallSkinny& t, void*) {
  launches.push_back("tall_skinny");
  if (t.dtype == Dtype::f32) return "float32, which the kernel for tall and skinny products does not take";
  if (t.D % 8 != 0) return "a number of columns that is no multiple of 8";
  if (!is_aligned(t.Z)) return "Z off a multiple of 16 bytes";
  t.workspace[0] = 0.0f;  // it has to be there
  const auto z = [&](int64_t m, int64_t d) {
    return is_dropped(t.seed, t.threshold, m * t.D + d) ? 0.0f : get(t.Z, t.dtype, m * t.D + d);
  };
  if (t.copy && t.copy_stride != t.D + (t.R + 7) / 8 * 8) return "a copy of another width";
  for (int64_t m = 0; m < t.M; ++m) {
    for (int64_t d = 0; t.copy && d < t.copy_stride; ++d) {
      put(t.copy, t.dtype, m * t.copy_stride + d, d < t.D ? get(t.Z, t.dtype, m * t.D + d) : 0.0f);
    }
    for (int64_t r = 0; t.P[0] && r < t.R; ++r) {
      const Place place = place_of(t, r);
      double sum = 0.0;
      for (int64_t d = 0; d < t.D; ++d) {
        const float F = get(t.F[place.adapter], t.dtype_of_F, at_of(place, t.F_is_transposed, t.D, d));
        sum += z(m, d) * rounded(F, t.dtype);
      }
      put(t.P[place.adapter], t.dtype, at_of_P(t, place, m), static_cast<float>(sum * t.inner_scale));
      if (!t.copy) continue;
      put(t.copy, t.dtype, m * t.copy_stride + t.D + r, get(t.P[place.adapter], t.dtype, at_of_P(t, place, m)));
    }
  }
  if (t.expansion.out) expand_all(t);
  for (int64_t d = 0; t.G[0] && d < t.D; ++d) {
    for (int64_t r = 0; r < t.R; ++r) {
      const Place place = place_of(t, r);
      double sum = 0.0;
      for (int64_t m = 0; m < t.M; ++m) sum += z(m, d) * get(t.L, t.dtype, m * t.R + r);
      put(t.G[place.adapter], t.dtype_of_G, at_of(place, t.G_is_transposed, t.D, d),
          static_cast<float>(sum * t.outer_scale));
    }
  }
  return nullptr;
}

int64_t lora_gemm_partials(const LoraGemm&) { return 1; }

Error lora_gemm(const LoraGemm& g, void*) {
  launches.push_back("lora_gemm");
  if (g.dtype == Dtype::f32) return "float32";
  if (!is_aligned(g.rows) || !is_aligned(g.W.qweight)) return "rows or qweight off a multiple of 16 bytes";
  if (g.backward && g.N % 8 != 0) return "an N that is no multiple of 8";
  g.partials[0] = 0.0f;
  const int64_t in = g.backward ? g.N : g.K, out = g.backward ? g.K : g.N;
  for (int64_t m = 0; m < g.M; ++m) {
    for (int64_t o = 0; o < out; ++o) {
      double sum = 0.0;
      for (int64_t r = 0; g.factor && r < g.R; ++r) {
        const float factor = get(g.factor, g.dtype_of_factor, g.backward ? r * g.K + o : o * g.R + r);
        sum += get(g.low_rank, g.dtype, m * g.R + r) * rounded(factor, g.dtype);
      }
      sum = is_dropped(g.seed, g.threshold, m * out + o) ? 0.0 : sum * g.scaling;
      for (int64_t i = 0; i < in; ++i) {
        const int64_t n = g.backward ? i : o, k = g.backward ? o : i;
        sum += get(g.rows, g.dtype, m * in + i) * weight_at(g.W, g.N, g.K, g.blocksize, n, k, g.dtype);
      }
      put(g.out, g.dtype, m * out + o, static_cast<float>(sum) + (g.bias ? g.bias[o] : 0.0f));
    }
  }
  return nullptr;
}

Error lora_few(const FewRows& f, void* stream) {
  if (f.dtype == Dtype::f32) return "float32";
  if (f.M > kMostFewRows) return "more rows";
  TallSkinny pass{};
  float room = 0.0f;
  pass.dtype = f.dtype, pass.Z = f.x, pass.F[0] = f.lora_A, pass.dtype_of_F = f.dtype_of_A, pass.F_is_transposed = true;
  pass.seed = f.seed, pass.threshold = f.threshold, pass.inner_scale = f.inverse_keep;
  pass.P[0] = f.lora_A ? f.S : nullptr, pass.workspace = &room;
  pass.M = f.M, pass.D = f.K, pass.R = f.R;
  if (Error error = tall_skinny(pass, stream)) return error;
  launches.back() = "lora_few";
  LoraGemm gemm{};
  gemm.dtype = f.dtype, gemm.rows = f.x, gemm.W = f.W, gemm.bias = f.bias;
  gemm.low_rank = f.S, gemm.factor = f.lora_B, gemm.dtype_of_factor = f.dtype_of_B, gemm.scaling = f.scaling;
  gemm.out = f.y, gemm.partials = &room;
  gemm.M = f.M, gemm.N = f.N, gemm.K = f.K, gemm.R = f.R, gemm.blocksize = f.blocksize;
  const Error error = lora_gemm(gemm, stream);
  launches.pop_back();
  return error;
}

}  // namespace nf4lora::cuda
