"""nf4lora: QLoRA with its own kernels, exact to the bit, on CPU and CUDA.

>>> import nf4lora
>>> qweight, absmax = nf4lora.ops.nf4_quantize(torch.randn(16, 64))
>>> qweight.shape, absmax.shape
(torch.Size([16, 32]), torch.Size([16, 1]))
"""

import torch

try:
    from nf4lora import _C as _C
except ImportError as error:  # a failed load is said here and now, not as a NameError later
    raise ImportError(
        f"nf4lora: the compiled module did not load with torch {torch.__version__}: {error}. It needs torch 2.11 or "
        "later and this Python; rebuild it where it runs: pip install --force-reinstall --no-deps nf4lora"
    ) from error

from nf4lora import ops, quantizer  # quantizer: transformers must know "nf4lora" to load our checkpoints
from nf4lora.adapter_files import load_adapter, save_adapter
from nf4lora.config import NF4Config
from nf4lora.doctor import build_info
from nf4lora.linear import NF4Linear
from nf4lora.optim import PagedAdamW
from nf4lora.prepare import prepare  # bound here, so that `nf4lora.prepare` is the function, not the module
from nf4lora.report import report

__version__: str = _C.__version__

__all__ = [
    "NF4Config",
    "NF4Linear",
    "PagedAdamW",
    "__version__",
    "build_info",
    "load_adapter",
    "ops",
    "prepare",
    "report",
    "save_adapter",
]
del quantizer
