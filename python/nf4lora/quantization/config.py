"""NF4Config: the quantization_config of `from_pretrained`, which is saved in a checkpoint's config.json."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer, register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from nf4lora.compat.transformers import mark_config_quantized
from nf4lora.nn.linear import COMPUTE_DTYPES, check_blocksize
from nf4lora.words import dtype_name

METHOD = "nf4lora"
FORMAT_VERSION = 1
LAYOUTS = ("native", "bitsandbytes")

# Option names of BitsAndBytesConfig, GPTQ and torchao.
OTHER_NAMES = {
    "bnb_4bit_use_double_quant": "use double_quant",
    "bnb_4bit_compute_dtype": "use compute_dtype",
    "llm_int8_skip_modules": "use modules_to_not_convert",
    "bnb_4bit_blocksize": "use blocksize",
    "block_size": "use blocksize",
    "group_size": "use blocksize",
    "load_in_4bit": "leave it out, NF4Config always loads in 4 bits",
    "load_in_8bit": "leave it out, NF4Config always loads in 4 bits",
    "bnb_4bit_quant_type": "leave it out, NF4Config is always nf4",
    "quant_type": "leave it out, NF4Config is always nf4",
    "bnb_4bit_quant_storage": "leave it out, packed weights are always uint8",
}


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):
    """Load a model's linear layers in NF4, each weight quantised when it is read: the 16-bit model is never in memory.

    The output head, weights tied to it and the embeddings stay in 16 bits, which is transformers' rule for all
    quantisers. A layer whose width is not a multiple of blocksize gets the largest legal blocksize that divides the
    width, or stays in 16 bits if there is none.

    For a checkpoint that is packed already, in the native layout or by bitsandbytes, compute_dtype is applied. The
    other options then have the checkpoint's values; giving another value is an error.

    Args:
        double_quant: store the scales in 8 bits (4.127 bits a weight instead of 4.5 at blocksize 64); True if left out
        blocksize: weights that share a scale, a power of two between 32 and 4096; 64 if left out
        modules_to_not_convert: names or patterns of more layers to leave in 16 bits
        compute_dtype: what the layers compute in; None: the dtype of their input, or autocast's

    Raises:
        TypeError: an unknown keyword, for which the text suggests a known one; a value of the wrong kind.
        ValueError: a blocksize or compute_dtype that is not legal.

    >>> NF4Config(blocksize=128).to_dict()["blocksize"]
    128
    """

    # The options that were given and not left to their defaults: a packed checkpoint must agree with them. This is a
    # slot, because transformers and users compare and print the attributes in __dict__.
    __slots__ = ("given",)

    def __init__(
        self,
        double_quant: bool | None = None,
        blocksize: int | None = None,
        modules_to_not_convert: list[str] | None = None,
        compute_dtype: torch.dtype | str | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise TypeError(_unknown_keyword(next(iter(unknown))))
        options = {"blocksize": blocksize, "double_quant": double_quant, "compute_dtype": compute_dtype}
        self.given = frozenset(name for name, value in options.items() if value is not None)
        double_quant = True if double_quant is None else double_quant
        blocksize = 64 if blocksize is None else blocksize
        if not isinstance(double_quant, bool):
            raise TypeError(f"NF4Config: double_quant must be a bool, got {type(double_quant).__name__}")
        check_blocksize("NF4Config", blocksize)
        if modules_to_not_convert is not None and (
            not isinstance(modules_to_not_convert, (list, tuple))
            or not all(isinstance(name, str) for name in modules_to_not_convert)
        ):
            raise TypeError(
                f"NF4Config: modules_to_not_convert must be a list of names, got {modules_to_not_convert!r}"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.blocksize, self.double_quant = blocksize, double_quant
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.compute_dtype = _dtype(compute_dtype)
        self.layout = "native"  # of the checkpoint that is about to be read

    @classmethod
    def from_dict(  # type: ignore[override]
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The config in a checkpoint's config.json. A newer format_version is an error that says so."""
        values = dict(config_dict)
        method, version = values.pop("quant_method", METHOD), values.pop("format_version", FORMAT_VERSION)
        layout = values.pop("layout", "native")
        if method != METHOD:
            raise ValueError(f"NF4Config: quant_method must be {METHOD!r}, got {method!r}")
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"NF4Config: format_version must be at most {FORMAT_VERSION}, got {version!r}; the checkpoint was "
                f"written by a newer nf4lora: pip install --upgrade nf4lora"
            )
        if layout not in LAYOUTS:
            raise ValueError(f"NF4Config: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        config = cls(**values)
        config.layout = layout
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def from_bnb(cls, config: Any, blocksize: int = 64) -> NF4Config:
        """The config for loading a checkpoint that bitsandbytes packed; bitsandbytes itself is not needed.

        Args:
            config: transformers' BitsAndBytesConfig, or the dict in the checkpoint's config.json
            blocksize: of the checkpoint, which its config does not contain; bitsandbytes' default is 64

        Raises:
            ValueError: the checkpoint is not in NF4.

        >>> bnb = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        >>> NF4Config.from_bnb(bnb).double_quant
        True

        A checkpoint is then read with
            config = AutoConfig.from_pretrained(name)
            config.quantization_config = NF4Config.from_bnb(config.quantization_config).to_dict()
            model = AutoModelForCausalLM.from_pretrained(name, config=config)
        """
        values = config if isinstance(config, dict) else config.to_dict()
        kind = values.get("bnb_4bit_quant_type", "fp4")
        if not (values.get("load_in_4bit") or values.get("_load_in_4bit")) or kind != "nf4":
            packing = "load_in_8bit" if values.get("load_in_8bit") else f"bnb_4bit_quant_type {kind!r}"
            raise ValueError(f"NF4Config.from_bnb: the model must be packed in nf4 with load_in_4bit, got {packing}")
        result = cls(
            blocksize=blocksize,
            double_quant=bool(values.get("bnb_4bit_use_double_quant", False)),
            modules_to_not_convert=values.get("llm_int8_skip_modules"),
            compute_dtype=values.get("bnb_4bit_compute_dtype"),
        )
        result.layout = "bitsandbytes"
        return result

    def to_dict(self) -> dict[str, Any]:
        """The entry quantization_config of config.json."""
        values = {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "double_quant": self.double_quant,
            "blocksize": self.blocksize,
            "modules_to_not_convert": self.modules_to_not_convert,
            "compute_dtype": None if self.compute_dtype is None else dtype_name(self.compute_dtype),
        }
        return values if self.layout == "native" else values | {"layout": self.layout}

    def __eq__(self, other: object) -> bool:  # that of the mixin, a dataclass of one field, compares only quant_method
        return isinstance(other, NF4Config) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _unknown_keyword(name: str) -> str:
    known = ("double_quant", "blocksize", "modules_to_not_convert", "compute_dtype")
    close = difflib.get_close_matches(name, known, n=1)
    advice = OTHER_NAMES.get(name) or (f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}")
    return f"NF4Config: keyword {name!r} is unknown: {advice}"


def _dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    names = {dtype_name(dtype): dtype for dtype in COMPUTE_DTYPES}
    dtype = names.get(dtype_name(value)) if isinstance(value, str) else value
    if value is not None and not isinstance(value, (str, torch.dtype)):
        raise TypeError(f"NF4Config: compute_dtype must be a torch.dtype, got {type(value).__name__}")
    if value is not None and dtype not in COMPUTE_DTYPES:
        raise ValueError(f"NF4Config: compute_dtype must be float32, bfloat16 or float16, got {value}")
    return dtype


def mark_as_packed(model: Any, config: NF4Config, skipped: dict[str, str]) -> None:
    """Mark the model as packed, so that transformers saves, reloads, dequantises and trains it as one loaded in NF4.

    Args:
        skipped: reason by name of the layers that stay in 16 bits
    """
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.hf_quantizer.keep_names(model)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method, model.nf4lora_skipped = True, METHOD, skipped
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            mark_config_quantized(module.config)
