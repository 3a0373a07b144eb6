// Kernels: they are registered by name, launched, counted, and do nothing. A launch that a real device would refuse for
// its grid, its block or its shared memory is refused here too.
#include "launches.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "counts.h"
#include "error.h"

namespace nf4lora::card {
namespace {

struct Kernel {
  Counter counter;
  int dynamic_shared = 48 << 10;  // bytes that a launch may ask for, unless cudaFuncSetAttribute allows more
};
constexpr int kMostShared = 227 << 10;

// By the host's stub, which stands for the kernel in the caller's code. CUDA 13 launches by a handle: a kernel's address.
// The names are kept until the kernel is asked for: torch registers tens of thousands, and launches few.
struct Registry {
  std::mutex mutex;
  std::unordered_map<const void*, const char*> names;
  std::unordered_map<const void*, Kernel*> kernels;
  std::unordered_map<const void*, Kernel*> handles;
};
Registry& registry() {
  static auto* all = new Registry;  // outlives the libraries that use it
  return *all;
}

Kernel* kernel_of(const void* stub_or_handle) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  for (const auto* known : {&all.kernels, &all.handles}) {
    if (const auto kernel = known->find(stub_or_handle); kernel != known->end()) return kernel->second;
  }
  const auto name = all.names.find(stub_or_handle);
  if (name == all.names.end()) return nullptr;
  auto* kernel = new Kernel{{Counter::launch, name->second}};
  all.kernels[stub_or_handle] = kernel;
  all.handles[kernel] = kernel;
  return kernel;
}

bool is_legal(const dim3& grid, const dim3& block) {
  const bool counts = grid.x && grid.y && grid.z && block.x && block.y && block.z;
  const bool grid_fits = grid.x <= 0x7FFFFFFFu && grid.y <= 65535 && grid.z <= 65535;
  return counts && grid_fits && block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
         block.x * block.y * block.z <= 1024;
}

cudaError_t launch(Kernel* kernel, const dim3& grid, const dim3& block, size_t shared, cudaStream_t stream) {
  if (!kernel) return fail(cudaErrorInvalidDeviceFunction);
  if (!is_legal(grid, block)) return fail(cudaErrorInvalidConfiguration);
  if (shared > static_cast<size_t>(kernel->dynamic_shared)) return fail(cudaErrorInvalidValue);
  return nf4lora::card::launch(kernel->counter, stream);
}

cudaError_t allow_shared(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (!kernel) return fail(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) absent("cudaFuncSetAttribute of another attribute");
  if (value > kMostShared) return fail(cudaErrorInvalidValue);
  kernel->dynamic_shared = std::max(value, kernel->dynamic_shared);
  return cudaSuccess;
}

// Blocks that fit by threads and dynamic shared memory: registers and static shared memory are in the machine code.
int blocks_of(int threads, size_t shared) {
  const int by_threads = threads > 0 ? 2048 / threads : 0;
  const int by_shared = static_cast<int>((228 << 10) / (shared + (1 << 10)));
  return std::min({by_threads, by_shared, 32});
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

}  // namespace

cudaError_t launch(Counter& counter, cudaStream_t stream) {
  if (captures.load(std::memory_order_acquire) != 0) {
    bool was_captured = false;
    if (const cudaError_t error = enqueue_in_capture(stream, [] {}, was_captured)) return error;
    if (was_captured) return counter.add_captured(), cudaSuccess;
  }
  counter.add();
  return cudaSuccess;
}

}  // namespace nf4lora::card

using namespace nf4lora::card;

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  all.names[stub] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration& last = configurations.back();
  *grid = last.grid, *block = last.block, *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  configurations.pop_back();
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* handle, const void* stub) {
  *handle = reinterpret_cast<cudaKernel_t>(kernel_of(stub));
  return *handle ? cudaSuccess : fail(cudaErrorInvalidDeviceFunction);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t handle, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  called<"cudaLaunchKernel">();
  return launch(reinterpret_cast<Kernel*>(handle), grid, block, shared, stream);
}
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  called<"cudaLaunchKernel">();
  return launch(kernel_of(stub), grid, block, shared, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void* stub, dim3 grid, dim3 block, void**, size_t shared,
                                        cudaStream_t stream) {
  called<"cudaLaunchCooperativeKernel">();
  return launch(kernel_of(stub), grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void**) {
  called<"cudaLaunchKernelExC">();
  return launch(kernel_of(stub), config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
  called<"cudaFuncGetAttributes">();
  const Kernel* kernel = kernel_of(stub);
  if (!kernel) return fail(cudaErrorInvalidDeviceFunction);
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 64;  // as many as leave every block of 1024 threads one place
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxDynamicSharedSizeBytes = kernel->dynamic_shared;
  attributes->preferredShmemCarveout = -1;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  called<"cudaFuncSetAttribute">();
  return allow_shared(kernel_of(stub), attribute, value);
}
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t handle, cudaFuncAttribute attribute, int value, int) {
  called<"cudaKernelSetAttributeForDevice">();
  return allow_shared(reinterpret_cast<Kernel*>(handle), attribute, value);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t shared) {
  called<"cudaOccupancyMaxActiveBlocksPerMultiprocessor">();
  *blocks = blocks_of(threads, shared);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads, size_t shared,
                                                                   unsigned) {
  called<"cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags">();
  *blocks = blocks_of(threads, shared);
  return cudaSuccess;
}

}  // extern "C"
