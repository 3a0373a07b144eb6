// Memory that the CPU ops write: aligned, reused, on large pages.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#include "../ceil_div.h"

namespace nf4lora {

// Asks for pages of 2 MB under memory that is about to be written for the first time, which the system then hands out
// 512 times less often, and under which a weight is later read with as many fewer translations of addresses. Where it
// has none, or always gives them, nothing happens.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = round_up(address, kPage);
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Memory that a thread lately used and will soon ask for again: the next layer's buffers are of the same sizes, and what
// the C library takes from the system anew for each call costs more than filling it.
class Spare {
 public:
  static Spare& of_this_thread() {
    thread_local Spare spare;
    return spare;
  }
  // Memory of at least `bytes`, which becomes the size that it has; null where none is kept.
  void* take(size_t& bytes) {
    for (Piece& piece : pieces_) {
      if (piece.bytes < bytes) continue;
      bytes = std::exchange(piece.bytes, 0);
      return std::exchange(piece.memory, nullptr);
    }
    return nullptr;
  }
  // Keeps it in place of something smaller, or frees it.
  void give(void* memory, size_t bytes) {
    if (bytes <= kMost) {
      Piece* smallest = &pieces_[0];
      for (Piece& piece : pieces_) {
        if (piece.bytes < smallest->bytes) smallest = &piece;
      }
      if (smallest->bytes < bytes) std::swap(smallest->memory, memory), std::swap(smallest->bytes, bytes);
    }
    std::free(memory);
  }
  ~Spare() {
    for (Piece& piece : pieces_) std::free(piece.memory);
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kMost = 0;  // so that each use has its own bounds
#else
  static constexpr size_t kMost = 512 << 10;  // larger ones are for many rows, beside which an allocation is short
#endif
  struct Piece {
    void* memory = nullptr;
    size_t bytes = 0;
  };
  Piece pieces_[6];
};

// Uninitialised memory on a cache line boundary, given back with the object.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    size_t bytes = round_up(static_cast<size_t>(count) * sizeof(T), kAlignment);
    if (!bytes) bytes = kAlignment;
    void* memory = Spare::of_this_thread().take(bytes);
    if (!memory) memory = std::aligned_alloc(kAlignment, bytes);
    if (!memory) throw std::bad_alloc();
    memory_ = {static_cast<T*>(memory), Give{bytes}};
  }
  T* get() { return memory_.get(); }

 private:
  static constexpr size_t kAlignment = 64;
  struct Give {
    size_t bytes = 0;
    void operator()(T* pointer) const { Spare::of_this_thread().give(pointer, bytes); }
  };
  std::unique_ptr<T[], Give> memory_;
};

}  // namespace nf4lora
