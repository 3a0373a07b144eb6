// CUDA's runtime with errors as exceptions and resources that free themselves, for code that is neither torch nor kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace nf4lora::cuda {

inline void require(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // taken: the next launch shall not find it
  std::string text("PagedAdamW: ");
  text.append(what).append(" must succeed, got: ").append(cudaGetErrorString(code));
  throw std::runtime_error(text);
}

// Makes a device current for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    require(cudaGetDevice(&before_), "cudaGetDevice");
    require(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

// A stream that does not wait for the default one. Waits for its work before it goes.
class Stream {
 public:
  Stream() { require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
  ~Stream() {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
  }
  Stream(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }
  void synchronize() const { require(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t stream_ = nullptr;
};

// A point in a stream's work. One that was never recorded is waited for by nobody.
class Event {
 public:
  Event() { require(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreateWithFlags"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  void record(cudaStream_t stream) const { require(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  void hold(cudaStream_t stream) const { require(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent"); }
  void synchronize() const { require(cudaEventSynchronize(event_), "cudaEventSynchronize"); }

 private:
  cudaEvent_t event_ = nullptr;
};

// Memory of one of the kinds that CUDA allocates.
template <cudaError_t (*release)(void*)>
class Memory {
 public:
  Memory() = default;
  ~Memory() {
    if (address) release(address);
  }
  Memory(const Memory&) = delete;
  void* address = nullptr;
};
using DeviceMemory = Memory<&cudaFree>;  // cudaMalloc, cudaMallocManaged
using PinnedMemory = Memory<&cudaFreeHost>;

}  // namespace nf4lora::cuda
