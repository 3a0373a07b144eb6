// adamw_step_ on CUDA: one launch steps as many tensors as the parameters of a kernel have room for.
//
// ../adamw.h has the arithmetic, ../format.h the maps of the 8-bit moments. Least traffic per value of a float32
// parameter: 28 bytes with float32 moments, 16.1 with 8 bits (parameter and moments both ways, gradient one).
#include "../moment.h"
#include "codes.cuh"
#include "launch.h"
#include "vector.cuh"
#include "warp.cuh"

namespace nf4lora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPiece = 8192;  // values of a block of threads: they pay for its copy of the tables
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
__device__ __forceinline__ Place place_of(const Batch& batch) {
  int low = 0, high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (batch.first_piece[middle] <= static_cast<int>(blockIdx.x)) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const AdamWTensor tensor = batch.tensor[low];
  const int64_t begin = static_cast<int64_t>(static_cast<int>(blockIdx.x) - batch.first_piece[low]) * kPiece;
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
__device__ __forceinline__ float param_of(const AdamW& step, float p, Moments moments) {
  const float root = __fsqrt_rn(moments.second);
  float q = __fmul_rn(root, step.inverse_correction);
  q = __fmaf_rn(__fmaf_rn(-q, step.correction, root), step.inverse_correction, q);
  const float denominator = __fadd_rn(root < INFINITY ? q : root, step.eps);
  return __fadd_rn(__fmul_rn(p, step.decay), __fdiv_rn(__fmul_rn(step.negative_step, moments.first), denominator));
}

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
  const Place place = place_of(batch);
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
    round_to(param_of(step, to_float(*param), moments), param);
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

// The tables of the 8-bit moments where lanes can look up different entries at a time.
struct Tables {
  float signed_value[256], unsigned_value[256];
  uint32_t signed_bucket[kBuckets], unsigned_bucket[kBuckets];
};
__device__ constexpr NestedCode kDeviceSquares = kSquareCode;
__device__ constexpr Magnitudes kDeviceSigned = magnitudes(kNestedCode, kNestedZero);
__device__ constexpr Magnitudes kDeviceUnsigned = magnitudes(kSquareCode, 0);

__device__ __forceinline__ void copy_tables(Tables& tables) {
  const int i = threadIdx.x;
  tables.signed_value[i] = kDeviceMap.value[i];
  tables.unsigned_value[i] = kDeviceSquares.value[i];
  for (int j = i; j < kBuckets; j += kThreads) {
    tables.signed_bucket[j] = kDeviceSigned.bucket[j];
    tables.unsigned_bucket[j] = kDeviceUnsigned.bucket[j];
  }
}

// |value| / absmax, correctly rounded: by the inverse and what its product leaves (Markstein) where absmax allows it,
// else by division (a subnormal inverse, an infinite one, the mantissa for which the method is off by one).
struct Quotient {
  float absmax, inverse;
  bool divides;

  __device__ __forceinline__ static Quotient of(float most) {
    const bool divides =
        most > 0.0f && (most < 0x1p-100f || most > 0x1p100f || (__float_as_uint(most) & 0x7FFFFF) == 0x7FFFFF);
    return {most, most > 0.0f ? __frcp_rn(most) : 0.0f, divides};
  }
  __device__ __forceinline__ float operator()(float value) const {
    const float size = fabsf(value);
    if (divides) return __fdiv_rn(size, absmax);
    const float q = __fmul_rn(size, inverse);
    return __fmaf_rn(__fmaf_rn(-q, absmax, size), inverse, q);
  }
};

// Position of the value of a map that is nearest to x in [0, 1].
__device__ __forceinline__ int nearest(const uint32_t* bucket, float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t entry = bucket[max(bits >> 16, kFirstBucket) - kFirstBucket];
  return static_cast<int>((entry >> 16) + ((bits & 0xFFFF) > (entry & 0xFFFF)));
}
__device__ __forceinline__ uint8_t encode_signed(const Tables& tables, float value, const Quotient& quotient) {
  const int k = nearest(tables.signed_bucket, quotient(value));
  const int moved = value > 0.0f ? k : -min(k, kNestedZero);
  return static_cast<uint8_t>(kNestedZero + (value == 0.0f ? 0 : moved));
}
__device__ __forceinline__ uint8_t encode_unsigned(const Tables& tables, float value, const Quotient& quotient) {
  return static_cast<uint8_t>(value == 0.0f ? 0 : nearest(tables.unsigned_bucket, quotient(value)));
}

__device__ __forceinline__ float largest_of_warp(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

constexpr int kPerLane = kMomentBlocksize / kWarp;

// N values of a lane from memory: as vectors of 16 bytes at most, or one by one up to `count`; zeros beyond.
template <typename T>
__device__ __forceinline__ void load_lane(const T* from, int count, bool aligned, T nothing, T (&to)[kPerLane]) {
  constexpr int kWide = 16 / sizeof(T) < kPerLane ? 16 / sizeof(T) : kPerLane;
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
  for (int i = 0; i < kPerLane; ++i) to[i] = i < count ? from[i] : nothing;
}
template <typename T>
__device__ __forceinline__ void store_lane(T* to, int count, bool aligned, const T (&from)[kPerLane]) {
  constexpr int kWide = 16 / sizeof(T) < kPerLane ? 16 / sizeof(T) : kPerLane;
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
// Threads   one warp per block of 256 values, eight neighbours a lane; four blocks a warp
// Assumes   a tensor, or a part of one, that begins with a block; the last block may be short
// Bound     memory: 16.1 bytes a value (10.1 for 16-bit parameters), with the look-ups close behind
template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    adamw_8bit_kernel(const __grid_constant__ Batch batch, const __grid_constant__ AdamW step,
                      const float* __restrict__ scale,  // [1] or null
                      int64_t* __restrict__ skipped) {  // [1]
  __shared__ Tables tables;
  copy_tables(tables);
  __syncthreads();
  const Place place = place_of(batch);
  const float factor = scale ? *scale : 1.0f;
  const int lane = threadIdx.x % kWarp;
  int refused = 0;
  for (int64_t block = place.begin + threadIdx.x / kWarp * kMomentBlocksize; block < place.end;
       block += kWarps * kMomentBlocksize) {
    const int64_t at = block + lane * kPerLane;
    const int count = static_cast<int>(max(min(place.end - at, static_cast<int64_t>(kPerLane)), int64_t{0}));
    T* const params = static_cast<T*>(place.tensor.param) + at;
    auto* const firsts = static_cast<uint8_t*>(place.tensor.exp_avg) + at;
    auto* const seconds = static_cast<uint8_t*>(place.tensor.exp_avg_sq) + at;
    float* const absmax = place.tensor.absmax + block / kMomentBlocksize * 2;
    T p[kPerLane], g[kPerLane];
    uint8_t first_code[kPerLane], second_code[kPerLane];
    load_lane(params, count, place.aligned, T(0.0f), p);
    load_lane(static_cast<const T*>(place.tensor.grad) + at, count, place.aligned, T(0.0f), g);
    load_lane(firsts, count, place.aligned, static_cast<uint8_t>(kNestedZero), first_code);
    load_lane(seconds, count, place.aligned, static_cast<uint8_t>(0), second_code);
    const float first_absmax = absmax[0], second_absmax = absmax[1];

    Moments moments[kPerLane];
    float first_peak = 0.0f, second_peak = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      moments[i] = {__fmul_rn(tables.signed_value[first_code[i]], first_absmax),
                    __fmul_rn(tables.unsigned_value[second_code[i]], second_absmax)};
      const float scaled = __fmul_rn(to_float(g[i]), factor);
      if (fabsf(scaled) < INFINITY) {
        moments[i] = moments_of(step, scaled, moments[i]);
        moments[i].first = fmaxf(fminf(moments[i].first, kMostFloat), -kMostFloat);  // an infinite absmax is none
        moments[i].second = fminf(moments[i].second, kMostFloat);
        round_to(param_of(step, to_float(p[i]), moments[i]), &p[i]);
      } else if (i < count) {
        ++refused;
      }
      first_peak = fmaxf(first_peak, fabsf(moments[i].first));
      second_peak = fmaxf(second_peak, moments[i].second);
    }
    store_lane(params, count, place.aligned, p);
    first_peak = largest_of_warp(first_peak);
    second_peak = largest_of_warp(second_peak);
    const Quotient first_quotient = Quotient::of(first_peak), second_quotient = Quotient::of(second_peak);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      first_code[i] = encode_signed(tables, moments[i].first, first_quotient);
      second_code[i] = encode_unsigned(tables, moments[i].second, second_quotient);
    }
    store_lane(firsts, count, place.aligned, first_code);
    store_lane(seconds, count, place.aligned, second_code);
    __syncwarp();  // every lane has read the old ones
    if (lane == 0) {
      absmax[0] = first_peak;
      absmax[1] = second_peak;
    }
  }
  add_skipped(refused, skipped);
}

template <typename T>
void launch(const Batch& batch, bool eight_bits, const AdamW& numbers, const float* scale, int64_t* skipped,
            cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(batch.first_piece[batch.count]);
  if (eight_bits) {
    adamw_8bit_kernel<T><<<grid, kThreads, 0, stream>>>(batch, numbers, scale, skipped);
  } else {
    adamw_kernel<T><<<grid, kThreads, 0, stream>>>(batch, numbers, scale, skipped);
  }
}

}  // namespace

Error adamw_step(const AdamWTensor* tensors, int64_t count, Dtype dtype, bool eight_bits, const AdamW& numbers,
                 const float* scale, int64_t* skipped, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto flush = [&](Batch& batch) {
    if (batch.count == 0) return;
    if (dtype == Dtype::f32) launch<float>(batch, eight_bits, numbers, scale, skipped, cuda_stream);
    if (dtype == Dtype::bf16) launch<__nv_bfloat16>(batch, eight_bits, numbers, scale, skipped, cuda_stream);
    if (dtype == Dtype::f16) launch<__half>(batch, eight_bits, numbers, scale, skipped, cuda_stream);
    batch.count = 0;
  };
  Batch batch{};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t pieces = (tensors[i].count + kPiece - 1) / kPiece;
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
