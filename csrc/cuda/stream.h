// The device and stream that an op must use, and how a failed launch is reported.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "../tensors.h"
#include "launch.h"

namespace nf4lora::cuda {

// Makes the tensor's device current for as long as it lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor);
  void* stream() const { return stream_; }  // torch's current stream

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_;
};

// Throws std::runtime_error where a launcher said what went wrong.
void require_launched(const char* op, Error error);

}  // namespace nf4lora::cuda
