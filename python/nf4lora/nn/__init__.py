"""The linear layer in 4 bits, and functions on models as trees of layers."""
