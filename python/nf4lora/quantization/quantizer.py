"""The transformers quantizer behind NF4Config: packs each weight as it is read, and reads packed checkpoints.

transformers catches an error in a conversion, goes on loading, and refers to a report that may be silenced. So this
quantizer keeps the first error, skips all further work, and raises the error in `_process_model_after_weight_loading`.
"""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from nf4lora.adapters import new_weights
from nf4lora.adapters.new_weights import marked_as, not_in_checkpoint, task_heads
from nf4lora.compat.torch import parameters_of
from nf4lora.compat.transformers import (
    carries_adapter,
    kept_in_float32,
    mark_initialized,
    save_under_file_names,
    save_under_own_names,
)
from nf4lora.loss.causal_lm import chunk_loss
from nf4lora.memory import heap, onednn
from nf4lora.memory.pages import in_huge_pages
from nf4lora.nn.linear import BLOCKSIZES, COMPUTE_DTYPES, NF4Linear, blocksize_for
from nf4lora.nn.model_tree import base_state_dict, replace_layers, token_layers
from nf4lora.quantization import bitsandbytes_format, quantized_checkpoint
from nf4lora.quantization.checkpoint import check_files, check_loaded, describe
from nf4lora.quantization.config import METHOD, NF4Config
from nf4lora.quantization.weight_readers import read_weights

KEPT_BY_MALLOC = 32 << 20  # bytes of freed weights that loading may leave unreturned

__all__ = ["NF4Config", "NF4Quantizer", "layers_to_pack", "mostly_16_bits"]

quantized_checkpoint.install()
new_weights.install()


def layers_to_pack(
    model: Any, config: NF4Config, new: Container[str] = frozenset()
) -> tuple[dict[str, int], dict[str, str]]:
    """Which linear layers of a transformers model are packed, and why the others stay in 16 bits.

    Args:
        new: names of parameters that no checkpoint held; they are trained in full

    Returns:
        packed: blocksize by name of the layer
        skipped: reason by name of the layer or weight
    """
    modules = dict(model.named_modules())
    # transformers' rule may return the name of a layer's last parameter, such as its bias, in place of the layer's.
    rule = HfQuantizer.get_modules_to_not_convert(model)
    by_rule = [name if name in modules else name.rpartition(".")[0] for name in rule]
    heads, readers = task_heads(model), read_weights(model)
    in_float32 = kept_in_float32(model)
    packed: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for name, module in modules.items():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and "expert" in f"{name}.{type(module).__name__}".lower():
                skipped[f"{name}.{key}"] = "weights of several experts in one tensor are not packed yet"
        if isinstance(module, NF4Linear) or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        if not should_convert_module(name, config.modules_to_not_convert or []):
            skipped[name] = "named in modules_to_not_convert"
        elif not should_convert_module(name, in_float32):
            skipped[name] = "the model keeps it in float32"
        elif any(name == head or name.startswith(f"{head}.") for head in heads):
            skipped[name] = bitsandbytes_format.TASK_HEAD
        elif f"{name}.weight" in new:
            skipped[name] = "in no checkpoint, trained in full"
        elif not should_convert_module(name, by_rule):
            skipped[name] = "output head, last layer or tied to one: stays by transformers' rule"
        elif type(module) is not nn.Linear:
            skipped[name] = f"{type(module).__name__} is not torch.nn.Linear itself"
        elif reader := readers.get(id(module)):
            skipped[name] = f"{reader} directly"
        elif config.layout == "bitsandbytes" and module.in_features % config.blocksize:
            skipped[name] = bitsandbytes_format.STRADDLES
        elif blocksize := blocksize_for(module.in_features, config.blocksize):
            packed[name] = blocksize
        else:
            skipped[name] = f"in_features {module.in_features} is no multiple of {BLOCKSIZES[0]}"
    return packed, skipped


