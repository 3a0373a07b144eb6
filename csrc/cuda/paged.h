// The memory of an optimizer's state on CUDA: an arena that does not have to stay on the device. The caller cuts it into
// chunks; a step acquires them in turn, and the pager brings the next while the present one is updated, without the host
// waiting. No torch, and of CUDA only the runtime, so that tests can put a fake one beneath it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace nf4lora::cuda {

// Bytes of the arena.
struct Range {
  int64_t offset, bytes;
};
using Ranges = std::vector<Range>;

struct Residency {
  int64_t resident;   // bytes on the device, as far as what was asked for tells
  int64_t peak;       // most of them so far
  int64_t held_back;  // prefetches that were left out because they would have pressed
};

// Managed: unified memory, whose pages move when they are prefetched, touched, or in another allocation's way.
// Streamed: pinned host memory, of which up to three chunks at a time lie in buffers on the device.
class Pager {
 public:
  // mode: managed, streamed or auto, which takes streamed where managed memory is weak or `bytes` are not free.
  static std::unique_ptr<Pager> make(int device, int64_t bytes, const std::string& mode);
  virtual ~Pager() = default;

  virtual const char* mode() const = 0;
  const std::string& reason() const { return reason_; }  // of the mode, where it was chosen against the first choice
  int64_t bytes() const { return bytes_; }
  void* arena() const { return start_; }  // a multiple of 2 MB; the host can read and write it

  // Once, before anything is acquired.
  virtual void plan(std::vector<Ranges> chunks) = 0;
  // Where a chunk's ranges lie while it is acquired.
  virtual std::vector<void*> addresses(int64_t chunk) const = 0;
  // Begins a step. Whether every chunk is on the device, as far as is known: then they can all be acquired at once.
  virtual bool begin() = 0;
  // What is enqueued to `stream` from now on finds the chunk on the device; `following` will be acquired next.
  virtual void acquire(int64_t chunk, int64_t following, void* stream) = 0;
  // What was enqueued to `stream` until now has updated the chunk.
  virtual void release(int64_t chunk, void* stream) = 0;
  // Waits until the arena holds what was released. What the host writes there then is brought anew.
  virtual void wait() = 0;
  // Moves the arena to the host and waits; returns the bytes that this freed on the device.
  virtual int64_t evict() = 0;
  virtual Residency residency() const = 0;

 protected:
  Pager(int device, int64_t bytes) : device_(device), bytes_(bytes) {}

  int device_;
  int64_t bytes_;
  void* start_ = nullptr;
  std::string reason_;
};

}  // namespace nf4lora::cuda
