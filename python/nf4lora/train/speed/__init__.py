"""What makes a step faster and is off by default: other attention, Liger's kernels, compiled blocks, CUDA graphs."""
