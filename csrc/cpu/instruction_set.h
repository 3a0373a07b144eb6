// Which instruction set the loops run on: the best that the processor has, or the one that NF4LORA_CPU names.
#pragma once

#include <string>
#include <vector>

#include "isa/loops.h"

namespace nf4lora {

// The loops in force. Throws std::invalid_argument when NF4LORA_CPU names a set that is unknown or absent here.
const Loops& loops();

// Names of the sets that this processor can run, the best last.
std::vector<std::string> instruction_sets();

// Overrides the choice for this process (tests run every set in turn); an empty name restores it.
void force_instruction_set(const std::string& name);

}  // namespace nf4lora
