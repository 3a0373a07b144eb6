// The device.
#pragma once

namespace nf4lora::card {

// Whether it has been made current, with which a real runtime makes its context.
bool is_used();

}  // namespace nf4lora::card
