// Work space of a call: one allocation of torch's, which goes back to it when the call has queued its work, since all of it
// is on one stream.
#pragma once

#include "../ceil_div.h"
#include "../tensors.h"

namespace nf4lora::cuda {

class Workspace {
 public:
  // Room for so many bytes: where it begins, in bytes from the beginning of memory().
  int64_t add(int64_t bytes) {
    const int64_t offset = bytes_;
    bytes_ = round_up(bytes_ + bytes, kAlignment);
    return offset;
  }
  // Of the dtype and on the device of `like`.
  void allocate(const Tensor& like) { memory_ = empty({bytes_ / bytes_of(dtype_of(like))}, like.scalar_type(), like); }
  const Tensor& memory() const { return memory_; }
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_.mutable_data_ptr()) + offset);
  }

 private:
  static constexpr int64_t kAlignment = 256;
  int64_t bytes_ = 0;
  Tensor memory_;
};

}  // namespace nf4lora::cuda