def keep_in_16_bits(config: NF4Config, names: list[str]) -> None:
    """Add these layers to modules_to_not_convert, so that the configuration saved with a model names them."""
    if more := [name for name in names if name not in (config.modules_to_not_convert or [])]:
        config.modules_to_not_convert = [*(config.modules_to_not_convert or []), *more]


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):
    """The methods that transformers calls while it loads, saves and trains a model with NF4Config.

    `model.nf4lora_skipped` holds the reason by name of the layers that stayed in 16 bits.
    """

    requires_calibration = False
    quantization_config: NF4Config

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)  # a copy: loading changes it
        onednn.bound_caches()
        self.failure: Exception | None = None
        self.shapes: dict[str, torch.Size] = {}
        self.new: set[str] = set()  # parameters that the checkpoint cannot hold
        self.freed = 0  # bytes of 16-bit weights that were packed since memory was last returned

    # ---- before loading ----

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Refuse a dtype from which layers cannot be packed."""
        if dtype not in COMPUTE_DTYPES:
            raise ValueError(f"NF4Config: dtype must be float32, bfloat16 or float16, got {dtype}")
        return dtype

    def update_device_map(self, device_map: Any) -> Any:
        """The current GPU where there is one, else the CPU."""
        if device_map is None:
            device_map = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        return device_map

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this is a tensor of a packed layer; transformers then does not check its shape."""
        module, key = get_module_from_name(model, param_name)
        return isinstance(module, NF4Linear) and key != "bias"

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes of an element. A weight to pack is [N, K/2] in a float dtype until then, and takes one byte after."""
        return 1 if self.param_needs_quantization(model, param_name) and param.is_floating_point() else param.itemsize

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        check_files(checkpoint_files or [], packed_file=self.pre_quantized)
        config = self.quantization_config
        if not self.pre_quantized:
            config.layout = "native"  # other layouts are only read, never written
        native = self.pre_quantized and config.layout == "native"
        self.new = set() if self.pre_quantized else not_in_checkpoint(model)
        packed, model.nf4lora_skipped = layers_to_pack(model, config, self.new)
        if not packed:
            reasons = sorted(set(model.nf4lora_skipped.values()))
            raise ValueError(
                f"NF4Config: {type(model).__name__} must have a linear layer to pack, got none"
                + "".join(f"; {reason}" for reason in reasons[:3])
            )
        if text := mostly_16_bits(model, packed, model.nf4lora_skipped):
            warnings.warn(f"NF4Config: {text}", stacklevel=2)

        def likeness(name: str, linear: Any) -> NF4Linear:
            layer = NF4Linear(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                blocksize=packed[name],
                double_quant=config.double_quant,
                compute_dtype=config.compute_dtype,
                device="meta",
                dtype=linear.weight.dtype,
            )
            if not native:  # transformers until 5.22 casts what it reads to the dtype of the parameter
                weight = torch.empty_like(layer.weight, dtype=linear.weight.dtype)
                layer.weight = nn.Parameter(weight, requires_grad=False)
            mark_initialized(layer)
            return layer

        replace_layers(model, packed, likeness)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    # ---- while loading ----

    def get_quantize_ops(self) -> ConversionOps:
        """Packs a weight of a 16-bit file."""
        return PackWeight(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Collects the tensors of a layer in bitsandbytes' layout; in the native one the keys are parameter names."""
        if not self.pre_quantized or self.quantization_config.layout == "native":
            return []
        return [WeightConverter(bitsandbytes_format.SERIALIZED, "weight", [ReadBitsandbytes(self)])]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None where a cast would round a scale; ReadBitsandbytes itself casts the tensors that are not packed."""
        if self.quantization_config.layout != "native":
            return None
        return super().get_new_dtype(converter, param, dtype)

    # ---- after loading ----

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
            raise ValueError(
                "NF4Config: device_map must not offload to disk, got 'disk'; packed weights stay in memory"
            )
        check_loaded(model, self.shapes, packed_file=self.pre_quantized, new=self.new)
        if self.pre_quantized:
            for layer in (module for module in model.modules() if isinstance(module, NF4Linear)):
                codes: Any = parameters_of(layer)["weight"]
                codes.data = in_huge_pages(codes.data)
        if new := [name for name in model.nf4lora_skipped if f"{name}.weight" in self.new]:
            keep_in_16_bits(self.quantization_config, new)  # a checkpoint of this model will hold them in 16 bits
        if self.quantization_config.layout == "bitsandbytes":
            self.quantization_config.layout = "native"  # what save_pretrained writes
            straddling = [name for name, why in model.nf4lora_skipped.items() if why == bitsandbytes_format.STRADDLES]
            keep_in_16_bits(self.quantization_config, straddling)
        self.keep_names(model)
        self.return_memory()
        # From now on PEFT puts the right layers over an NF4Linear. Not earlier: `import nf4lora` must not import PEFT.
        from nf4lora.adapters import lora_layer

        lora_layer.install()
        chunk_loss(model)  # takes effect once an adapter has been added and the head is frozen
        return model

    def return_memory(self, above: int = 0) -> None:
        """Return freed memory of 16-bit copies to the system, once it is more than `above` bytes.

        If the file is not in the requested dtype, each weight is copied. glibc keeps the freed copies for itself, which
        came to nearly the size of the model (430 MB for a model of 470 MB).
        """
        if self.freed > above:
            self.freed = 0
            heap.trim()

    def keep_names(self, model: Any) -> None:
        """Save parameters under their own names: transformers' mapping to the 16-bit file has no packed tensors."""
        save_under_own_names(model)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """What save_pretrained writes. If the model has PEFT's layers, that is the base under its own names."""
        if carries_adapter(model):
            return None, {}  # transformers then writes the adapter alone
        return base_state_dict(model), {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Replace every NF4Linear by an nn.Linear, one at a time; also inside a PEFT wrapper."""
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        names = [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]
        replace_layers(model, names, lambda _, packed: _dequantized(packed, dtype))
        save_under_file_names(model)
        model.__dict__.pop("nf4lora_skipped", None)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters over the packed layers can be trained; the packed weights stay frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def mostly_16_bits(model: Any, packed: Iterable[str], skipped: Mapping[str, str]) -> str:
    """A warning, if most of a model is not packed, embeddings and output head not counted; else ""."""
    aside = {id(getattr(layer, "weight", None)) for layer in token_layers(model)}
    sizes = {name: p.numel() for name, p in model.named_parameters() if id(p) not in aside}
    in_4_bits = sum(model.get_submodule(name).weight.numel() for name in packed)
    total = sum(sizes.values())
    if 2 * in_4_bits >= total:
        return ""
    reasons: dict[str, int] = {}
    for name, reason in skipped.items():
        size = sum(count for key, count in sizes.items() if key == name or key.startswith(f"{name}."))
        reasons[reason] = reasons.get(reason, 0) + size
    largest = sorted(reasons.items(), key=lambda item: -item[1])[:2]
    return (
        f"most of {type(model).__name__} stays in 16 bits: of {total / 1e6:.1f} M parameters, embeddings and output "
        f"head left aside, {in_4_bits / 1e6:.1f} M are packed in 4 bits"
        + "".join(f"; {size / 1e6:.1f} M: {reason}" for reason, size in largest if size)
    )


def _dequantized(packed: NF4Linear, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None, device="meta")
    linear.weight = marked_as(nn.Parameter(packed.dequantize(dtype), requires_grad=False), packed.weight)
    linear.register_parameter("bias", packed.bias)
    return linear.train(packed.training)


class _LoadOperation(ConversionOps):
    """A conversion whose error reaches the user: see the top of this file."""

    def __init__(self, quantizer: NF4Quantizer) -> None:
        self.quantizer = quantizer

    def __deepcopy__(self, memo: Any) -> _LoadOperation:
        return self  # transformers copies an operation for each layer, but all must use the same quantizer

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        full_layer_name: str = "",
        model: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        try:
            if self.quantizer.failure is None:
                return self.load(input_dict, full_layer_name, model)
        except Exception as error:  # also out of memory; KeyboardInterrupt is not caught
            self.quantizer.failure = error
        if missing_keys is not None:
            missing_keys.clear()  # the model is useless now: nothing must be initialised or reported
        return {}

    @abstractmethod
    def load(self, tensors: dict[str, Any], name: str, model: Any) -> dict[str, Any]:
        """The tensors of one layer of the file -> those of the model, by full name."""


class PackWeight(_LoadOperation):
    """A weight of a 16-bit file, under its full name -> the tensors of its NF4Linear."""

    def load(self, tensors: dict[str, Any], name: str, model: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        while tensors:
            name, weight = tensors.popitem()  # the only other reference: the weight is freed once it is packed
            weight = weight[0] if isinstance(weight, list) else weight
            layer, key = get_module_from_name(model, name)
            if not isinstance(layer, NF4Linear) or key != "weight":
                result[name] = weight
                continue
            expected = (layer.out_features, layer.in_features)
            if tuple(weight.shape) != expected or weight.dtype not in COMPUTE_DTYPES:
                raise ValueError(
                    f"NF4Config: {name} must be float32, bfloat16 or float16 {list(expected)}, "
                    f"got {describe(weight)}; is the file packed already, without saying so in config.json?"
                )
            try:
                packed = NF4Linear.pack(weight, layer.blocksize, layer.double_quant)
            except ValueError as error:
                raise ValueError(f"NF4Config: {name} cannot be packed: {error}") from None
            stem = name.removesuffix("weight")
            result |= {stem + key: nn.Parameter(tensor, requires_grad=False) for key, tensor in packed.items()}
            self.quantizer.freed += weight.nbytes
            del weight
            self.quantizer.return_memory(above=KEPT_BY_MALLOC)
        return result


class ReadBitsandbytes(_LoadOperation):
    """The tensors of one layer in bitsandbytes' layout -> those of its NF4Linear, or the weight in 16 bits."""

    def load(self, tensors: dict[str, Any], name: str, model: Any) -> dict[str, Any]:
        parts = {key: value[0] if isinstance(value, list) else value for key, value in tensors.items()}
        layer, _ = get_module_from_name(model, name)
        if len(parts) == 1:
            if isinstance(layer, NF4Linear):
                raise ValueError(
                    f"NF4Config: {name} must be packed by bitsandbytes, got {describe(parts['weight'])} alone; "
                    f"name its layer in modules_to_not_convert, or quantise the 16-bit model"
                )
            dtype = model.get_parameter_or_buffer(name).dtype
            return {"weight": parts["weight"].to(dtype) if dtype.is_floating_point else parts["weight"]}
        packed = bitsandbytes_format.from_checkpoint(name, parts)
        if not isinstance(layer, nn.Linear) or packed.shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"NF4Config: {name} must belong to a linear layer of shape {list(packed.shape)}, got {layer}"
            )
        if not isinstance(layer, NF4Linear):
            return {name: nn.Parameter(packed.dequantize(layer.weight.dtype), requires_grad=False)}
        if packed.blocksize != layer.blocksize or (packed.nested is not None) != layer.double_quant:
            raise ValueError(
                f"NF4Config: {name} must be packed as the config says (blocksize {layer.blocksize}, double_quant "
                f"{layer.double_quant}), got blocksize {packed.blocksize}, double_quant {packed.nested is not None}; "
                f"NF4Config.from_bnb takes blocksize={packed.blocksize}"
            )
        stem = name.removesuffix("weight")
        return {stem + key: nn.Parameter(tensor, requires_grad=False) for key, tensor in packed.state().items()}
