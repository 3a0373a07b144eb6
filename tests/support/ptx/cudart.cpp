// A CUDA runtime without a device, for Launchers in cudart.py: the host code that nvcc compiled from csrc/cuda calls
// these functions, and every launch, copy and fill goes on to Python. Entry points as in crt/host_runtime.h.
#include <cuda_runtime.h>

#include <map>
#include <string>

namespace {

// Host stub -> name in the PTX. Made on first use: the kernels register before this file's globals exist.
std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> map;
  return map;
}
struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} configuration;
cudaError_t last_error = cudaSuccess;

using Launch = void (*)(const char* kernel, const unsigned* grid, const unsigned* block, void** arguments,
                        uint64_t shared, int early);
using Fill = void (*)(uint64_t to, int value, uint64_t bytes);
using Fetch = void (*)(void* to, uint64_t from, uint64_t bytes);
Launch launch_handler;
Fill fill_handler;
Fetch fetch_handler;
int ptx_version;  // of the code that the interpreter runs
int card;         // the current device

bool is_legal(const dim3& grid, const dim3& block) {
  const bool counts = grid.x && grid.y && grid.z && block.x && block.y && block.z;
  const bool grid_fits = grid.x <= 0x7FFFFFFFu && grid.y <= 65535 && grid.z <= 65535;
  return counts && grid_fits && block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
         block.x * block.y * block.z <= 1024;
}

}  // namespace

extern "C" {

void nf4lora_test_handlers(Launch launch, Fill fill, Fetch fetch, int version, int current) {
  ptx_version = version;
  card = current;
  launch_handler = launch;
  fill_handler = fill;
  fetch_handler = fetch;
}
void nf4lora_test_fail_next(int error) { last_error = static_cast<cudaError_t>(error); }

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[stub] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (!is_legal(grid, block)) return last_error = cudaErrorInvalidConfiguration;
  const unsigned grid_extent[3] = {grid.x, grid.y, grid.z}, block_extent[3] = {block.x, block.y, block.z};
  int early = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id != cudaLaunchAttributeProgrammaticStreamSerialization)
      return last_error = cudaErrorInvalidValue;
    early = config->attrs[i].val.programmaticStreamSerializationAllowed;
  }
  launch_handler(kernels().at(stub).c_str(), grid_extent, block_extent, arguments, config->dynamicSmemBytes, early);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream;
  return cudaLaunchKernelExC(&config, stub, arguments);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = ptx_version;
  return cudaSuccess;
}
// CUDA 13 launches through handles; the stub itself serves as one.
cudaError_t __cudaGetKernel(const void** kernel, const void* stub) {
  *kernel = stub;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  fill_handler(reinterpret_cast<uint64_t>(to), value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  if (kind != cudaMemcpyDeviceToHost) return last_error = cudaErrorInvalidMemcpyDirection;
  fetch_handler(to, reinterpret_cast<uint64_t>(from), bytes);
  return cudaSuccess;
}
// A device for every card and architecture, since launchers keep what they have asked of a device.
cudaError_t cudaGetDevice(int* device) {
  *device = card * 60 + ptx_version - 75;
  return cudaSuccess;
}
// Card 0 is small, so that blocks which stay have more than one turn; card 1 is as large as an H200.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const bool is_small = device < 60;
  if (attribute == cudaDevAttrMultiProcessorCount) return *value = is_small ? 2 : 132, cudaSuccess;
  const int shared = is_small ? 164 : 228;
  if (attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor) return *value = shared << 10, cudaSuccess;
  if (attribute == cudaDevAttrComputeCapabilityMajor) return *value = ptx_version / 10, cudaSuccess;
  if (attribute == cudaDevAttrComputeCapabilityMinor) return *value = ptx_version % 10, cudaSuccess;
  return last_error = cudaErrorInvalidValue;
}
// More than 48 KB of dynamic shared memory are asked for; 99 KB is what every architecture from sm_80 on has.
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  const bool fits = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value <= 99 * 1024;
  return fits ? cudaSuccess : last_error = cudaErrorInvalidValue;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return last_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "an error of the test";
}

}  // extern "C"
