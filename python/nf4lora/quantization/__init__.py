"""A model in NF4: how it is packed, loaded and saved; transformers' hooks, and bitsandbytes' format."""
