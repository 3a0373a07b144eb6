// adamw_step_ on CUDA: one launch steps as many tensors as the parameters of a kernel have room for.
//
// ../adamw.h has the arithmetic, ../format.h the maps of the 8-bit moments. Least traffic per value of a float32
// parameter: 28 bytes with float32 moments, 16.1 with 8 bits (parameter and moments both ways, gradient one).
#include <algorithm>

#include "../ceil_div.h"
#include "card.h"
#include "dtype.cuh"
#include "launch.h"
#include "moment.cuh"
#include "vector.cuh"

namespace nf4lora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPiece = 8192;  // values
constexpr int kMostTensors = 64;
constexpr int64_t kMostPieces = (int64_t{1} << 30);  // of a launch
constexpr float kMostFloat = 3.402823466e+38f;

// What one launch steps. Piece p belongs to the last tensor whose first piece is not beyond p.
struct Batch {
  AdamWTensor tensor[kMostTensors];
  int first_piece[kMostTensors + 1];
  int count;
};
static_assert(sizeof(Batch) + sizeof(AdamW) + 64 <= 4096, "a kernel's parameters");

struct Place {
  AdamWTensor tensor;
  int64_t begin, end;  // values
  bool aligned;
};
__device__ __forceinline__ Place place_of(const Batch& batch, int piece) {
  int low = 0, high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (batch.first_piece[middle] <= piece) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const AdamWTensor tensor = batch.tensor[low];
  const int64_t begin = static_cast<int64_t>(piece - batch.first_piece[low]) * kPiece;
  const auto addresses = reinterpret_cast<uintptr_t>(tensor.param) | reinterpret_cast<uintptr_t>(tensor.grad) |
                         reinterpret_cast<uintptr_t>(tensor.exp_avg) | reinterpret_cast<uintptr_t>(tensor.exp_avg_sq);
  return {tensor, begin, min(tensor.count, begin + kPiece), addresses % 16 == 0};
}

// Intrinsics, so that nothing is contracted but what adamw.h contracts.
struct Moments {
  float first, second;
};
__device__ __forceinline__ Moments moments_of(const AdamW& step, float g, Moments before) {
  return {__fmaf_rn(step.weight, __fsub_rn(g, before.first), step.from_gradient ? g : before.first),
          __fmaf_rn(__fmul_rn(step.square_weight, g), g, __fmul_rn(before.second, step.beta2))};
}
// exp_avg in 8 bits, so that it goes down where its gradient has ended; drop: that of its code, times absmax.
__device__ __forceinline__ float first_of(const AdamW& step, float g, float before, float drop, float first) {
  const float lowered = __fsub_rn(before, drop);
  const bool ended = fabsf(g) < __fmul_rn(fabsf(before), step.gone);
  return ended && fabsf(lowered) < fabsf(first) ? lowered : first;
}
// sqrt.rn and div.rn, and for numbers within Ordinary what nvcc makes of the two, on every architecture, between its
// branches: a seed and its corrections. Without the branches, the values of a lane overlap.
struct Exact {
  __device__ __forceinline__ static float root(float x) { return __fsqrt_rn(x); }
  __device__ __forceinline__ static float quotient(float n, float d) { return __fdiv_rn(n, d); }
};
struct Branchless {
  __device__ __forceinline__ static float root(float x) {
    float seed;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(seed) : "f"(fmaxf(x, 0x1p-101f)));  // zero has a finite seed too
    const float s = __fmul_rn(x, seed);
    return __fmaf_rn(__fmaf_rn(-s, s, x), __fmul_rn(seed, 0.5f), s);
  }
  __device__ __forceinline__ static float quotient(float n, float d) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(d));
    y = __fmaf_rn(y, __fmaf_rn(-d, y, 1.0f), y);
    const float q = __fmul_rn(n, y);
    return __fmaf_rn(-__fmaf_rn(d, q, -n), y, q);  // of the two signs, that which keeps a zero's
  }
};
template <class Arithmetic>
__device__ __forceinline__ float param_of(const AdamW& step, float p, Moments moments) {
  const float root = Arithmetic::root(moments.second);
  float q = __fmul_rn(root, step.inverse_correction);
  q = __fmaf_rn(__fmaf_rn(-q, step.correction, root), step.inverse_correction, q);
  const float denominator = __fadd_rn(root < INFINITY ? q : root, step.eps);
  return __fadd_rn(__fmul_rn(p, step.decay),
                   Arithmetic::quotient(__fmul_rn(step.negative_step, moments.first), denominator));
}

