// Tiles of 16-bit values in shared memory: how they come there, and how they become operands of the matrix instruction.
//
// A tile has rows of 64 values, 128 bytes: eight chunks of 16 bytes. Chunk c of row r lies where chunk c ^ (r % 8) would,
// so that the same chunk of eight neighbouring rows, which ldmatrix reads at a time, lies in all 32 banks, as does a row.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"

namespace nf4lora::cuda {

constexpr int kTileColumns = 64;
constexpr int kChunks = kTileColumns / kChunk;

// Where a chunk of a tile begins, counted in values.
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return row * kTileColumns + ((chunk ^ (row % kChunks)) * kChunk);
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes that passes by the registers and the first cache level; where `exists` is false it writes
// zeros and reads nothing, wherever `from` points.
__device__ __forceinline__ void copy_async(void* to_shared, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}
// Ends a group of copies of this thread.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies, all but those of its latest kOpen groups.
template <int kOpen>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

// Four 8x8 matrices of 16-bit values: lane l names row l % 8 of matrix l / 8, and gets of each matrix row l / 4, columns
// 2 (l % 4) and the next.
__device__ __forceinline__ void load_matrices(unsigned (&values)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same, transposed: a lane gets of each matrix column l / 4, rows 2 (l % 4) and the next.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&values)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace nf4lora::cuda
