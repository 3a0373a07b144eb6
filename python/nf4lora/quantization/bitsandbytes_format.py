"""Reads what bitsandbytes packs in 4 bits, without a copy: the tensors of its checkpoints, and its layers in memory.

bitsandbytes' bytes mean the same as ours (same code, same nibble order, same nested map), so no weight is quantised
again. bitsandbytes itself is never imported: a layer in memory is recognised by the name of its class.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora import ops
from nf4lora.adapters.new_weights import marked_as, task_heads
from nf4lora.nn.linear import BLOCKSIZES, NESTED_BLOCKSIZE, NF4Linear
from nf4lora.nn.model_tree import base_name, output_head, replace_layers
from nf4lora.quantization.config import NF4Config, mark_as_packed
from nf4lora.quantization.weight_readers import read_weights

# The keys of one layer in a checkpoint, after the name of the layer. "weight" comes last, as a prefix of all others.
SERIALIZED = [
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
    "weight",
]
STRADDLES = "the blocks that bitsandbytes made straddle its rows: dequantised"
TASK_HEAD = "head of the model's task, trained in full"
HEAD = "output head, packed by bitsandbytes: dequantised"


@dataclass(frozen=True)
class PackedWeight:
    """A weight as bitsandbytes packed it, after the checks; its blocks are those of the flattened [N, K] weight."""

    name: str
    qweight: Tensor  # [ceil(N*K/2)] uint8
    absmax: Tensor  # [ceil(N*K/blocksize)] float32, or uint8 with nested
    nested: Tensor | None  # [ceil(len(absmax)/256) + 1] float32, the offset last
    shape: tuple[int, int]
    blocksize: int
    dtype: torch.dtype  # of the weight before it was packed

    @property
    def straddles(self) -> bool:
        """Whether a block holds weights of two rows, which NF4Linear does not allow."""
        return self.shape[1] % self.blocksize != 0

    def state(self) -> dict[str, Tensor]:
        """The tensors of an NF4Linear; weight and weight_absmax share memory with what bitsandbytes made."""
        N, K = self.shape
        absmax = self.absmax.view(N, K // self.blocksize)
        state = {"weight": self.qweight.view(N, K // 2)}
        if self.nested is None:
            return state | {"weight_absmax": absmax.view(torch.int32)}
        return state | {"weight_absmax": absmax, "weight_nested": self.nested.view(torch.int32)}

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, [N, K]. bitsandbytes' CPU kernel gives another one where blocks straddle rows: it starts a new
        block at each row."""
        count = self.shape[0] * self.shape[1]
        absmax = self.absmax if self.nested is None else ops.absmax_dequantize(self.absmax, self.nested)
        bytes_of_whole_blocks = absmax.numel() * self.blocksize // 2
        qweight = self.qweight.new_zeros(bytes_of_whole_blocks)
        qweight[: self.qweight.numel()] = self.qweight
        return ops.nf4_dequantize(qweight, absmax, self.blocksize, dtype)[:count].view(self.shape)


def from_checkpoint(name: str, tensors: dict[str, Tensor]) -> PackedWeight:
    """The weight that a checkpoint holds under the keys of SERIALIZED.

    Raises:
        ValueError: fp4; a tensor that is missing, cut off or of another code book. The text names the layer.
    """
    states = {key: value for key, value in tensors.items() if "quant_state" in key}
    if len(states) != 1:
        raise _error(name, "must come with one quant_state", f"{len(states)}: the checkpoint is incomplete")
    try:
        meta = json.loads(bytes(next(iter(states.values())).tolist()))
        _check_meta(name, meta)
        nested = None
        if "weight.nested_absmax" in tensors or "nested_offset" in meta:
            nested = (tensors["weight.nested_absmax"], tensors["weight.nested_quant_map"])
        return _checked(
            name,
            weight=tensors["weight"],
            absmax=tensors["weight.absmax"],
            code=tensors["weight.quant_map"],
            nested=nested and (*nested, float(meta["nested_offset"]), meta["nested_blocksize"]),
            shape=meta["shape"],
            blocksize=meta["blocksize"],
            dtype=getattr(torch, meta["dtype"]),
            quant_type=meta["quant_type"],
        )
    except KeyError as missing:
        raise _error(name, f"must come with {missing.args[0]}", "none: the checkpoint is incomplete") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _error(name, "must have a quant_state that is JSON", str(error)) from None


def _check_meta(name: str, meta: Any) -> None:
    """Check the types of a quant_state's entries; an entry that is missing is reported where it is read."""
    if not isinstance(meta, dict):
        raise _error(name, "must have a quant_state that is a JSON object", type(meta).__name__)
    text, whole_number = ("a text", str), ("a whole number", int)
    kinds: dict[str, tuple[str, Any]] = {"quant_type": text, "dtype": text, "shape": ("a list", list)}
    kinds |= {"blocksize": whole_number, "nested_blocksize": whole_number, "nested_offset": ("a number", (int, float))}
    for key in kinds.keys() & meta.keys():
        kind, types = kinds[key]
        if not isinstance(meta[key], types):
            raise _error(name, f"must have {kind} as {key} in its quant_state", repr(meta[key]))
    if not all(isinstance(size, int) for size in meta.get("shape", [])):
        raise _error(name, "must have a shape of whole numbers", f"{meta['shape']}")
    if not isinstance(getattr(torch, meta.get("dtype", "float32"), None), torch.dtype):
        raise _error(name, "must have a dtype that torch knows", repr(meta["dtype"]))


