// Products of bfloat16 matrices on processors with AMX, which otherwise take the loops of AVX512-BF16.
#include "amx.h"

namespace nf4lora {

const Gemm& gemm_amx() { return NF4LORA_ISA::kTiles<NF4LORA_ISA::PairProduct>; }

}  // namespace nf4lora
