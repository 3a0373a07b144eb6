"""Which CUDA kernel computes lora_linear, and the ways to compute it with torch alone."""