// How far the moments of some values reach. The bits of magnitudes order as they do; zero, less one, is above all.
struct Extent {
  float first_most = 0.0f, second_most = 0.0f;
  uint32_t first_least = ~0u, second_least = ~0u;

  __device__ __forceinline__ void take(Moments moments) {
    first_most = fmaxf(first_most, fabsf(moments.first));
    second_most = fmaxf(second_most, fabsf(moments.second));
    first_least = min(first_least, 2 * __float_as_uint(moments.first) - 1);
    second_least = min(second_least, __float_as_uint(moments.second) - 1);
  }
};
// Moments for which Branchless is exact, nothing on the way being subnormal or infinite: roots of 2^-101 and more,
// dividends zero or 2^-100 to 2^40, divisors 2^-80 to 2^20.
struct Ordinary {
  float first_most, second_most;
  uint32_t first_least;

  __device__ __forceinline__ static Ordinary of(const AdamW& step) {
    const float size = fabsf(step.negative_step), inverse = step.inverse_correction;
    const float least = size > 0.0f ? fmaxf(0x1p-100f / size, 0x1p-120f) : 0x1p-120f;
    const bool some = step.eps >= 0x1p-80f && step.eps <= 0x1p19f;
    return {some ? 0x1p40f / size : -1.0f, 0x1p38f / (inverse * inverse), 2 * __float_as_uint(least) - 1};
  }
  __device__ __forceinline__ bool holds(const Extent& extent) const {
    return extent.first_most <= first_most && extent.second_most <= second_most && extent.first_least >= first_least &&
           extent.second_least >= __float_as_uint(0x1p-101f) - 1;
  }
};

__device__ __forceinline__ void round_to(float value, float* to) { *to = value; }
__device__ __forceinline__ void round_to(float value, __nv_bfloat16* to) { *to = __float2bfloat16_rn(value); }
__device__ __forceinline__ void round_to(float value, __half* to) { *to = __float2half_rn(value); }

// The sum over a warp goes to global memory once: integers, so that their order does not matter.
__device__ __forceinline__ void add_skipped(int mine, int64_t* skipped) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) mine += __shfl_xor_sync(kAllLanes, mine, distance);
  if (mine && threadIdx.x % kWarp == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(skipped), static_cast<unsigned long long>(mine));
  }
}

// Formula   adamw.h with float32 moments
// Threads   four neighbouring values each, a block of threads takes kPiece
// Assumes   tensors that are in order in memory; where all of one begin at 16 bytes, they move in vectors
// Bound     memory: 28 bytes a value (22 for 16-bit parameters)
template <typename T>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ Batch batch, const __grid_constant__ AdamW step,
                 const float* __restrict__ scale,  // [1] or null
                 int64_t* __restrict__ skipped) {  // [1]
  const Place place = place_of(batch, blockIdx.x);
  const float factor = scale ? *scale : 1.0f;
  auto* const params = static_cast<T*>(place.tensor.param);
  const auto* const grads = static_cast<const T*>(place.tensor.grad);
  auto* const firsts = static_cast<float*>(place.tensor.exp_avg);
  auto* const seconds = static_cast<float*>(place.tensor.exp_avg_sq);
  int refused = 0;
  const auto one = [&](float g, T* param, float* first, float* second) {
    const float scaled = __fmul_rn(g, factor);
    if (!(fabsf(scaled) < INFINITY)) {
      ++refused;
      return;
    }
    const Moments moments = moments_of(step, scaled, {*first, *second});
    *first = moments.first;
    *second = moments.second;
    round_to(param_of<Exact>(step, to_float(*param), moments), param);
  };
  for (int64_t at = place.begin + threadIdx.x * 4; at < place.end; at += kThreads * 4) {
    if (at + 4 <= place.end) {
      auto p = load<4>(params + at, place.aligned);
      const auto g = load<4>(grads + at, place.aligned);
      auto first = load<4>(firsts + at, place.aligned), second = load<4>(seconds + at, place.aligned);
#pragma unroll
      for (int i = 0; i < 4; ++i) one(to_float(g.value[i]), &p.value[i], &first.value[i], &second.value[i]);
      store(params + at, p, place.aligned);
      store(firsts + at, first, place.aligned);
      store(seconds + at, second, place.aligned);
    } else {
      for (int64_t i = at; i < place.end; ++i) one(to_float(grads[i]), params + i, firsts + i, seconds + i);
    }
  }
  add_skipped(refused, skipped);
}

