// W as a forward pass has unpacked it that is computed again for a backward pass (activation checkpointing), kept until that
// backward pass takes it: it follows at once, and would unpack the same W again.
#pragma once

#include <cstdint>
#include <optional>

#include "../lora.h"

namespace nf4lora::cuda {

struct KeptWeight {
  Tensor memory;   // [N + room, stride] of the dtype that the layer computes in
  int64_t stride;  // K + room
  int64_t room;    // rows and columns for a factor of LoRA
};

// Whether the next forward pass of this thread that unpacks W whole keeps it; so says Python, which knows when a forward
// pass is computed again. Asking answers for this one pass.
void keep_next_weight();
bool keeps_next_weight();

// Keeps it, unless it would take more memory than may be taken; W is told by its addresses and shape, the dtype of memory
// and the stream. What a backward pass has left is dropped when the next forward pass keeps its W: that belongs to another part of
// the model, whose parts are computed again one after the other.
void keep_weight(const PackedTensors& weight, const KeptWeight& kept, void* stream);
// One with as much room at least: the weight may have been unpacked for another adapter, of a smaller rank.
std::optional<KeptWeight> take_kept_weight(const PackedTensors& weight, int64_t room, ScalarType dtype, void* stream);
void drop_kept_weights();

// The bytes that kept weights may take, of all layers together. 0: none is kept.
int64_t most_kept_bytes();
void set_most_kept_bytes(int64_t bytes);

}  // namespace nf4lora::cuda