def from_layer(name: str, layer: nn.Module) -> PackedWeight:
    """The weight of a `bitsandbytes.nn.Linear4bit` in memory, shared and not copied.

    Raises:
        ValueError: fp4; no quant_state; a weight that bitsandbytes repacked for its CPU kernel; another code book.
    """
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if state is None:
        raise _error(name, "must have a quant_state", "none; move the layer to its device first, which packs it")
    if getattr(state, "packing_format_for_cpu", False):
        raise _error(
            name,
            "must have the packing that it was loaded with",
            "the one bitsandbytes makes at the first forward pass in eval mode on this CPU, which rounds the scales; "
            "load the model again and call prepare before running it",
        )
    nested = None
    if state.nested:
        nested = (state.state2.absmax, state.state2.code, float(state.offset), state.state2.blocksize)
    return _checked(
        name,
        weight=weight.detach().as_subclass(Tensor),
        absmax=state.absmax,
        code=state.code,
        nested=nested,
        shape=state.shape,
        blocksize=state.blocksize,
        dtype=state.dtype,
        quant_type=state.quant_type,
    )


def is_linear4bit(module: nn.Module) -> bool:
    """Whether this is bitsandbytes' 4-bit layer or a subclass of it; does not import bitsandbytes."""
    return _has_bitsandbytes_base(module, "Linear4bit")


def adopt(model: nn.Module, keep: Mapping[str, str] | None = None) -> dict[str, str]:
    """Replace every 4-bit layer of a model that bitsandbytes has packed by an NF4Linear over the same memory, in place.

    This works inside a PEFT wrapper too. transformers then treats the model as one of nf4lora: `save_pretrained` writes
    the native layout, and `is_loaded_in_4bit` is removed. All layers are checked before the first is replaced.

    Args:
        keep: reason by name of further layers to dequantise

    Returns:
        reason by name of the layers that were dequantised; also kept in `model.nf4lora_skipped`

    Raises:
        ValueError: a layer that from_layer refuses, or one that bitsandbytes holds in 8 bits. The text names the layer.
    """
    packed = packed_weights(model)
    names, wanted = list(packed), to_dequantize(model) | dict(keep or {})
    reasons: dict[str, str] = {}
    blocksizes = [64]

    def adopted(name: str, layer: Any) -> nn.Module:
        weight = packed.pop(name)  # popped, so that a dequantised layer's packed bytes are freed at once
        if reason := wanted.get(base_name(name)) or (STRADDLES if weight.straddles else ""):
            reasons[base_name(name)] = reason
            return _dequantized_layer(layer, weight)
        blocksizes.append(weight.blocksize)
        return _packed_layer(layer, weight)

    double_quant = any(weight.nested is not None and not weight.straddles for weight in packed.values())
    replace_layers(model, names, adopted)
    if names:
        _take_over(model, blocksizes[-1], double_quant, reasons)
    return reasons


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """The weights of all 4-bit layers of a model that bitsandbytes has packed, by name, shared and not copied.

    Raises:
        ValueError: as `adopt`.
    """
    for name, module in model.named_modules():
        if _has_bitsandbytes_base(module, "Linear8bitLt"):
            raise _error(name, "must be packed in nf4", "8 bits (Linear8bitLt); load with bnb_4bit_quant_type='nf4'")
    return {name: from_layer(name, module) for name, module in model.named_modules() if is_linear4bit(module)}


def to_dequantize(model: nn.Module) -> dict[str, str]:
    """Layers that bitsandbytes has packed, but that must be in 16 bits: reason by name."""
    head, readers = output_head(model), read_weights(model)
    heads = tuple(f"{name}." for name in task_heads(model))
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if not is_linear4bit(module):
            continue
        if module is head:
            reasons[base_name(name)] = HEAD
        elif f"{base_name(name)}.".startswith(heads):
            reasons[base_name(name)] = f"{TASK_HEAD}: dequantised"
        elif reader := readers.get(id(module)):
            reasons[base_name(name)] = f"{reader} directly: dequantised"
    return reasons


def _packed_layer(layer: Any, weight: PackedWeight) -> NF4Linear:
    N, K = weight.shape
    result = NF4Linear(
        K,
        N,
        layer.bias is not None,
        blocksize=weight.blocksize,
        double_quant=weight.nested is not None,
        compute_dtype=layer.compute_dtype,
        device="meta",
    )
    for key, tensor in weight.state().items():
        setattr(result, key, marked_as(nn.Parameter(tensor, requires_grad=False), layer.weight))
    result.register_parameter("bias", layer.bias)
    return result.train(layer.training)