__device__ __forceinline__ float largest_of_warp(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// The eight values of a lane from memory: as vectors of 16 bytes, or one by one up to `count`; zeros beyond.
template <typename T>
__device__ __forceinline__ void load_lane(const T* from, int count, bool aligned, T (&to)[kPerLane]) {
  constexpr int kWide = 16 / sizeof(T);
  if (aligned && count == kPerLane) {
#pragma unroll
    for (int i = 0; i < kPerLane; i += kWide) {
      const auto part = *reinterpret_cast<const Vector<T, kWide>*>(from + i);
#pragma unroll
      for (int j = 0; j < kWide; ++j) to[i + j] = part.value[j];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) to[i] = i < count ? from[i] : T(0.0f);
}
template <typename T>
__device__ __forceinline__ void store_lane(T* to, int count, bool aligned, const T (&from)[kPerLane]) {
  constexpr int kWide = 16 / sizeof(T);
  if (aligned && count == kPerLane) {
#pragma unroll
    for (int i = 0; i < kPerLane; i += kWide) {
      Vector<T, kWide> part;
#pragma unroll
      for (int j = 0; j < kWide; ++j) part.value[j] = from[i + j];
      *reinterpret_cast<Vector<T, kWide>*>(to + i) = part;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (i < count) to[i] = from[i];
  }
}

// Formula   adamw.h with moments decoded from 8 bits, and rounded to the nearest value of their map again
// Threads   one warp per block of 256 values, eight neighbours a lane; blocks of threads stay for one piece after the
//           other, so that they copy the tables once
// Assumes   a tensor, or a part of one, that begins with a block; the last block may be short
// Bound     instructions, 89 a value on Hopper and what first_of adds, five of them look-ups; memory, 16.1 bytes a value
//           (10.1 for 16-bit parameters), is close behind
constexpr int kBlocksAtOnce = 3;  // of threads on a multiprocessor
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    adamw_8bit_kernel(const __grid_constant__ Batch batch, const __grid_constant__ AdamW step,
                      const float* __restrict__ scale,  // [1] or null
                      int64_t* __restrict__ skipped) {  // [1]
  __shared__ Tables tables;
  copy_tables(tables);
  __syncthreads();
  const float factor = scale ? *scale : 1.0f;
  const Ordinary ordinary = Ordinary::of(step);
  const int lane = threadIdx.x % kWarp;
  int refused = 0;

  const auto step_block = [&](const Place& place, int64_t block) {
    const int64_t at = block + lane * kPerLane;
    const int count = static_cast<int>(max(min(place.end - at, static_cast<int64_t>(kPerLane)), int64_t{0}));
    T* const params = static_cast<T*>(place.tensor.param) + at;
    auto* const firsts = static_cast<uint8_t*>(place.tensor.exp_avg) + at;
    auto* const seconds = static_cast<uint8_t*>(place.tensor.exp_avg_sq) + at;
    float* const absmax = place.tensor.absmax + block / kMomentBlocksize * 2;
    T p[kPerLane], g[kPerLane];
    load_lane(params, count, place.aligned, p);
    load_lane(static_cast<const T*>(place.tensor.grad) + at, count, place.aligned, g);
    Codes first_codes = load_codes(firsts, count, place.aligned, kNestedZero);
    Codes second_codes = load_codes(seconds, count, place.aligned, 0);
    const float first_absmax = absmax[0], second_absmax = absmax[1];

    float gradient[kPerLane];
    Moments moments[kPerLane];
    bool small = first_absmax < 0x1p100f && second_absmax < 0x1p100f;  // nothing can become infinite
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      gradient[i] = __fmul_rn(to_float(g[i]), factor);
      small = small && fabsf(gradient[i]) < 0x1p60f;
      moments[i] = {__fmul_rn(tables.signed_value[first_codes[i]], first_absmax),
                    __fmul_rn(tables.unsigned_value[second_codes[i]], second_absmax)};
    }
    const auto next = [&](int i) {
      Moments after = moments_of(step, gradient[i], moments[i]);
      const float drop = __fmul_rn(tables.drop[first_codes[i]], first_absmax);
      after.first = first_of(step, gradient[i], moments[i].first, drop, after.first);
      return after;
    };
    uint32_t stay = 0;  // a bit for each value whose gradient is not finite
    if (small) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) moments[i] = next(i);
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (fabsf(gradient[i]) < INFINITY) {
          moments[i] = next(i);
          moments[i].first = fmaxf(fminf(moments[i].first, kMostFloat), -kMostFloat);  // an infinite absmax is none
          moments[i].second = fminf(moments[i].second, kMostFloat);
        } else {
          stay |= 1u << i;
          refused += i < count;
        }
      }
    }

    Extent extent;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) extent.take(moments[i]);
    const float first_peak = largest_of_warp(extent.first_most), second_peak = largest_of_warp(extent.second_most);
    const Quotient first_quotient = Quotient::of(first_peak), second_quotient = Quotient::of(second_peak);
    uint32_t first[kPerLane], second[kPerLane];
    if (stay == 0 && ordinary.holds(extent) && !first_quotient.divides && !second_quotient.divides) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        round_to(param_of<Branchless>(step, to_float(p[i]), moments[i]), &p[i]);
        first[i] = encode_signed_normal(tables, moments[i].first, first_quotient);
        second[i] = encode_unsigned_normal(tables, moments[i].second, second_quotient);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (!(stay >> i & 1)) round_to(param_of<Exact>(step, to_float(p[i]), moments[i]), &p[i]);
        first[i] = encode_signed(tables, moments[i].first, first_quotient);
        second[i] = encode_unsigned(tables, moments[i].second, second_quotient);
      }
    }
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      first_codes.word[i / 4] = pack_codes(first + i);
      second_codes.word[i / 4] = pack_codes(second + i);
    }
    store_lane(params, count, place.aligned, p);
    store_codes(firsts, count, place.aligned, first_codes);
    store_codes(seconds, count, place.aligned, second_codes);
    __syncwarp();  // every lane has read the old ones
    if (lane == 0) {
      absmax[0] = first_peak;
      absmax[1] = second_peak;
    }
  };
  for (int piece = blockIdx.x; piece < batch.first_piece[batch.count]; piece += gridDim.x) {
    const Place place = place_of(batch, piece);
    for (int64_t block = place.begin + threadIdx.x / kWarp * kMomentBlocksize; block < place.end;
         block += kWarps * kMomentBlocksize) {
      step_block(place, block);
    }
  }
  add_skipped(refused, skipped);
}

