// Allocation, copies and fills. Pages are the system's: zero, and taken when they are first written.
#include "memory.h"

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "counts.h"
#include "error.h"
#include "streams.h"

namespace nf4lora::card {
namespace {

struct Block {
  size_t bytes;
  cudaMemoryType type;
  bool is_mapped;  // by us, not registered by its owner
};

std::mutex mutex;
std::map<uintptr_t, Block> blocks;  // by address
size_t allocated = 0;               // of the device

constexpr size_t kPage = 4096;
size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

cudaError_t allocate(void** address, size_t bytes, cudaMemoryType type) {
  *address = nullptr;
  if (bytes == 0) return cudaSuccess;
  const size_t size = whole_pages(bytes);
  const std::lock_guard lock(mutex);
  const bool on_device = type == cudaMemoryTypeDevice;
  if (on_device && (size < bytes || size > memory_limit() - allocated)) return fail(cudaErrorMemoryAllocation);
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  if (on_device) allocated += size;
  blocks[reinterpret_cast<uintptr_t>(memory)] = {bytes, type, true};
  *address = memory;
  return cudaSuccess;
}

cudaError_t release(void* address, cudaMemoryType type) {
  if (!address) return cudaSuccess;
  const std::lock_guard lock(mutex);
  const auto block = blocks.find(reinterpret_cast<uintptr_t>(address));
  if (block == blocks.end() || block->second.type != type || !block->second.is_mapped) {
    return fail(cudaErrorInvalidValue);
  }
  const size_t size = whole_pages(block->second.bytes);
  if (type == cudaMemoryTypeDevice) allocated -= size;
  munmap(address, size);
  blocks.erase(block);
  return cudaSuccess;
}

// Both ends must be where the kind says: a real copy between the wrong ends fails or reads foreign memory.
bool is_on_device(const void* address) {
  const std::lock_guard lock(mutex);
  const auto where = reinterpret_cast<uintptr_t>(address);
  auto block = blocks.upper_bound(where);
  if (block == blocks.begin()) return false;
  --block;
  return where < block->first + block->second.bytes && block->second.type == cudaMemoryTypeDevice;
}
bool is_legal(const void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (bytes == 0 || kind == cudaMemcpyDefault) return true;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  return is_on_device(to) == to_device && is_on_device(from) == from_device;
}

}  // namespace

size_t memory_limit() {
  static const size_t limit = [] {
    const char* text = std::getenv("NF4LORA_CARD_BYTES");
    return text ? std::strtoull(text, nullptr, 10) : 141'000'000'000ull;
  }();
  return limit;
}

}  // namespace nf4lora::card

using namespace nf4lora::card;

extern "C" {

cudaError_t cudaMalloc(void** address, size_t bytes) {
  called<"cudaMalloc">();
  if (const cudaError_t error = refuse_in_capture()) return error;
  return allocate(address, bytes, cudaMemoryTypeDevice);
}
cudaError_t cudaFree(void* address) {
  called<"cudaFree">();
  if (const cudaError_t error = refuse_in_capture()) return error;
  return release(address, cudaMemoryTypeDevice);
}
cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  called<"cudaHostAlloc">();
  if (const cudaError_t error = refuse_in_capture()) return error;
  return allocate(address, bytes, cudaMemoryTypeHost);
}
cudaError_t cudaFreeHost(void* address) {
  called<"cudaFreeHost">();
  if (const cudaError_t error = refuse_in_capture()) return error;
  return release(address, cudaMemoryTypeHost);
}
cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
  called<"cudaHostRegister">();
  const std::lock_guard lock(mutex);
  blocks[reinterpret_cast<uintptr_t>(address)] = {bytes, cudaMemoryTypeHost, false};
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* address) {
  called<"cudaHostUnregister">();
  const std::lock_guard lock(mutex);
  const auto block = blocks.find(reinterpret_cast<uintptr_t>(address));
  if (block == blocks.end() || block->second.is_mapped) return fail(cudaErrorHostMemoryNotRegistered);
  blocks.erase(block);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  called<"cudaMemGetInfo">();
  const std::lock_guard lock(mutex);
  *total = memory_limit();
  *available = memory_limit() - allocated;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  called<"cudaPointerGetAttributes">();
  *attributes = {};
  attributes->type = cudaMemoryTypeUnregistered;
  attributes->device = -1;
  const std::lock_guard lock(mutex);
  const auto where = reinterpret_cast<uintptr_t>(address);
  auto block = blocks.upper_bound(where);
  if (block == blocks.begin()) return cudaSuccess;
  --block;
  if (where >= block->first + block->second.bytes) return cudaSuccess;
  attributes->type = block->second.type;
  attributes->device = 0;
  attributes->devicePointer = const_cast<void*>(address);
  if (block->second.type == cudaMemoryTypeHost) attributes->hostPointer = const_cast<void*>(address);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  called<"cudaMemcpyAsync">();
  if (!is_legal(to, from, bytes, kind)) return fail(cudaErrorInvalidValue);
  return enqueue(stream, [=] { std::memmove(to, from, bytes); });
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  called<"cudaMemcpy2DAsync">();
  if (width > to_pitch || width > from_pitch || !is_legal(to, from, width * height, kind)) {
    return fail(cudaErrorInvalidValue);
  }
  return enqueue(stream, [=] {
    for (size_t row = 0; row < height; ++row) {
      std::memmove(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
    }
  });
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  called<"cudaMemsetAsync">();
  if (bytes && !is_on_device(to)) return fail(cudaErrorInvalidValue);
  return enqueue(stream, [=] { std::memset(to, value, bytes); });
}
// These wait for the legacy stream.
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  called<"cudaMemcpy">();
  if (!is_legal(to, from, bytes, kind)) return fail(cudaErrorInvalidValue);
  return enqueue(cudaStreamLegacy, [=] { std::memmove(to, from, bytes); });
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  called<"cudaMemset">();
  if (bytes && !is_on_device(to)) return fail(cudaErrorInvalidValue);
  return enqueue(cudaStreamLegacy, [=] { std::memset(to, value, bytes); });
}

}  // extern "C"
