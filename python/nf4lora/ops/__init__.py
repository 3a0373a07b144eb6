"""The ops as Python sees them: docstring, fake and gradient of each, a file a concept.

The schemas are in csrc/ops.cpp, the checks and every error text in csrc/check/, the meaning in reference.py. Letters: M
tokens, N out features, K in features, R rank.
"""

from nf4lora.ops.absmax import NESTED_BLOCKSIZE, absmax_dequantize, absmax_quantize
from nf4lora.ops.adamw import MOMENT_BLOCKSIZE, adamw_step_
from nf4lora.ops.lora import lora_linear
from nf4lora.ops.lora_group import lora_linear_group
from nf4lora.ops.nf4 import BLOCKSIZE, BLOCKSIZES, nf4_dequantize, nf4_quantize

__all__ = [
    "BLOCKSIZE",
    "BLOCKSIZES",
    "MOMENT_BLOCKSIZE",
    "NESTED_BLOCKSIZE",
    "absmax_dequantize",
    "absmax_quantize",
    "adamw_step_",
    "lora_linear",
    "lora_linear_group",
    "nf4_dequantize",
    "nf4_quantize",
]
