"""nf4lora: QLoRA with its own kernels, exact to the bit, on CPU and CUDA.

>>> import nf4lora
>>> qweight, absmax = nf4lora.ops.nf4_quantize(torch.randn(16, 64))
>>> qweight.shape, absmax.shape
(torch.Size([16, 32]), torch.Size([16, 1]))

Importing this package loads the library at once, and lets transformers know it, so that a checkpoint in NF4 loads.
There are two exceptions. The command line (`nf4lora`, `python -m nf4lora`) loads the library when a command needs it,
because `--version` must not take seconds. And where the library cannot be loaded, not the import says why, but the
first use of it: `nf4lora doctor` must be there to say what mends it.
"""

import contextlib
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nf4lora import ops
    from nf4lora.adapter_files import load_adapter, save_adapter
    from nf4lora.config import NF4Config
    from nf4lora.doctor import build_info
    from nf4lora.linear import NF4Linear
    from nf4lora.optim import PagedAdamW
    from nf4lora.prepare import prepare
    from nf4lora.report import report

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
_MODULES = {  # where each public name is
    "NF4Config": "config",
    "NF4Linear": "linear",
    "PagedAdamW": "optim",
    "build_info": "doctor",
    "load_adapter": "adapter_files",
    "prepare": "prepare",
    "report": "report",
    "save_adapter": "adapter_files",
}
_failure: ImportError | None = None  # why the library could not be loaded


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a module here once it is loaded. `nf4lora.prepare` is the function nevertheless.
        if isinstance(value, ModuleType) and _MODULES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


def _load() -> None:
    """Load the library and bind its public names.

    Raises:
        ImportError: the compiled module, or a package that it needs, cannot be imported.
    """
    global _failure
    if "__version__" in globals():
        return
    if _failure is not None:
        raise ImportError(str(_failure)) from _failure
    what, cure = "torch cannot be imported", "pip install 'torch>=2.11'"
    try:
        import torch

        what = f"the compiled module did not load with torch {torch.__version__}"
        cure = (
            "it needs torch 2.11 or later and this Python; rebuild it where it runs: "
            "pip install --force-reinstall --no-deps nf4lora"
        )
        compiled = import_module("nf4lora._C")
        what, cure = "a package that it needs cannot be imported", "`nf4lora doctor` says which, and what brings it"
        found = {name: getattr(import_module(f"nf4lora.{module}"), name) for name, module in _MODULES.items()}
        found["ops"] = import_module("nf4lora.ops")
        import_module("nf4lora.quantizer")  # transformers must know "nf4lora" to load our checkpoints
    except Exception as error:  # a broken installation raises anything, OSError and RuntimeError included
        _failure = ImportError(f"nf4lora: {what}: {error}; {cure}")
        raise _failure from error
    globals().update(found, __version__=compiled.__version__)


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


sys.modules[__name__].__class__ = _Package
if not _is_command_line():
    with contextlib.suppress(ImportError):  # kept in _failure
        _load()
