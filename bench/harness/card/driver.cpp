// The driver (libcuda.so.1): torch loads it when it first uses a device, and asks the runtime for its functions by name
// before it knows whether it will call them.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <array>
#include <mutex>
#include <string>
#include <utility>

#include "counts.h"
#include "device.h"

namespace nf4lora::card {
namespace {

// Functions that end the process with the name under which they were asked for.
constexpr size_t kSlots = 256;
std::array<std::string, kSlots> names;
template <size_t i>
void absent_function() {
  absent(names[i].c_str());
}
template <size_t... i>
constexpr auto make_slots(std::index_sequence<i...>) {
  return std::array<void (*)(), sizeof...(i)>{&absent_function<i>...};
}
constexpr auto slots = make_slots(std::make_index_sequence<kSlots>{});

void* function_of(const char* name) {
  if (void* function = dlsym(RTLD_DEFAULT, name)) return function;
  static std::mutex mutex;
  static size_t taken = 0;
  const std::lock_guard lock(mutex);
  for (size_t i = 0; i < taken; ++i) {
    if (names[i] == name) return reinterpret_cast<void*>(slots[i]);
  }
  if (taken == kSlots) absent(name);
  names[taken] = name;
  return reinterpret_cast<void*>(slots[taken++]);
}

}  // namespace
}  // namespace nf4lora::card

using namespace nf4lora::card;

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  called<"cudaGetDriverEntryPointByVersion">();
  *function = function_of(name);
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_SUCCESS ? "no error" : "an error of the driver";
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0, *active = is_used();
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  static char the_only_one;
  *context = is_used() ? reinterpret_cast<CUcontext>(&the_only_one) : nullptr;
  return CUDA_SUCCESS;
}
// It never logs anything.
CUresult cuLogsRegisterCallback(CUlogsCallback, void*, CUlogsCallbackHandle* handle) {
  *handle = nullptr;
  return CUDA_SUCCESS;
}
CUresult cuLogsUnregisterCallback(CUlogsCallbackHandle) { return CUDA_SUCCESS; }

}  // extern "C"
