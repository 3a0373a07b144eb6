// The device: one, with the properties of an NVIDIA H200.
#include "device.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <string>

#include "counts.h"
#include "error.h"
#include "memory.h"

namespace nf4lora::card {
namespace {

std::atomic<bool> used{false};  // a real runtime makes the device's context on first use

// As the data sheet of the H200 and the CUDA programming guide's table for compute capability 9.0 have them.
cudaDeviceProp properties() {
  cudaDeviceProp p{};
  std::strcpy(p.name, "NVIDIA H200 that computes nothing");
  std::memset(p.uuid.bytes, 0x4e, sizeof p.uuid.bytes);
  p.major = 9, p.minor = 0;
  p.totalGlobalMem = memory_limit();
  p.multiProcessorCount = 132;
  p.warpSize = 32;
  p.maxThreadsPerBlock = 1024;
  p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024, p.maxThreadsDim[2] = 64;
  p.maxGridSize[0] = 0x7FFFFFFF, p.maxGridSize[1] = p.maxGridSize[2] = 65535;
  p.maxThreadsPerMultiProcessor = 2048;
  p.maxBlocksPerMultiProcessor = 32;
  p.regsPerBlock = p.regsPerMultiprocessor = 64 << 10;
  p.sharedMemPerBlock = 48 << 10;
  p.sharedMemPerBlockOptin = 227 << 10;
  p.sharedMemPerMultiprocessor = 228 << 10;
  p.reservedSharedMemPerBlock = 1 << 10;
  p.totalConstMem = 64 << 10;
  p.l2CacheSize = 50 << 20;
  p.memoryBusWidth = 6144;
  p.memPitch = 0x7FFFFFFF;
  p.textureAlignment = 512, p.texturePitchAlignment = 32, p.surfaceAlignment = 512;
  p.asyncEngineCount = 3;
  p.ECCEnabled = 1;
  p.canMapHostMemory = p.unifiedAddressing = p.concurrentKernels = p.streamPrioritiesSupported = 1;
  p.globalL1CacheSupported = p.localL1CacheSupported = p.computePreemptionSupported = p.cooperativeLaunch = 1;
  p.hostRegisterSupported = p.clusterLaunch = p.unifiedFunctionPointers = 1;
  p.pciBusID = 1;
  return p;
}

// What torch and nf4lora ask for. A number that stands nowhere here is refused by name.
int attribute(cudaDeviceAttr which) {
  const cudaDeviceProp p = properties();
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: return p.maxThreadsPerBlock;
    case cudaDevAttrMaxBlockDimX: return p.maxThreadsDim[0];
    case cudaDevAttrMaxBlockDimY: return p.maxThreadsDim[1];
    case cudaDevAttrMaxBlockDimZ: return p.maxThreadsDim[2];
    case cudaDevAttrMaxGridDimX: return p.maxGridSize[0];
    case cudaDevAttrMaxGridDimY: return p.maxGridSize[1];
    case cudaDevAttrMaxGridDimZ: return p.maxGridSize[2];
    case cudaDevAttrMaxSharedMemoryPerBlock: return static_cast<int>(p.sharedMemPerBlock);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return static_cast<int>(p.sharedMemPerBlockOptin);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return static_cast<int>(p.sharedMemPerMultiprocessor);
    case cudaDevAttrReservedSharedMemoryPerBlock: return static_cast<int>(p.reservedSharedMemPerBlock);
    case cudaDevAttrMaxRegistersPerBlock: return p.regsPerBlock;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return p.regsPerMultiprocessor;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return p.maxThreadsPerMultiProcessor;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return p.maxBlocksPerMultiProcessor;
    case cudaDevAttrWarpSize: return p.warpSize;
    case cudaDevAttrMultiProcessorCount: return p.multiProcessorCount;
    case cudaDevAttrComputeCapabilityMajor: return p.major;
    case cudaDevAttrComputeCapabilityMinor: return p.minor;
    case cudaDevAttrL2CacheSize: return p.l2CacheSize;
    case cudaDevAttrGlobalMemoryBusWidth: return p.memoryBusWidth;
    case cudaDevAttrClockRate: return 1'980'000;
    case cudaDevAttrMemoryClockRate: return 3'201'000;
    case cudaDevAttrCooperativeLaunch: return p.cooperativeLaunch;
    case cudaDevAttrUnifiedAddressing: return p.unifiedAddressing;
    case cudaDevAttrManagedMemory:
    case cudaDevAttrConcurrentManagedAccess:
    case cudaDevAttrPageableMemoryAccess:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrIpcEventSupport:
    case cudaDevAttrGPUDirectRDMASupported:
    case cudaDevAttrComputeMode: return 0;
    default: absent(("cudaDeviceGetAttribute(" + std::to_string(which) + ")").c_str());
  }
}

}  // namespace

bool is_used() { return used; }

}  // namespace nf4lora::card

using namespace nf4lora::card;

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  called<"cudaGetDeviceCount">();
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  called<"cudaGetDevice">();
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  called<"cudaSetDevice">();
  if (device != 0) return fail(cudaErrorInvalidDevice);
  used = true;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  called<"cudaGetDeviceProperties">();
  if (device != 0) return fail(cudaErrorInvalidDevice);
  *properties = nf4lora::card::properties();
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  called<"cudaDeviceGetAttribute">();
  if (device != 0) return fail(cudaErrorInvalidDevice);
  *value = attribute(which);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  called<"cudaDeviceGetPCIBusId">();
  if (device != 0) return fail(cudaErrorInvalidDevice);
  std::snprintf(text, static_cast<size_t>(length), "0000:01:00.0");
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  called<"cudaDeviceCanAccessPeer">();
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  called<"cudaDriverGetVersion">();
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  called<"cudaRuntimeGetVersion">();
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

}  // extern "C"