def _dequantized_layer(layer: Any, weight: PackedWeight) -> nn.Linear:
    result = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None, device="meta")
    dense = nn.Parameter(weight.dequantize(weight.dtype), requires_grad=False)
    result.weight = marked_as(dense, layer.weight)
    result.register_parameter("bias", layer.bias)
    return result.train(layer.training)


def _take_over(model: nn.Module, blocksize: int, double_quant: bool, reasons: dict[str, str]) -> None:
    """Mark the model as packed by nf4lora; with `is_loaded_in_4bit` TRL would round the adapters to bfloat16."""
    owner: Any
    for owner in model.modules():
        owner.__dict__.pop("is_loaded_in_4bit", None)
        if "hf_quantizer" not in owner.__dict__:
            continue
        old = owner.hf_quantizer.quantization_config
        compute_dtype = getattr(old, "bnb_4bit_compute_dtype", None)
        not_packed = [*(getattr(old, "llm_int8_skip_modules", None) or []), *reasons]
        config = NF4Config(
            blocksize=blocksize,
            double_quant=double_quant,
            modules_to_not_convert=not_packed or None,
            compute_dtype=compute_dtype,
        )
        mark_as_packed(owner, config, dict(reasons))


def _checked(
    name: str,
    *,
    weight: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested: tuple[Tensor, Tensor, float, int] | None,
    shape: Any,
    blocksize: int,
    dtype: torch.dtype,
    quant_type: str,
) -> PackedWeight:
    if quant_type != "nf4":
        raise _error(name, "must be packed in nf4", f"{quant_type}; load it with bnb_4bit_quant_type='nf4'")
    if len(shape) != 2 or blocksize not in BLOCKSIZES:
        raise _error(name, "must be a matrix in blocks of 32 to 4096", f"shape {list(shape)} in blocks of {blocksize}")
    _check_map(name, "quant_map", code, lambda device: ops.nf4_dequantize(*_unit_codes(device), 32, torch.float32)[:16])
    count = shape[0] * shape[1]
    blocks = -(-count // blocksize)
    qweight = weight.contiguous().view(torch.uint8).view(-1)  # bitsandbytes stores another dtype for FSDP
    _check_size(name, "weight", qweight, -(-count // 2), torch.uint8)
    _check_size(name, "absmax", absmax, blocks, torch.float32 if nested is None else torch.uint8)
    if nested is None:
        _check_finite(name, "absmax", absmax)
        return PackedWeight(name, qweight, absmax.view(-1), None, (shape[0], shape[1]), blocksize, dtype)
    nested_absmax, nested_map, offset, nested_blocksize = nested
    if nested_blocksize != NESTED_BLOCKSIZE:
        raise _error(name, f"must have nested blocks of {NESTED_BLOCKSIZE}", f"{nested_blocksize}")
    _check_map(name, "nested_quant_map", nested_map, _nested_map)
    _check_size(name, "nested_absmax", nested_absmax, -(-blocks // NESTED_BLOCKSIZE), torch.float32)
    scales = torch.cat([nested_absmax.view(-1), nested_absmax.new_tensor([offset])])
    _check_finite(name, "nested_absmax and nested_offset", scales)
    return PackedWeight(name, qweight, absmax.view(-1), scales, (shape[0], shape[1]), blocksize, dtype)


def _check_size(name: str, what: str, tensor: Tensor, count: int, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.numel() != count:
        raise _error(name, f"must have {what} of {count} {dtype}", f"{tensor.numel()} {tensor.dtype}")


def _check_finite(name: str, what: str, scales: Tensor) -> None:
    if not scales.is_meta and not scales.isfinite().all():
        raise _error(name, f"must have finite {what}", "NaN or Inf; the checkpoint is damaged")


def _check_map(name: str, what: str, code: Tensor, expected: Callable[[torch.device], Tensor]) -> None:
    # Two builds of bitsandbytes may differ by one unit in the last place; a larger difference means another format.
    values = code.view(-1).float()
    if len(values) not in (16, 256) or not torch.allclose(values, expected(code.device), rtol=1e-6, atol=0):
        raise _error(name, f"must have the {what} of NF4", "another one; quantise the 16-bit model with NF4Config")


def _unit_codes(device: torch.device) -> tuple[Tensor, Tensor]:
    """The sixteen codes in order, twice, in one block of scale 1."""
    codes = torch.arange(0, 16, 2, dtype=torch.uint8, device=device)
    return ((codes << 4) | (codes + 1)).repeat(2), torch.ones(1, device=device)


def _nested_map(device: torch.device) -> Tensor:
    """The 256 values of the 8-bit map, as the op decodes them with scale 1 and offset 0."""
    return ops.absmax_dequantize(
        torch.arange(256, device=device).to(torch.uint8), torch.tensor([1.0, 0.0], device=device)
    )


def _has_bitsandbytes_base(module: nn.Module, name: str) -> bool:
    return any(c.__name__ == name and c.__module__.split(".")[0] == "bitsandbytes" for c in type(module).__mro__)


def _error(name: str, must: str, got: str) -> ValueError:
    return ValueError(f"nf4lora.bitsandbytes: {name} {must}, got {got}")
