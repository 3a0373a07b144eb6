"""The libraries that nf4lora builds on: whether they load, and every use of their private names."""
