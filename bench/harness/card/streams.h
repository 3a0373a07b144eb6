// Streams and events as the card keeps them, and the one way by which work enters a stream.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

namespace nf4lora::card {

struct Capture;
struct Node;
// The last nodes of a graph that something follows.
using Frontier = std::vector<Node*>;

struct Stream {
  unsigned flags;
  int priority;
  Capture* capture = nullptr;  // of which it is a part at present
  Frontier frontier{};         // in that capture
};

struct Event {
  unsigned flags;
  bool is_recorded = false;
  double milliseconds = 0;  // when it was recorded
  uint64_t capture = 0;     // the number of the capture in which it was recorded last, or 0
  Frontier frontier{};      // in that capture
};

// Of a null handle, cudaStreamLegacy, cudaStreamPerThread, or one that cudaStreamCreate gave out.
Stream& stream_of(cudaStream_t handle);
inline Event& event_of(cudaEvent_t handle) { return *reinterpret_cast<Event*>(handle); }

using Work = std::function<void()>;
extern std::atomic<int> captures;  // that have begun and not ended

// Appends the work to the graph if the stream is being captured; `was_captured` says so. May fail as a real stream does.
cudaError_t enqueue_in_capture(cudaStream_t stream, Work work, bool& was_captured);

// Does the work now, as a device that is infinitely fast would, or in capture leaves it to the graph.
template <class Function>
cudaError_t enqueue(cudaStream_t stream, Function&& work) {
  if (captures.load(std::memory_order_acquire) != 0) {
    bool was_captured = false;
    const cudaError_t error = enqueue_in_capture(stream, work, was_captured);
    if (error || was_captured) return error;
  }
  work();
  return cudaSuccess;
}

// What calls that CUDA names potentially unsafe (cudaMalloc, cudaEventQuery) ask first: an error, which invalidates the
// captures concerned, where the mode of a capture forbids them to this thread.
cudaError_t refuse_in_capture();

}  // namespace nf4lora::card
