// Captures and graphs. The rules are those of the CUDA programming guide, "Creating a Graph Using Stream Capture", and of
// cudaThreadExchangeStreamCaptureMode in the reference of the runtime.
#include "capture.h"

#include <algorithm>
#include <memory>
#include <set>
#include <utility>

#include "counts.h"
#include "error.h"

namespace nf4lora::card {

std::atomic<int> captures{0};
std::recursive_mutex capture_mutex;

std::vector<Capture*>& active_captures() {
  static std::vector<Capture*> active;
  return active;
}

namespace {

thread_local cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;

bool forbids_unsafe_calls(const Capture& capture) {
  if (mode_of_thread == cudaStreamCaptureModeRelaxed) return false;
  if (capture.owner == std::this_thread::get_id()) return capture.mode != cudaStreamCaptureModeRelaxed;
  return mode_of_thread == cudaStreamCaptureModeGlobal && capture.mode == cudaStreamCaptureModeGlobal;
}

// Whether the origin, where it is now, comes after all that the capture's streams have done.
bool is_joined(const Capture& capture) {
  std::set<const Node*> reached;
  Frontier open = capture.origin->frontier;
  while (!open.empty()) {
    const Node* node = open.back();
    open.pop_back();
    if (reached.insert(node).second) open.insert(open.end(), node->after.begin(), node->after.end());
  }
  return std::all_of(capture.streams.begin(), capture.streams.end(), [&](const Stream* stream) {
    const Frontier& ends = stream->frontier;
    return std::all_of(ends.begin(), ends.end(), [&](const Node* node) { return reached.count(node) > 0; });
  });
}

// A graph that was instantiated: its work, which no longer needs the graph.
using Executable = std::vector<Work>;

}  // namespace

cudaError_t invalidate(Capture& capture, cudaError_t error) {
  capture.is_valid = false;
  return fail(error);
}

void join(Capture& capture, Stream& stream, const Frontier& after) {
  if (!stream.capture) {
    stream.capture = &capture;
    stream.frontier.clear();
    capture.streams.push_back(&stream);
  }
  for (Node* node : after) {
    if (std::find(stream.frontier.begin(), stream.frontier.end(), node) == stream.frontier.end()) {
      stream.frontier.push_back(node);
    }
  }
}

cudaError_t refuse_in_capture() {
  if (captures.load(std::memory_order_acquire) == 0) return cudaSuccess;
  const std::lock_guard lock(capture_mutex);
  cudaError_t error = cudaSuccess;
  for (Capture* capture : active_captures()) {
    if (forbids_unsafe_calls(*capture)) error = invalidate(*capture, cudaErrorStreamCaptureUnsupported);
  }
  return error;
}

cudaError_t enqueue_in_capture(cudaStream_t handle, Work work, bool& was_captured) {
  const std::lock_guard lock(capture_mutex);
  Stream& stream = stream_of(handle);
  if (&stream == &stream_of(cudaStreamLegacy)) {
    for (Capture* capture : active_captures()) {  // the legacy stream waits for every blocking one
      const auto blocks = [](const Stream* other) { return !(other->flags & cudaStreamNonBlocking); };
      if (std::any_of(capture->streams.begin(), capture->streams.end(), blocks)) {
        return invalidate(*capture, cudaErrorStreamCaptureImplicit);
      }
    }
  }
  if (!stream.capture) return cudaSuccess;
  was_captured = true;
  if (!stream.capture->is_valid) return fail(cudaErrorStreamCaptureInvalidated);
  auto& nodes = stream.capture->graph->nodes;
  nodes.push_back(std::make_unique<Node>(std::move(work), std::move(stream.frontier)));
  stream.frontier = {nodes.back().get()};
  return cudaSuccess;
}

}  // namespace nf4lora::card

using namespace nf4lora::card;

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  called<"cudaStreamBeginCapture">();
  const std::lock_guard lock(capture_mutex);
  static uint64_t begun = 0;
  Stream& stream = stream_of(handle);
  if (&stream == &stream_of(cudaStreamLegacy)) return fail(cudaErrorStreamCaptureUnsupported);
  if (stream.capture) return fail(cudaErrorIllegalState);
  auto* capture = new Capture{++begun, mode, std::this_thread::get_id(), &stream, new Graph, {}};
  join(*capture, stream, {});
  active_captures().push_back(capture);
  ++captures;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  called<"cudaStreamEndCapture">();
  *graph = nullptr;
  const std::lock_guard lock(capture_mutex);
  Stream& stream = stream_of(handle);
  if (!stream.capture) return fail(cudaErrorIllegalState);
  if (stream.capture->origin != &stream) return invalidate(*stream.capture, cudaErrorStreamCaptureUnmatched);
  if (stream.capture->mode != cudaStreamCaptureModeRelaxed && stream.capture->owner != std::this_thread::get_id()) {
    return fail(cudaErrorStreamCaptureWrongThread);
  }
  const std::unique_ptr<Capture> capture(stream.capture);
  std::unique_ptr<Graph> captured(capture->graph);
  const cudaError_t error = !capture->is_valid     ? cudaErrorStreamCaptureInvalidated
                            : !is_joined(*capture) ? cudaErrorStreamCaptureUnjoined
                                                   : cudaSuccess;
  for (Stream* other : capture->streams) other->capture = nullptr;
  std::erase(active_captures(), capture.get());
  --captures;
  if (error) return fail(error);
  *graph = reinterpret_cast<cudaGraph_t>(captured.release());
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  called<"cudaStreamIsCapturing">();
  return cudaStreamGetCaptureInfo(handle, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* number,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  called<"cudaStreamGetCaptureInfo">();
  *status = cudaStreamCaptureStatusNone;
  if (captures.load(std::memory_order_acquire) == 0) return cudaSuccess;
  const std::lock_guard lock(capture_mutex);
  const Stream& stream = stream_of(handle);
  const Capture* capture = stream.capture;
  if (!capture) return cudaSuccess;
  static std::vector<cudaGraphEdgeData> plain_edges;
  if (edges) plain_edges.resize(std::max(plain_edges.size(), stream.frontier.size()));
  *status = capture->is_valid ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusInvalidated;
  if (number) *number = capture->number;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(capture->graph);
  if (dependencies) *dependencies = reinterpret_cast<const cudaGraphNode_t*>(stream.frontier.data());
  if (edges) *edges = plain_edges.data();
  if (count) *count = stream.frontier.size();
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  called<"cudaThreadExchangeStreamCaptureMode">();
  std::swap(*mode, mode_of_thread);
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  called<"cudaGraphGetNodes">();
  const auto& all = reinterpret_cast<Graph*>(graph)->nodes;
  if (nodes) {
    *count = std::min(*count, all.size());
    for (size_t i = 0; i < *count; ++i) nodes[i] = reinterpret_cast<cudaGraphNode_t>(all[i].get());
    return cudaSuccess;
  }
  *count = all.size();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  called<"cudaGraphInstantiateWithFlags">();
  auto* works = new Executable;
  for (const auto& node : reinterpret_cast<Graph*>(graph)->nodes) works->push_back(node->work);
  *executable = reinterpret_cast<cudaGraphExec_t>(works);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  called<"cudaGraphLaunch">();
  const auto* works = reinterpret_cast<Executable*>(executable);
  return enqueue(stream, [works] {
    for (const Work& work : *works) work();
  });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  called<"cudaGraphDestroy">();
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  called<"cudaGraphExecDestroy">();
  delete reinterpret_cast<Executable*>(executable);
  return cudaSuccess;
}

}  // extern "C"
