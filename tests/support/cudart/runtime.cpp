// A CUDA runtime in the memory of the host: blocks with residency page by page, streams that may run late and in any
// order that events allow, errors on request. It is a device for the pager's tests, and knows what a real one would not
// have put up with.
#include "runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <utility>

#include "cuda_runtime_api.h"

struct FakeEvent {
  uint64_t recorded = 0, reached = 0;
};
struct Work {
  FakeEvent* event;  // which must have reached `point` before
  uint64_t point;
  std::function<void()> run;
};
struct FakeStream {
  int number = 0;
  std::deque<Work> queue;
};

namespace {

constexpr int64_t kPage = 4096;

struct Block {
  char kind;  // d device, m managed, p pinned
  int64_t bytes;
  std::vector<bool> here;  // managed: pages on the device
};

struct Device {
  Settings settings;
  std::map<uintptr_t, Block> blocks;
  std::vector<std::unique_ptr<FakeStream>> streams;  // 0 is the caller's default
  std::vector<std::unique_ptr<FakeEvent>> events;    // kept until reset: late work may name them
  std::map<std::string, std::pair<int, int>> failures;
  std::vector<std::string> calls, wrongs;
  int64_t streams_alive = 0, events_alive = 0, faults = 0;
  int current = 0;
  cudaError_t last = cudaSuccess, lost = cudaSuccess;
  std::mt19937 random;
} device;

std::string text(const void* address) {  // relative to its block, so that logs can be compared
  auto at = reinterpret_cast<uintptr_t>(address);
  auto found = device.blocks.upper_bound(at);
  if (found == device.blocks.begin()) return "?";
  --found;
  return std::string(1, found->second.kind) + "+" + std::to_string(at - found->first);
}

cudaError_t answer(cudaError_t code) {
  if (code != cudaSuccess) device.last = code;
  return code;
}
// What the call returns where it was told to fail, after it was written down.
cudaError_t called(const std::string& function, const std::string& arguments) {
  device.calls.push_back(function + "(" + arguments + ")");
  if (device.lost != cudaSuccess) return answer(device.lost);
  auto planned = device.failures.find(function);
  if (planned == device.failures.end() || --planned->second.first > 0) return cudaSuccess;
  const auto code = static_cast<cudaError_t>(planned->second.second);
  device.failures.erase(planned);
  if (code == cudaErrorLaunchFailure) device.lost = code;
  return answer(code);
}
cudaError_t wrong(const std::string& what) {
  device.wrongs.push_back(what);
  return answer(cudaErrorInvalidValue);
}

Block* block_of(uintptr_t address, int64_t bytes, const std::string& kinds) {
  auto found = device.blocks.upper_bound(address);
  if (found == device.blocks.begin()) return nullptr;
  --found;
  const int64_t offset = static_cast<int64_t>(address - found->first);
  const bool held = offset + bytes <= found->second.bytes && kinds.find(found->second.kind) != std::string::npos;
  return held ? &found->second : nullptr;
}
std::pair<int64_t, int64_t> pages_of(uintptr_t address, int64_t bytes) {
  auto found = --device.blocks.upper_bound(address);
  const int64_t offset = static_cast<int64_t>(address - found->first);
  return {offset / kPage, (offset + bytes + kPage - 1) / kPage};
}

int64_t managed_here() {
  int64_t pages = 0;
  for (const auto& [address, block] : device.blocks) pages += std::count(block.here.begin(), block.here.end(), true);
  return pages * kPage;
}
int64_t room() {
  int64_t taken = device.settings.others + managed_here();
  for (const auto& [address, block] : device.blocks) taken += block.kind == 'd' ? block.bytes : 0;
  return std::max<int64_t>(0, device.settings.total - taken);
}
void make_room(int64_t bytes, const Block* except) {  // as the driver evicts: managed pages give way
  for (auto& [address, block] : device.blocks) {
    for (size_t page = 0; page < block.here.size() && room() < bytes; ++page) {
      if (&block != except || room() < bytes) block.here[page] = false;
    }
  }
}
void bring(uintptr_t address, int64_t bytes, bool here, bool by_fault) {
  Block* block = block_of(address, bytes, "m");
  const auto [first, last] = pages_of(address, bytes);
  int64_t missing = 0;
  for (int64_t page = first; page < last; ++page) missing += here && !block->here[static_cast<size_t>(page)];
  if (missing * kPage > room()) {
    if (!by_fault) device.wrongs.push_back("prefetch of more than is free");
    make_room(missing * kPage, block);
  }
  if (by_fault) device.faults += missing;
  for (int64_t page = first; page < last; ++page) block->here[static_cast<size_t>(page)] = here;
}

bool run_one() {
  std::vector<FakeStream*> ready;
  for (auto& stream : device.streams) {
    if (stream->queue.empty()) continue;
    const Work& work = stream->queue.front();
    if (!work.event || work.event->reached >= work.point) ready.push_back(stream.get());
  }
  if (ready.empty()) return false;
  FakeStream* stream = ready[device.random() % ready.size()];
  Work work = std::move(stream->queue.front());
  stream->queue.pop_front();
  if (work.run) work.run();
  return true;
}
void drain(const FakeStream* stream) {
  while (!stream->queue.empty()) {
    if (!run_one()) {
      device.wrongs.push_back("streams wait for each other");
      return;
    }
  }
}
void enqueue(FakeStream* stream, Work work) {
  if (!stream) stream = device.streams[0].get();
  stream->queue.push_back(std::move(work));
  if (!device.settings.deferred) finish();
}
std::string name_of(const FakeStream* stream) { return "stream " + std::to_string(stream ? stream->number : 0); }

cudaError_t allocate(const char* function, char kind, void** address, size_t bytes) {
  if (const cudaError_t code = called(function, std::to_string(bytes)); code != cudaSuccess) return code;
  const auto size = static_cast<int64_t>(bytes);
  if (kind == 'd') {
    make_room(size, nullptr);
    if (size > room()) return answer(cudaErrorMemoryAllocation);
  }
  *address = std::aligned_alloc(kPage, static_cast<size_t>((size + kPage - 1) / kPage * kPage));
  std::memset(*address, kind == 'm' ? 0 : 0xA5, bytes);
  Block block{kind, size, {}};
  if (kind == 'm') block.here.assign(static_cast<size_t>((size + kPage - 1) / kPage), false);
  device.blocks.emplace(reinterpret_cast<uintptr_t>(*address), std::move(block));
  return cudaSuccess;
}
cudaError_t give_back(const char* function, void* address, const std::string& kinds) {
  if (const cudaError_t code = called(function, text(address)); code != cudaSuccess) return code;
  if (kinds != "p") finish();  // as cudaFree waits for the device
  const auto found = device.blocks.find(reinterpret_cast<uintptr_t>(address));
  if (found == device.blocks.end()) return wrong(std::string(function) + " of what was not allocated");
  if (kinds.find(found->second.kind) == std::string::npos) return wrong(std::string(function) + " of another kind");
  std::memset(address, 0xDD, static_cast<size_t>(found->second.bytes));
  std::free(address);
  device.blocks.erase(found);
  return cudaSuccess;
}
cudaError_t place_check(const char* function, const void* address, size_t bytes, int where) {
  if (where != cudaCpuDeviceId && where != 0) {
    device.wrongs.push_back(std::string(function) + " to device " + std::to_string(where));
    return answer(cudaErrorInvalidDevice);
  }
  if (where != cudaCpuDeviceId && !device.settings.faults) return wrong(std::string(function) + " on a weak device");
  if (!block_of(reinterpret_cast<uintptr_t>(address), static_cast<int64_t>(bytes), "m")) {
    return wrong(std::string(function) + " outside managed memory");
  }
  return cudaSuccess;
}
std::string place_name(int where) { return where == cudaCpuDeviceId ? "host" : "device " + std::to_string(where); }

cudaError_t prefetch(const void* address, size_t bytes, int where, cudaStream_t stream) {
  const std::string arguments = text(address) + ", " + std::to_string(bytes) + ", " + place_name(where) + ", ";
  cudaError_t code = called("cudaMemPrefetchAsync", arguments + name_of(stream));
  if (code == cudaSuccess) code = place_check("cudaMemPrefetchAsync", address, bytes, where);
  if (code != cudaSuccess) return code;
  const auto at = reinterpret_cast<uintptr_t>(address);
  enqueue(stream, {nullptr, 0, [=] { bring(at, static_cast<int64_t>(bytes), where != cudaCpuDeviceId, false); }});
  return cudaSuccess;
}
cudaError_t advise(const void* address, size_t bytes, int where) {
  const std::string arguments = text(address) + ", " + std::to_string(bytes) + ", prefer " + place_name(where);
  const cudaError_t code = called("cudaMemAdvise", arguments);
  return code == cudaSuccess ? place_check("cudaMemAdvise", address, bytes, where) : code;
}

}  // namespace

