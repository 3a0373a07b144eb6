// How many parts of a size cover a count, the last of them perhaps short, and how far they reach.
#pragma once

#include "format.h"

namespace nf4lora {

template <typename Count, typename Size>
NF4LORA_HOST_DEVICE constexpr auto ceil_div(Count count, Size size) {
  return (count + size - 1) / size;
}
template <typename Count, typename Size>
NF4LORA_HOST_DEVICE constexpr auto round_up(Count count, Size size) {
  return ceil_div(count, size) * size;
}

}  // namespace nf4lora
