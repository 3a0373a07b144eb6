// Tiles of 16-bit values in shared memory: how they come there, and how they become operands of the matrix instruction.
//
// A tile has rows of 64 values, 128 bytes: eight chunks of 16 bytes. A row is as long as the 32 banks of shared memory are
// wide, 4 bytes each, so a chunk takes four banks. A bank serves one lane at a time. A row is copied chunk beside chunk,
// which uses every bank once; ldmatrix, though, reads the same chunk of eight neighbouring rows at a time. In plain rows
// these eight would all lie in the same four banks, and be read one after the other. So chunk c of row r lies in the place
// of chunk c ^ (r % 8):
//
//             banks   0-3   4-7  8-11 12-15 16-19 20-23 24-27 28-31
//     row 0            0     1     2     3     4     5     6     7       <- the chunk that lies there
//     row 1            1     0     3     2     5     4     7     6
//     row 2            2     3     0     1     6     7     4     5
//     row 3            3     2     1     0     7     6     5     4
//     row 4            4     5     6     7     0     1     2     3
//     row 5            5     4     7     6     1     0     3     2
//     row 6            6     7     4     5     2     3     0     1
//     row 7            7     6     5     4     3     2     1     0
//     row 8            0     1     2     3     4     5     6     7       as row 0
//
// Each chunk number stands once in every row and, of rows 0 to 7, once in every column: chunk 0 of eight rows lies on the
// falling diagonal. Both a row and a column of chunks use all 32 banks once. (CUTLASS calls this a swizzle.)
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
