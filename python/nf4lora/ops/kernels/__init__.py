"""Which CUDA kernel computes lora_linear."""
