// Memory of the device, which is the host's.
#pragma once

#include <cstddef>

namespace nf4lora::card {

// Bytes that can be allocated in all: $NF4LORA_CARD_BYTES, or the 141 GB of an H200.
size_t memory_limit();

}  // namespace nf4lora::card
