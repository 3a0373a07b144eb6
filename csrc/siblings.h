// Siblings: linear layers that are called with the same x, such as q, k and v, and are computed together.
#pragma once

namespace nf4lora {

inline constexpr int kMostSiblings = 4;  // of a group

}  // namespace nf4lora
