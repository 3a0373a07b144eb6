"""nf4lora: QLoRA with its own kernels, exact to the bit, on CPU and CUDA.

>>> import nf4lora
>>> qweight, absmax = nf4lora.ops.nf4_quantize(torch.randn(16, 64))
>>> qweight.shape, absmax.shape
(torch.Size([16, 32]), torch.Size([16, 1]))

Importing this package loads the library at once and registers its quantizer with transformers, so that a checkpoint
in NF4 loads. There are two exceptions. The command line (`nf4lora`, `python -m nf4lora`) loads the library when a
command needs it, because `--version` must not take seconds. Where the library cannot be loaded, the import succeeds
and the first use of a public name raises the error, so that `nf4lora doctor` can still run and say how to repair it.
"""

import contextlib
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nf4lora.compat import library

if TYPE_CHECKING:
    from nf4lora import ops
    from nf4lora.adapters.files import load_adapter, save_adapter
    from nf4lora.compat.library import build_info
    from nf4lora.nn.linear import NF4Linear
    from nf4lora.optim.paged_adamw import PagedAdamW
    from nf4lora.preparation.prepare import prepare
    from nf4lora.preparation.report import report
    from nf4lora.quantization.config import NF4Config

    __version__: str

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
# The module of each public name. `_load` also imports the quantizer, which registers "nf4lora" with transformers.
_MODULES = {
    "NF4Config": "quantization.config",
    "NF4Linear": "nn.linear",
    "PagedAdamW": "optim.paged_adamw",
    "build_info": "compat.library",
    "load_adapter": "adapters.files",
    "prepare": "preparation.prepare",
    "report": "preparation.report",
    "save_adapter": "adapters.files",
}
_failure: ImportError | None = None  # why the library could not be loaded


def _load() -> None:
    """Load the library and bind its public names.

    Raises:
        ImportError: as `compat.library.load` says; a second call raises the same text.
    """
    global _failure
    if "__version__" in globals():
        return
    if _failure is not None:
        raise ImportError(str(_failure)) from _failure
    try:
        compiled, ops, _, *modules = library.load("_C", "ops", "quantization.quantizer", *_MODULES.values())
    except ImportError as error:
        _failure = error
        raise
    public = {name: getattr(module, name) for name, module in zip(_MODULES, modules)}
    globals().update(public, ops=ops, __version__=compiled.__version__)  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    if name in _MODULES or name == "__version__" or (name == "ops" and _failure is not None):
        _load()
        return globals()[name]
    if not name.startswith("__") and find_spec(f"nf4lora.{name}") is not None:
        return import_module(f"nf4lora.{name}")
    raise AttributeError(f"module 'nf4lora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command_line() -> bool:
    """Whether this process was started as `nf4lora` or `python -m nf4lora`."""
    started = (getattr(sys, "argv", None) or [""])[0]  # a program that embeds Python may give none
    if started == "-m":  # while Python looks for the module to run
        return "nf4lora" in sys.orig_argv
    return Path(started).stem in ("nf4lora", "nf4lora-script")


if not _is_command_line():
    with contextlib.suppress(ImportError):  # kept in _failure
        _load()
