// What launchers ask of the current device.
#pragma once

namespace nf4lora::cuda {

struct Card {
  int multiprocessors;
  int shared_bytes;  // of shared memory, of one multiprocessor
};
// Asked of the runtime once a device: each of its answers takes about a microsecond, and a call is launched every few.
Card current_card();

}  // namespace nf4lora::cuda
