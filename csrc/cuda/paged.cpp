// The two pagers: paged.h says what they do.
#include "paged.h"
#include "../ceil_div.h"

#include <algorithm>
#include <deque>
#include <utility>

#include "cudart.h"

namespace nf4lora::cuda {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kAlignment = 256;  // of a range in a staging buffer, as cudaMalloc aligns

void* aligned(void* address) {
  const auto value = reinterpret_cast<uintptr_t>(address);
  return reinterpret_cast<void*>(round_up(value, kHugePage));
}
void* at(void* start, int64_t offset) { return static_cast<char*>(start) + offset; }

int64_t bytes_of(const Ranges& ranges) {
  int64_t sum = 0;
  for (const Range& range : ranges) sum += range.bytes;
  return sum;
}

// What a prefetch may take on the device: drivers move pages of up to 2 MB.
int64_t room_of(const Ranges& ranges) {
  int64_t sum = 0;
  for (const Range& range : ranges) {
    sum += round_up(range.offset + range.bytes, kHugePage) - range.offset / kHugePage * kHugePage;
  }
  return sum;
}

int64_t free_bytes() {
  size_t free = 0, total = 0;
  require(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return static_cast<int64_t>(free);
}

bool faults_on_managed(int device) {
  int value = 0;
  require(cudaDeviceGetAttribute(&value, cudaDevAttrConcurrentManagedAccess, device), "cudaDeviceGetAttribute");
  return value != 0;
}

// CUDA 13 names a place by kind and number, CUDA 12 by a number alone.
#if CUDART_VERSION >= 13000
cudaMemLocation place(int device) {
  cudaMemLocation location{};
  location.type = device == cudaCpuDeviceId ? cudaMemLocationTypeHost : cudaMemLocationTypeDevice;
  location.id = device == cudaCpuDeviceId ? 0 : device;
  return location;
}
cudaError_t prefetch(void* address, int64_t bytes, int device, cudaStream_t stream) {
  return cudaMemPrefetchAsync(address, static_cast<size_t>(bytes), place(device), 0, stream);
}
cudaError_t prefer(void* address, int64_t bytes, int device) {
  return cudaMemAdvise(address, static_cast<size_t>(bytes), cudaMemAdviseSetPreferredLocation, place(device));
}
#else
cudaError_t prefetch(void* address, int64_t bytes, int device, cudaStream_t stream) {
  return cudaMemPrefetchAsync(address, static_cast<size_t>(bytes), device, stream);
}
cudaError_t prefer(void* address, int64_t bytes, int device) {
  return cudaMemAdvise(address, static_cast<size_t>(bytes), cudaMemAdviseSetPreferredLocation, device);
}
#endif

class Managed final : public Pager {
 public:
  Managed(int device, int64_t bytes) : Pager(device, bytes) {
    // Attached globally: any stream of any device may touch it.
    require(cudaMallocManaged(&memory_.address, static_cast<size_t>(bytes + kHugePage), cudaMemAttachGlobal),
            "cudaMallocManaged");
    start_ = aligned(memory_.address);
    // Pages that were evicted come back when they are touched. Not SetAccessedBy: the device would then read them over
    // the bus and leave them there.
    if (bytes) require(prefer(start_, bytes, device), "cudaMemAdvise");
  }
  const char* mode() const override { return "managed"; }

  void plan(std::vector<Ranges> chunks) override {
    chunks_ = std::move(chunks);
    here_.assign(chunks_.size(), false);
    for (const Ranges& ranges : chunks_) {
      all_ += bytes_of(ranges);
      most_ = std::max(most_, room_of(ranges));
    }
  }

  // A chunk that is here is not prefetched again: that costs 0.1 ms on an H200, more than its update. Whether the driver
  // has evicted it meanwhile cannot be asked; where hardly anything is free, it may have.
  bool begin() override {
    const OnDevice current(device_);
    room_ = free_bytes();
    if (room_ < most_) forget();
    tried_ = -1;
    return resident_ == all_;
  }

  std::vector<void*> addresses(int64_t chunk) const override {
    std::vector<void*> found;
    for (const Range& range : chunks_[static_cast<size_t>(chunk)]) found.push_back(at(start_, range.offset));
    return found;
  }

  void acquire(int64_t chunk, int64_t following, void* stream) override {
    const OnDevice current(device_);
    if (tried_ != chunk) bring(chunk);
    if (tried_ == chunk && comes_) arrived_.hold(static_cast<cudaStream_t>(stream));
    // Where it does not come by itself, the kernel's accesses bring it; the next step asks for it again.
    if (following > chunk) bring(following);
  }

  void release(int64_t, void* stream) override { updated_.record(static_cast<cudaStream_t>(stream)); }

  void wait() override {}  // its tensors are the device's: what is enqueued behind a step sees it

  int64_t evict() override {
    const OnDevice current(device_);
    updated_.hold(side_);
    if (bytes_) require(prefetch(start_, bytes_, cudaCpuDeviceId, side_), "cudaMemPrefetchAsync");
    side_.synchronize();
    const int64_t freed = resident_;
    forget();
    return freed;
  }

  Residency residency() const override { return {resident_, peak_, held_back_}; }

 private:
  // Prefetches a chunk on the side stream, unless it is here, and where that takes no more than is free.
  void bring(int64_t chunk) {
    if (here_[static_cast<size_t>(chunk)]) return;
    const Ranges& ranges = chunks_[static_cast<size_t>(chunk)];
    const int64_t room = room_of(ranges);
    tried_ = chunk;
    comes_ = room <= room_;
    for (const Range& range : ranges) {
      if (!comes_ || !range.bytes) continue;
      // A refusal costs speed alone. A device that is lost says so again at the next call.
      comes_ = prefetch(at(start_, range.offset), range.bytes, device_, side_) == cudaSuccess;
    }
    if (!comes_) {
      cudaGetLastError();
      ++held_back_;
      return;
    }
    room_ -= room;
    arrived_.record(side_);
    here_[static_cast<size_t>(chunk)] = true;
    resident_ += bytes_of(ranges);
    peak_ = std::max(peak_, resident_);
  }

  void forget() {
    resident_ = 0;
    here_.assign(chunks_.size(), false);
  }

  DeviceMemory memory_;
  Stream side_;
  Event arrived_, updated_;
  std::vector<Ranges> chunks_;
  std::vector<bool> here_;      // believed: brought, and not evicted since
  int64_t all_ = 0, most_ = 0;  // bytes of all chunks, room of the largest
  int64_t resident_ = 0, peak_ = 0, held_back_ = 0;
  int64_t room_ = 0;    // free when the step began, less what was brought since
  int64_t tried_ = -1;  // the chunk that was to be brought last
  bool comes_ = false;  // and arrived_ stands for it
};

class Streamed final : public Pager {
 public:
  Streamed(int device, int64_t bytes, std::string reason) : Pager(device, bytes) {
    reason_ = std::move(reason);
    require(cudaHostAlloc(&memory_.address, static_cast<size_t>(bytes + kHugePage), cudaHostAllocPortable),
            "cudaHostAlloc of the state in pinned memory");
    start_ = aligned(memory_.address);
  }

  const char* mode() const override { return "streamed"; }

  void plan(std::vector<Ranges> chunks) override {
    const OnDevice current(device_);
    int64_t most = 0;
    for (const Ranges& ranges : chunks) {
      int64_t size = 0;
      for (const Range& range : ranges) size += round_up(range.bytes, kAlignment);
      most = std::max(most, size);
    }
    chunks_ = std::move(chunks);
    for (size_t i = 0; i < std::min<size_t>(chunks_.size(), kBuffers); ++i) {
      Buffer& buffer = buffers_.emplace_back();
      require(cudaMalloc(&buffer.memory.address, static_cast<size_t>(std::max(most, kAlignment))),
              "cudaMalloc of a staging buffer");
    }
  }

  std::vector<void*> addresses(int64_t chunk) const override {
    std::vector<void*> found;
    int64_t offset = 0;
    for (const Range& range : chunks_[static_cast<size_t>(chunk)]) {
      found.push_back(at(buffers_[number(chunk)].memory.address, offset));
      offset += round_up(range.bytes, kAlignment);
    }
    return found;
  }

  bool begin() override {
    for (size_t i = 0; i < chunks_.size(); ++i) {
      if (buffers_[i % buffers_.size()].chunk != static_cast<int64_t>(i)) return false;
    }
    return true;
  }

  void acquire(int64_t chunk, int64_t following, void* stream) override {
    const OnDevice current(device_);
    Buffer& buffer = buffers_[number(chunk)];
    if (buffer.chunk != chunk) fetch(chunk, stream);
    // Where it stayed here, the step before may still be leaving: what that reads in between, this step's own copy mends.
    buffer.arrived.hold(static_cast<cudaStream_t>(stream));
    buffer.acquired = true;
    if (number(following) != number(chunk) && buffers_[number(following)].chunk != following) fetch(following, stream);
  }

  void release(int64_t chunk, void* stream) override {
    const OnDevice current(device_);
    Buffer& buffer = buffers_[number(chunk)];
    buffer.updated.record(static_cast<cudaStream_t>(stream));
    buffer.updated.hold(out_);
    copy(chunk, cudaMemcpyDeviceToHost, out_);
    buffer.left.record(out_);
    buffer.acquired = false;
  }

  void wait() override {
    const OnDevice current(device_);
    in_.synchronize();
    out_.synchronize();
    for (Buffer& buffer : buffers_) buffer.chunk = -1;
    resident_ = 0;
  }

  int64_t evict() override {  // the arena is on the host, and the buffers stay
    wait();
    return 0;
  }

  Residency residency() const override { return {resident_, peak_, 0}; }

 private:
  static constexpr size_t kBuffers = 3;  // one that comes, one in use, one that leaves
  struct Buffer {
    DeviceMemory memory;
    Event arrived, updated, left;
    int64_t chunk = -1;     // whose bytes are here, or come
    bool acquired = false;  // and not released
  };

  size_t number(int64_t chunk) const { return static_cast<size_t>(chunk) % buffers_.size(); }

  void fetch(int64_t chunk, void* stream) {
    Buffer& buffer = buffers_[number(chunk)];
    if (buffer.acquired) release(buffer.chunk, stream);  // a step that broke off left it
    if (buffer.chunk >= 0) resident_ -= bytes_of(chunks_[static_cast<size_t>(buffer.chunk)]);
    buffer.chunk = -1;
    buffer.left.hold(in_);
    copy(chunk, cudaMemcpyHostToDevice, in_);
    buffer.arrived.record(in_);
    buffer.chunk = chunk;
    resident_ += bytes_of(chunks_[static_cast<size_t>(chunk)]);
    peak_ = std::max(peak_, resident_);
  }

  void copy(int64_t chunk, cudaMemcpyKind kind, cudaStream_t stream) const {
    const Ranges& ranges = chunks_[static_cast<size_t>(chunk)];
    const std::vector<void*> staged = addresses(chunk);
    for (size_t i = 0; i < ranges.size(); ++i) {
      if (!ranges[i].bytes) continue;
      void* host = at(start_, ranges[i].offset);
      const bool up = kind == cudaMemcpyHostToDevice;
      require(cudaMemcpyAsync(up ? staged[i] : host, up ? host : staged[i], static_cast<size_t>(ranges[i].bytes), kind,
                              stream),
              "cudaMemcpyAsync");
    }
  }

  PinnedMemory memory_;
  std::deque<Buffer> buffers_;  // which never move
  Stream in_, out_;             // these wait for their work before the memory above goes
  std::vector<Ranges> chunks_;
  int64_t resident_ = 0, peak_ = 0;
};

std::string mebibytes(int64_t bytes) { return std::to_string(bytes >> 20).append(" MiB"); }

}  // namespace

std::unique_ptr<Pager> Pager::make(int device, int64_t bytes, const std::string& mode) {
  const OnDevice current(device);
  if (mode == "streamed") return std::make_unique<Streamed>(device, bytes, "");
  if (!faults_on_managed(device)) {
    const std::string why("this device or its driver cannot fault on managed memory (concurrentManagedAccess is 0)");
    if (mode == "managed") throw std::invalid_argument(std::string("PagedAdamW: paging must be streamed here: ") + why);
    return std::make_unique<Streamed>(device, bytes, std::string("streamed: ").append(why));
  }
  if (mode == "managed") return std::make_unique<Managed>(device, bytes);
  const int64_t free = free_bytes();
  if (bytes > free) {
    std::string why("streamed: the state takes ");
    why.append(mebibytes(bytes)).append(", of which the device has ").append(mebibytes(free)).append(" free");
    return std::make_unique<Streamed>(device, bytes, why);
  }
  try {
    return std::make_unique<Managed>(device, bytes);
  } catch (const std::runtime_error& error) {
    return std::make_unique<Streamed>(device, bytes, std::string("streamed: ").append(error.what()));
  }
}

}  // namespace nf4lora::cuda