// ---- what the test asks

void reset(const Settings& settings) {
  for (auto& [address, block] : device.blocks) std::free(reinterpret_cast<void*>(address));
  device = {};
  device.settings = settings;
  device.random.seed(settings.seed);
  device.streams.push_back(std::make_unique<FakeStream>());
}
void set_others(int64_t bytes) {
  device.settings.others = bytes;
  make_room(0, nullptr);
  int64_t taken = bytes;
  for (const auto& [address, block] : device.blocks) taken += block.kind == 'd' ? block.bytes : 0;
  for (auto& [address, block] : device.blocks) {
    for (size_t page = 0; page < block.here.size() && taken + managed_here() > device.settings.total; ++page) {
      block.here[page] = false;
    }
  }
}
void fail(const std::string& function, int nth, int code) { device.failures[function] = {nth, code}; }
std::vector<std::string> calls() { return std::exchange(device.calls, {}); }
std::vector<std::string> wrongs() { return device.wrongs; }
std::map<std::string, int64_t> alive() {
  return {{"blocks", static_cast<int64_t>(device.blocks.size())},
          {"streams", device.streams_alive},
          {"events", device.events_alive}};
}
int64_t resident(uintptr_t address, int64_t bytes) {
  const Block* block = block_of(address, bytes, "m");
  if (!block) return -1;
  const auto [first, last] = pages_of(address, bytes);
  return std::count(block->here.begin() + first, block->here.begin() + last, true) * kPage;
}
int64_t faults() { return device.faults; }
uintptr_t new_stream() {
  auto& stream = device.streams.emplace_back(std::make_unique<FakeStream>());
  stream->number = static_cast<int>(device.streams.size()) - 1;
  return reinterpret_cast<uintptr_t>(stream.get());
}
void kernel(uintptr_t stream, const std::vector<std::tuple<uintptr_t, int64_t>>& ranges) {
  enqueue(reinterpret_cast<FakeStream*>(stream), {nullptr, 0, [ranges] {
                                                    for (const auto& [address, bytes] : ranges) {
                                                      if (!block_of(address, bytes, "dm")) {
                                                        device.wrongs.push_back("kernel outside the device's memory");
                                                        continue;
                                                      }
                                                      if (block_of(address, bytes, "m"))
                                                        bring(address, bytes, true, true);
                                                      auto* value = reinterpret_cast<uint8_t*>(address);
                                                      for (int64_t i = 0; i < bytes; ++i)
                                                        value[i] = static_cast<uint8_t>(3 * value[i] + 1);
                                                    }
                                                  }});
}
void finish() {
  for (const auto& stream : device.streams) drain(stream.get());
}

