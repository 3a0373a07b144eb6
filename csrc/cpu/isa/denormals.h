// Whether values below 2^-126 count, which is a mode of the processor and no matter of its instruction set.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "bits.h"

namespace nf4lora::NF4LORA_ISA {

#if defined(__x86_64__)
inline constexpr uint64_t kFlush = 0x8040;  // of MXCSR: results to zero, operands as zero
NF4LORA_INLINE uint64_t float_mode() { return _mm_getcsr(); }
NF4LORA_INLINE void set_float_mode(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
inline constexpr uint64_t kFlush = 1 << 24;  // of FPCR
NF4LORA_INLINE uint64_t float_mode() {
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
NF4LORA_INLINE void set_float_mode(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
inline constexpr uint64_t kFlush = 0;
NF4LORA_INLINE uint64_t float_mode() { return 0; }
NF4LORA_INLINE void set_float_mode(uint64_t) {}
#endif

// While one lives, values below 2^-126 count on this thread, whatever torch.set_flush_denormal says: what packs a weight
// must give the same bytes everywhere.
class KeepDenormals {
 public:
  KeepDenormals() : before_(float_mode()) { set_float_mode(before_ & ~kFlush); }
  ~KeepDenormals() { set_float_mode(before_); }
  KeepDenormals(const KeepDenormals&) = delete;

 private:
  uint64_t before_;
};

}  // namespace nf4lora::NF4LORA_ISA
