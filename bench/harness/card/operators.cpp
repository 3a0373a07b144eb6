// The rules of the CUDA ops that are compiled for the card, which are not those of the installed module, for loading.py.
#include "cuda/dispatch.h"

PYBIND11_MODULE(nf4lora_card_operators, m) { nf4lora::cuda::bind_dispatch(m); }
