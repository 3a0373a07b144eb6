// Kernels with bugs to find: each mistake is planted where `bug` says so, and with `none` the kernels are right.
// tests/test_ptx_interpreter.py demands that every mistake is found, and nothing in the correct ones.
#include <cuda_bf16.h>

#include <cstdint>

enum Bug : int {
  none,
  // peak
  read_past_end,
  half_the_lanes,
  no_syncwarp,
  two_writers,
  misaligned,
  // gemm
  no_sync_after_wait,
  waits_for_a_group_too_few,
  no_sync_before_ldmatrix,
  no_sync_before_reuse,
  writes_row_past_end,
  divergent_sync,
};

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// out[w] = max |x[64 w .. 64 w + 63]|, one warp each; lane 0's value goes through shared memory to lane 31.
extern "C" __global__ void peak_kernel(const float* x,  // [count]
                                       float* out,      // [ceil(count / 64)]
                                       int count, int bug) {
  __shared__ float through[4];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int block = blockIdx.x * 4 + warp;
  if (block * 64 >= count) return;
  const int i = block * 64 + lane * 2;
  float peak = 0.0f;
  if (bug == misaligned && i + 2 < count) {
    const float2 pair = *reinterpret_cast<const float2*>(x + i + 1);
    peak = fmaxf(fabsf(pair.x), fabsf(pair.y));
  } else {
    const bool all = bug == read_past_end;
    peak = fmaxf(all || i < count ? fabsf(x[i]) : 0.0f, all || i + 1 < count ? fabsf(x[i + 1]) : 0.0f);
  }
  if (bug != half_the_lanes || lane % 2) {
    for (int distance = 16; distance; distance /= 2) {
      peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, distance));
    }
  }
  if (lane == 0) through[warp] = peak;
  if (bug != no_syncwarp) __syncwarp();
  if (lane == 31) out[bug == two_writers ? block / 2 : block] = through[warp];
}

// *total = the number of threads, by atomics: never a race.
extern "C" __global__ void count_kernel(unsigned* total) { atomicAdd(total, 1u); }

constexpr int kM = 32, kN = 8, kK = 16, kRow = kK + 8;  // rows of 48 bytes: ldmatrix wants multiples of 16

// y = a b^T in tiles of 32 x 8 by two warps: a comes through cp.async, two tiles deep; b is rounded to bfloat16 on its
// way to shared memory.
extern "C" __global__ void gemm_kernel(const __nv_bfloat16* a,  // [M, K]
                                       const float* b,          // [8, K]
                                       float* y,                // [M, 8]
                                       int M, int K, int bug) {
  extern __shared__ __align__(16) __nv_bfloat16 tiles[];  // [2][kM][kRow], then [kN][kRow]
  __nv_bfloat16* const b_tile = tiles + 2 * kM * kRow;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, first = blockIdx.x * kM;

  auto fetch = [&](int step) {  // 16 bytes a thread; a row past the end is filled with zeros
    const int row = thread / 2, column = thread % 2 * 8, bytes = first + row < M ? 16 : 0;
    const void* from = a + (bytes ? static_cast<int64_t>(first + row) * K + step * kK + column : 0);
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(tiles + (step % 2 * kM + row) * kRow + column));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  float sum[4] = {};
  fetch(0);
  for (int step = 0; step < K / kK; ++step) {
    const bool more = step + 1 < K / kK;
    if (more) fetch(step + 1);
    if (more && bug == waits_for_a_group_too_few) {
      asm volatile("cp.async.wait_group 2;" ::: "memory");
    } else if (more) {
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    for (int i = thread; i < kN * kK; i += 64) {
      b_tile[i / kK * kRow + i % kK] = __float2bfloat16(b[i / kK * K + step * kK + i % kK]);
    }
    if (bug == no_sync_after_wait) {
      __syncwarp();  // the other warp's rows are not waited for
    } else if (bug == divergent_sync) {
      if (thread < 40) __syncthreads();
    } else if (bug != no_sync_before_ldmatrix || step == 0) {
      __syncthreads();
    }
    unsigned fa[4], fb[2];
    const auto* a_row = tiles + (step % 2 * kM + warp * 16 + lane % 16) * kRow + lane / 16 * 8;
    const auto* b_row = b_tile + lane % 8 * kRow + lane / 8 % 2 * 8;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(a_row)))
                 : "memory");
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fb[0]), "=r"(fb[1])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(b_row)))
                 : "memory");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
    if (bug != no_sync_before_reuse) __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    const int row = first + warp * 16 + lane / 4 + i / 2 * 8;
    if (row < M + (bug == writes_row_past_end)) y[row * kN + lane % 4 * 2 + i % 2] = sum[i];
  }
}
