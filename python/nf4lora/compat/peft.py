"""What PEFT does that its users must not hear of: names of transformers that were replaced.

Tried with PEFT 0.21 and transformers 5.17 to 5.24.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from peft import PeftConfig


def get_peft_model(model: nn.Module, config: PeftConfig, **options: Any) -> Any:
    """`peft.get_peft_model`, which asks transformers for an attribute by its former name, and is warned of that."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(model, config, **options)  # type: ignore[arg-type]
