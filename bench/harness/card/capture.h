// The capture of streams into a graph: which calls it forbids, and which streams have joined it.
#pragma once

#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "streams.h"

namespace nf4lora::card {

struct Node {
  Work work;
  Frontier after;
};

struct Graph {
  std::vector<std::unique_ptr<Node>> nodes;  // in the order in which they were captured
};

struct Capture {
  uint64_t number;  // from 1
  cudaStreamCaptureMode mode;
  std::thread::id owner;
  Stream* origin;
  Graph* graph;
  std::vector<Stream*> streams;  // the origin first
  bool is_valid = true;
};

// One for all captures and what belongs to them.
extern std::recursive_mutex capture_mutex;
std::vector<Capture*>& active_captures();

// An error of the kind given, which makes the capture's graph useless.
cudaError_t invalidate(Capture& capture, cudaError_t error);

// Makes the stream go on after these nodes, as part of the capture.
void join(Capture& capture, Stream& stream, const Frontier& after);

}  // namespace nf4lora::card
