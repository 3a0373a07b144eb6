"""The layer in 4 bits, and models as trees of layers."""
