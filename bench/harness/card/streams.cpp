// Streams, events and waiting. Work is done as soon as it is queued, so waiting takes no time; in capture it is refused.
#include "streams.h"

#include <chrono>

#include "capture.h"
#include "counts.h"
#include "error.h"

namespace nf4lora::card {
namespace {

double now() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

cudaError_t create(cudaStream_t* handle, unsigned flags, int priority) {
  *handle = reinterpret_cast<cudaStream_t>(new Stream{flags, priority});
  return cudaSuccess;
}

// To wait for or to ask about a stream that is being captured is an error.
cudaError_t refuse_captured(cudaStream_t handle) {
  if (captures.load(std::memory_order_acquire) == 0) return cudaSuccess;
  const std::lock_guard lock(capture_mutex);
  Stream& stream = stream_of(handle);
  if (stream.capture) return invalidate(*stream.capture, cudaErrorStreamCaptureUnsupported);
  bool was_captured = false;
  if (&stream != &stream_of(cudaStreamLegacy)) return cudaSuccess;
  return enqueue_in_capture(handle, [] {}, was_captured);  // it waits for every blocking stream
}

Capture* active_capture(uint64_t number) {
  for (Capture* capture : active_captures()) {
    if (capture->number == number) return capture;
  }
  return nullptr;
}

// The same of an event that was recorded in one.
cudaError_t refuse_captured(const Event& event) {
  if (event.capture == 0) return cudaSuccess;
  const std::lock_guard lock(capture_mutex);
  Capture* capture = active_capture(event.capture);
  return capture ? invalidate(*capture, cudaErrorCapturedEvent) : fail(cudaErrorCapturedEvent);
}

cudaError_t record(cudaEvent_t handle, cudaStream_t stream_handle, bool is_external) {
  Event& event = event_of(handle);
  const auto now_recorded = [&event] {
    event.is_recorded = true;
    event.capture = 0;
    if (!(event.flags & cudaEventDisableTiming)) event.milliseconds = now();
  };
  if (captures.load(std::memory_order_acquire) != 0) {
    const std::lock_guard lock(capture_mutex);
    Stream& stream = stream_of(stream_handle);
    if (stream.capture && !is_external) {
      if (!stream.capture->is_valid) return fail(cudaErrorStreamCaptureInvalidated);
      event.is_recorded = true;
      event.capture = stream.capture->number;
      event.frontier = stream.frontier;
      return cudaSuccess;
    }
  }
  return enqueue(stream_handle, now_recorded);
}

}  // namespace

Stream& stream_of(cudaStream_t handle) {
  static Stream legacy{cudaStreamDefault, 0};
  thread_local Stream per_thread{cudaStreamDefault, 0};
  if (!handle || handle == cudaStreamLegacy) return legacy;
  if (handle == cudaStreamPerThread) return per_thread;
  return *reinterpret_cast<Stream*>(handle);
}

}  // namespace nf4lora::card

using namespace nf4lora::card;

extern "C" {

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  called<"cudaStreamCreate">();
  return create(stream, cudaStreamDefault, 0);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  called<"cudaStreamCreateWithFlags">();
  return create(stream, flags, 0);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  called<"cudaStreamCreateWithPriority">();
  return create(stream, flags, priority);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  called<"cudaStreamDestroy">();
  delete reinterpret_cast<Stream*>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  called<"cudaStreamGetPriority">();
  *priority = stream_of(stream).priority;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  called<"cudaDeviceGetStreamPriorityRange">();
  *least = 0, *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  called<"cudaStreamQuery">();
  return refuse_captured(stream);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  called<"cudaStreamSynchronize">();
  return refuse_captured(stream);
}
cudaError_t cudaDeviceSynchronize() {
  called<"cudaDeviceSynchronize">();
  if (captures.load(std::memory_order_acquire) == 0) return cudaSuccess;
  const std::lock_guard lock(capture_mutex);
  cudaError_t error = cudaSuccess;
  for (Capture* capture : active_captures()) error = invalidate(*capture, cudaErrorStreamCaptureUnsupported);
  return error;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned flags) {
  called<"cudaStreamWaitEvent">();
  const Event& event = event_of(event_handle);
  if (captures.load(std::memory_order_acquire) == 0 && event.capture == 0) return cudaSuccess;
  const std::lock_guard lock(capture_mutex);
  Stream& stream = stream_of(handle);
  if (flags & cudaEventWaitExternal) return enqueue(handle, [] {});
  if (event.capture == 0) {
    if (!stream.capture || !event.is_recorded) return cudaSuccess;
    return invalidate(*stream.capture, cudaErrorStreamCaptureIsolation);
  }
  Capture* capture = active_capture(event.capture);
  if (!capture) return fail(cudaErrorCapturedEvent);
  if (!capture->is_valid) return fail(cudaErrorStreamCaptureInvalidated);
  if (stream.capture && stream.capture != capture) {
    invalidate(*stream.capture, cudaErrorStreamCaptureMerge);
    return invalidate(*capture, cudaErrorStreamCaptureMerge);
  }
  if (&stream == &stream_of(cudaStreamLegacy)) return invalidate(*capture, cudaErrorStreamCaptureImplicit);
  join(*capture, stream, event.frontier);
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  called<"cudaLaunchHostFunc">();
  return enqueue(stream, [=] { function(data); });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  called<"cudaEventCreateWithFlags">();
  *event = reinterpret_cast<cudaEvent_t>(new Event{flags});
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  called<"cudaEventCreate">();
  *event = reinterpret_cast<cudaEvent_t>(new Event{cudaEventDefault});
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  called<"cudaEventDestroy">();
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  called<"cudaEventRecord">();
  return record(event, stream, false);
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  called<"cudaEventRecordWithFlags">();
  return record(event, stream, flags & cudaEventRecordExternal);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  called<"cudaEventQuery">();
  if (const cudaError_t error = refuse_captured(event_of(event))) return error;
  return refuse_in_capture();
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  called<"cudaEventSynchronize">();
  if (const cudaError_t error = refuse_captured(event_of(event))) return error;
  return refuse_in_capture();
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  called<"cudaEventElapsedTime">();
  const Event &from = event_of(start), &to = event_of(end);
  for (const Event* event : {&from, &to}) {
    if (const cudaError_t error = refuse_captured(*event)) return error;
    if (!event->is_recorded || event->flags & cudaEventDisableTiming) return fail(cudaErrorInvalidResourceHandle);
  }
  *milliseconds = static_cast<float>(to.milliseconds - from.milliseconds);
  return cudaSuccess;
}

}  // extern "C"
