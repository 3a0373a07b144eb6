// The lanes that execute together.
#pragma once

namespace nf4lora::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

}  // namespace nf4lora::cuda
