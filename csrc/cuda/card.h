// What launchers ask of the current device.
#pragma once

namespace nf4lora::cuda {

struct Card {
  int multiprocessors;
  int shared_bytes;  // of shared memory, of one multiprocessor
  int architecture;  // compute capability times ten
};
Card current_card();

}  // namespace nf4lora::cuda
