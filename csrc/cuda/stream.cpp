#include "stream.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace nf4lora::cuda {
namespace {

// The one symbol of libtorch_cuda that is needed is looked up in the library which torch has already loaded (RTLD_NOLOAD;
// it is loaded RTLD_LOCAL, so a global dlsym would miss it): linking to it would tie this binary to CUDA builds of torch.
void* current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  if (!getter || getter(device, &stream) != 0) {
    throw std::runtime_error("nf4lora: torch must have a current CUDA stream, got none; reinstall torch with CUDA");
  }
  return stream;
}

}  // namespace

OnDeviceOf::OnDeviceOf(const Tensor& tensor)
    : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}

void require_launched(const char* op, Error error) {
  if (error) throw std::runtime_error(std::string(op) + ": the CUDA kernel must run, got: " + error);
}

}  // namespace nf4lora::cuda
