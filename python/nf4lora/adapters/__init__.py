"""Adapters over packed weights: PEFT's LoRA layer with our fused op, and an adapter's files."""