template <typename T>
void launch(const Batch& batch, bool eight_bits, const AdamW& numbers, const float* scale, int64_t* skipped,
            cudaStream_t stream) {
  const int pieces = batch.first_piece[batch.count];
  if (!eight_bits) {
    adamw_kernel<T><<<static_cast<unsigned>(pieces), kThreads, 0, stream>>>(batch, numbers, scale, skipped);
    return;
  }
  const auto grid = static_cast<unsigned>(std::min(pieces, current_card().multiprocessors * kBlocksAtOnce));
  adamw_8bit_kernel<T><<<grid, kThreads, 0, stream>>>(batch, numbers, scale, skipped);
}

}  // namespace

Error adamw_step(const AdamWTensor* tensors, int64_t count, Dtype dtype, bool eight_bits, const AdamW& numbers,
                 const float* scale, int64_t* skipped, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto flush = [&](Batch& batch) {
    if (batch.count == 0) return;
    with_dtype(dtype, [&]<typename T>(std::type_identity<T>) {
      launch<T>(batch, eight_bits, numbers, scale, skipped, cuda_stream);
    });
    batch.count = 0;
  };
  Batch batch{};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t pieces = ceil_div(tensors[i].count, kPiece);
    if (pieces == 0) continue;
    if (pieces > kMostPieces) return "a tensor of more than 2^43 values";
    if (batch.count == kMostTensors || batch.first_piece[batch.count] + pieces > kMostPieces) flush(batch);
    batch.tensor[batch.count] = tensors[i];
    batch.first_piece[batch.count + 1] = batch.first_piece[batch.count] + static_cast<int>(pieces);
    ++batch.count;
  }
  flush(batch);
  return launched();
}

}  // namespace nf4lora::cuda
