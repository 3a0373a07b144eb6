"""What is trained around a packed weight: PEFT's LoRA layer with our compute, and an adapter's files."""
