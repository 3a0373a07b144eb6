// What the CPU ops share about torch's tensors: dtypes, contiguous views, aligned scratch memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <new>

#include "../ceil_div.h"
#include "../check.h"
#include "isa/loops.h"

namespace nf4lora {

inline Dtype dtype_of(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? Dtype::bf16 : dtype == ScalarType::Half ? Dtype::f16 : Dtype::f32;
}
inline Dtype dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }
inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// The tensor itself where its memory is in order already, else a copy that is. (Asking the dispatcher costs a
// microsecond.)
inline Tensor contiguous_view(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

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

// Uninitialised memory on a cache line boundary, freed with the object.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = round_up(static_cast<size_t>(count) * sizeof(T), kAlignment);
    memory_.reset(static_cast<T*>(std::aligned_alloc(kAlignment, bytes ? bytes : kAlignment)));
    if (!memory_) throw std::bad_alloc();
  }
  T* get() { return memory_.get(); }

 private:
  static constexpr size_t kAlignment = 64;
  struct Free {
    void operator()(T* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<T[], Free> memory_;
};

}  // namespace nf4lora