// ---- what the pager calls

cudaError_t cudaGetLastError() { return std::exchange(device.last, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t code) {
  switch (code) {
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorNotSupported: return "operation not supported";
    default: return "no error";
  }
}
cudaError_t cudaGetDevice(int* number) {
  *number = device.current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int number) {
  if (number != 0) return answer(cudaErrorInvalidDevice);
  device.current = number;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = device.settings.faults;
  return called("cudaDeviceGetAttribute", "concurrentManagedAccess");
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = static_cast<size_t>(room());
  *total = static_cast<size_t>(device.settings.total);
  return called("cudaMemGetInfo", "");
}

cudaError_t cudaMalloc(void** address, size_t bytes) { return allocate("cudaMalloc", 'd', address, bytes); }
cudaError_t cudaMallocManaged(void** address, size_t bytes, unsigned) {
  return allocate("cudaMallocManaged", 'm', address, bytes);
}
cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  return allocate("cudaHostAlloc", 'p', address, bytes);
}
cudaError_t cudaFree(void* address) { return give_back("cudaFree", address, "dm"); }
cudaError_t cudaFreeHost(void* address) { return give_back("cudaFreeHost", address, "p"); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  if (const cudaError_t code = called("cudaStreamCreateWithFlags", ""); code != cudaSuccess) return code;
  *stream = reinterpret_cast<cudaStream_t>(new_stream());
  ++device.streams_alive;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  --device.streams_alive;
  return called("cudaStreamDestroy", name_of(stream));
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (const cudaError_t code = called("cudaStreamSynchronize", name_of(stream)); code != cudaSuccess) return code;
  drain(stream ? stream : device.streams[0].get());
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (const cudaError_t code = called("cudaStreamWaitEvent", name_of(stream)); code != cudaSuccess) return code;
  enqueue(stream, {event, event->recorded, nullptr});
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  if (const cudaError_t code = called("cudaEventCreateWithFlags", ""); code != cudaSuccess) return code;
  *event = device.events.emplace_back(std::make_unique<FakeEvent>()).get();
  ++device.events_alive;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) {
  --device.events_alive;
  return called("cudaEventDestroy", "");
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (const cudaError_t code = called("cudaEventRecord", name_of(stream)); code != cudaSuccess) return code;
  const uint64_t point = ++event->recorded;
  enqueue(stream, {nullptr, 0, [=] { event->reached = point; }});
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  while (event->reached < event->recorded && run_one()) {
  }
  return called("cudaEventSynchronize", "");
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const std::string arguments = text(to) + ", " + text(from) + ", " + std::to_string(bytes) + ", " + name_of(stream);
  if (const cudaError_t code = called("cudaMemcpyAsync", arguments); code != cudaSuccess) return code;
  const void* there = kind == cudaMemcpyHostToDevice ? to : from;
  const void* host = kind == cudaMemcpyHostToDevice ? from : to;
  const auto size = static_cast<int64_t>(bytes);
  if (!block_of(reinterpret_cast<uintptr_t>(there), size, "d")) return wrong("copy outside the device's memory");
  if (!block_of(reinterpret_cast<uintptr_t>(host), size, "p")) return wrong("copy outside pinned memory");
  enqueue(stream, {nullptr, 0, [=] {
                     const bool here = block_of(reinterpret_cast<uintptr_t>(host), size, "p") &&
                                       block_of(reinterpret_cast<uintptr_t>(there), size, "d");
                     if (here) std::memcpy(to, from, bytes);
                     if (!here) device.wrongs.push_back("copy of memory that is gone");
                   }});
  return cudaSuccess;
}

#if CUDART_VERSION >= 13000
cudaError_t cudaMemPrefetchAsync(const void* address, size_t bytes, cudaMemLocation place, unsigned,
                                 cudaStream_t stream) {
  return prefetch(address, bytes, place.type == cudaMemLocationTypeHost ? cudaCpuDeviceId : place.id, stream);
}
cudaError_t cudaMemAdvise(const void* address, size_t bytes, cudaMemoryAdvise, cudaMemLocation place) {
  return advise(address, bytes, place.type == cudaMemLocationTypeHost ? cudaCpuDeviceId : place.id);
}
#else
cudaError_t cudaMemPrefetchAsync(const void* address, size_t bytes, int where, cudaStream_t stream) {
  return prefetch(address, bytes, where, stream);
}
cudaError_t cudaMemAdvise(const void* address, size_t bytes, cudaMemoryAdvise, int where) {
  return advise(address, bytes, where);
}
#endif
