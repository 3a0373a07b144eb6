"""torch tensors on their way to a device of the interpreter."""

import numpy as np
import torch


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as flat numpy; 16-bit floats, of which numpy lacks one, as integers."""
    flat = tensor.contiguous().flatten()
    return (flat.view(torch.uint16) if flat.is_floating_point() and flat.element_size() == 2 else flat).numpy()
