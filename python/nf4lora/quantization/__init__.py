"""Models in NF4: packing, loading and saving them, transformers' hooks, and bitsandbytes' format."""
