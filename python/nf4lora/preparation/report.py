"""The report on a model: bytes by kind and dtype, what stayed in 16 bits and why, which layers carry adapters.

The report inspects the modules, not a configuration, so that it is right for every model: plain, packed, with adapters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora.compat.torch import buffers_of, children_of, parameters_of, uncompiled
from nf4lora.nn.linear import BLOCKSIZES, NF4Linear
from nf4lora.nn.model_tree import WRAPPED, adapter_names, base_name, base_of, output_head
from nf4lora.words import dtype_name

PACKED_KINDS = {"weight": "packed codes", "weight_absmax": "absmax", "weight_nested": "nested absmax", "bias": "biases"}
KINDS = (
    *("packed codes", "absmax", "nested absmax", "linear, not packed", "embeddings", "output head", "norms", "biases"),
    *("adapters", "other", "buffers"),
)


# Expected reasons for a matrix to stay in 16 bits, about which nobody needs a warning.
EXPECTED = (
    *("an embedding", "output head", "named in modules_to_not_convert"),
    *("head of the model's task", "in no checkpoint", "named in modules_to_save"),
)


@dataclass(frozen=True)
class Tensors:
    """All tensors of one kind and dtype."""

    kind: str
    dtype: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Kept:
    """A matrix that is not packed, and why; bytes is 0 for one that is tied to a matrix counted before."""

    name: str
    dtype: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class Adapted:
    """Layers with the same last name that carry an adapter.

    count: how many do; of: how many linear layers have this name; packed: how many of the adapters are over a packed
    layer. `of` is 0 for the output head, and for modules that are not linear layers, such as experts in one tensor.
    """

    name: str
    count: int
    of: int
    packed: int


@dataclass(frozen=True)
class Report:
    """The result of `report`: print it, or use `.to_dict()`."""

    tensors: tuple[Tensors, ...]
    packed_layers: int
    bits_per_weight: float | None
    kept: tuple[Kept, ...]
    adapters: tuple[Adapted, ...]
    trained_in_full: tuple[str, ...]
    linear_layers: int
    trainable: int
    parameters: int

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.tensors)

    @property
    def adapted_layers(self) -> int:
        return sum(row.count for row in self.adapters)

    def mostly_unpacked(self, most: float = 0.1) -> str | None:
        """A warning, if more than this share of the weights that could be packed stays in 16 or 32 bits; else None.

        Embeddings, the output head, modules trained in full, and modules that the user excluded are not counted.
        """
        sizes: Counter[str] = Counter()
        for row in self.kept:
            if not row.reason.startswith(EXPECTED) and not row.name.startswith(self.trained_in_full):
                sizes[row.reason] += row.bytes // getattr(torch, row.dtype).itemsize
        kept = sum(sizes.values())
        packed = 2 * sum(row.bytes for row in self.tensors if row.kind == "packed codes")
        if not packed or kept <= most * (kept + packed):
            return None
        reasons = "; ".join(f"{reason} ({size / 1e6:.1f} M)" for reason, size in sizes.most_common(3))
        return (
            f"{kept / (kept + packed):.0%} of the weights beyond embeddings and head stay in 16 or 32 bits and take as "
            f"much memory as before: {reasons}; print(nf4lora.report(model)) names each"
            + ("; a dense model of the same family fits into 4 bits whole" if "experts" in reasons else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as numbers, strings, lists and dicts, for JSON."""
        rows = ("tensors", "kept", "adapters")
        fields = asdict(self) | {"bytes": self.bytes, "adapted_layers": self.adapted_layers}
        return fields | {key: list(fields[key]) for key in (*rows, "trained_in_full")}

    def __str__(self) -> str:
        lines = [f"{'kind':<20}{'dtype':<10}{'tensors':>8}{'MiB':>12}{'share':>9}"]
        for row in self.tensors:
            part = row.bytes / max(self.bytes, 1)
            lines.append(f"{row.kind:<20}{row.dtype:<10}{row.count:>8}{row.bytes / 2**20:>12.2f}{part:>9.1%}")
        lines.append(f"{'total':<20}{'':<10}{sum(row.count for row in self.tensors):>8}{self.bytes / 2**20:>12.2f}")
        if self.bits_per_weight is not None:
            lines.append(f"packed in NF4: {self.packed_layers} layers, {self.bits_per_weight:.3f} bits per weight")
        else:
            lines.append("packed in NF4: nothing")
        lines += _grouped("not packed", self.kept)
        if self.adapters:
            linear = sum(row.count for row in self.adapters if row.of)
            share = f"{linear / max(self.linear_layers, 1):.1%}"
            others = f" and {self.adapted_layers - linear} other modules" if linear < self.adapted_layers else ""
            names = ", ".join(f"{row.name} {row.count}" + (f"/{row.of}" if row.of else "") for row in self.adapters)
            lines.append(f"adapters on {linear} of {self.linear_layers} linear layers ({share}){others}: {names}")
            if loose := sum(row.count - row.packed for row in self.adapters):
                lines.append(f"  {loose} of them over a layer that is not packed: PEFT's own compute")
        if self.trained_in_full:
            lines.append(f"trained in full: {', '.join(self.trained_in_full)}")
        trained = self.trainable / max(self.parameters, 1)
        lines.append(f"trainable: {self.trainable:,} of {self.parameters:,} parameters ({trained:.2%})")
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Account for every byte of a model, packed or not, with adapters or without.

    `print(report(model))` shows bytes by kind and dtype (a tied tensor counts once), bits per weight of the packed
    layers (codes and scales over N * K), each matrix that is not packed with the reason, which layers carry adapters,
    and the trainable share (a packed weight counts as the N * K parameters that it holds).

    Raises:
        TypeError: model is not an nn.Module.

    >>> layer = NF4Linear.from_linear(nn.Linear(256, 1024, bias=False))
    >>> report(nn.Sequential(layer)).bits_per_weight
    4.1270751953125
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be an nn.Module, got {type(model).__name__}")
    model = uncompiled(model)
    of_adapters, wrappers = adapter_names(model), _wrappers(model)
    head, why_kept = _bare_head(model), _reasons(model)
    seen: set[Any] = set()
    sizes: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    kept: list[Kept] = []
    suffixes: Counter[str] = Counter()
    trainable = parameters = packed_bytes = packed_weights = packed_layers = 0
    for prefix, module in model.named_modules():
        name = base_name(prefix)
        if isinstance(module, nn.Linear) and prefix not in of_adapters and module is not head:
            suffixes[name.rpartition(".")[2]] += 1
        if isinstance(module, NF4Linear):
            packed_layers += 1
            packed_weights += module.in_features * module.out_features
        for key, tensor in (*parameters_of(module).items(), *buffers_of(module).items()):
            if tensor is None:
                continue
            of_adapter = (f"{prefix}.{key}" if prefix else key) in of_adapters
            kind = "adapters" if of_adapter else _kind(module, key, tensor, head)
            new = (identity := _identity(tensor)) not in seen
            seen.add(identity)
            size = tensor.numel() * tensor.element_size() if new else 0
            if _is_kept_matrix(module, key, tensor, kind):
                full_name, reason = _joined(name, key), why_kept(_joined(name, key), module, new)
                kept.append(Kept(full_name, dtype_name(tensor.dtype), size, reason))
            if not new:
                continue
            sizes[kind, dtype_name(tensor.dtype)] += size
            counts[kind, dtype_name(tensor.dtype)] += 1
            if isinstance(module, NF4Linear) and key != "bias":
                packed_bytes += size
            weights = _parameters_held(module, key, tensor)
            parameters += weights
            trainable += weights if tensor.requires_grad else 0
    carrying = [(name.rpartition(".")[2], base) for name, base in wrappers if base is not None]
    return Report(
        tensors=tuple(
            Tensors(kind, dtype, counts[kind, dtype], size)
            for (kind, dtype), size in sorted(sizes.items(), key=lambda item: (KINDS.index(item[0][0]), item[0][1]))
        ),
        packed_layers=packed_layers,
        bits_per_weight=8 * packed_bytes / packed_weights if packed_weights else None,
        kept=tuple(kept),
        adapters=tuple(
            Adapted(
                suffix,
                count,
                suffixes[suffix],
                sum(s == suffix and isinstance(base, NF4Linear) for s, base in carrying),
            )
            for suffix, count in Counter(suffix for suffix, _ in carrying).items()
        ),
        trained_in_full=tuple(name for name, base in wrappers if base is None),
        linear_layers=sum(suffixes.values()),
        trainable=trainable,
        parameters=parameters,
    )


def _wrappers(model: nn.Module) -> list[tuple[str, nn.Module | None]]:
    """The name and the wrapped layer of each of PEFT's wrappers; None for a module that is trained in full."""
    wrappers: list[tuple[str, nn.Module | None]] = []
    for prefix, module in model.named_modules():
        base: Any = module
        while "base_layer" in children_of(base):
            base = base.base_layer
        if base is not module and not prefix.endswith(".base_layer"):
            wrappers.append((base_name(prefix), base))
        if "original_module" in children_of(module):
            wrappers.append((base_name(prefix), None))
    return wrappers


def _kind(module: nn.Module, key: str, tensor: Tensor, head: nn.Module | None) -> str:
    if isinstance(module, NF4Linear):
        return PACKED_KINDS[key]
    if key in buffers_of(module):
        return "buffers"
    if key == "bias" or key.endswith("_bias"):
        return "biases"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if module is head:
        return "output head"
    if "norm" in type(module).__name__.lower():
        return "norms"
    if isinstance(module, nn.Linear):
        return "linear, not packed" if tensor.is_floating_point() else "packed codes"
    return "other"


def _is_kept_matrix(module: nn.Module, key: str, tensor: Tensor, kind: str) -> bool:
    """Whether the tensor is a matrix for which the report must say why it was not packed."""
    if isinstance(module, NF4Linear) or kind in ("adapters", "buffers", "norms", "biases"):
        return False
    return tensor.ndim >= 2


def _reasons(model: nn.Module) -> Callable[[str, nn.Module, bool], str]:
    """A function from a matrix's owner to the reason why it is not packed."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    head, packed = _bare_head(model), any(isinstance(module, NF4Linear) for module in model.modules())
    quantization_config = getattr(getattr(model, "config", None), "quantization_config", None)
    skipped = getattr(quantization_config, "modules_to_not_convert", None)
    known = getattr(base_of(model), "nf4lora_skipped", {})  # the reasons that the quantizer recorded
    # An embedding in modules_to_save is trained as a copy, which the head does not share.
    originals = [children_of(module).get("original_module") for module in model.modules()]
    untied = any(
        isinstance(module, nn.Embedding) and module.weight is getattr(head, "weight", None) for module in originals
    )

    def reason(name: str, module: nn.Module, new: bool) -> str:
        if isinstance(module, nn.Embedding):
            return "an embedding is looked up, not multiplied"
        if module is head:
            if new:
                return "output head"
            return "output head, tied to the embedding" + (" as it was before training" if untied else "")
        if name in known:
            return known[name]
        if not isinstance(module, nn.Linear):
            return f"{type(module).__name__} is not a linear layer"
        if not module.weight.is_floating_point():
            return f"packed as {type(module).__name__}; nf4lora.prepare adopts it"
        if module.in_features % BLOCKSIZES[0]:
            return f"in_features {module.in_features} is no multiple of {BLOCKSIZES[0]}"
        if not packed:
            return "the model is not quantised"
        if type(module) is not nn.Linear:
            return f"{type(module).__name__} is not torch.nn.Linear itself"
        if skipped and not should_convert_module(name, skipped):
            return "named in modules_to_not_convert"
        return "left as it is"

    return reason


def _bare_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, without PEFT's wrapper."""
    head = output_head(model)
    for child in WRAPPED:
        head = getattr(head, child, head)
    return head


def _parameters_held(module: nn.Module, key: str, tensor: Tensor) -> int:
    """The number of weights that a tensor represents: N * K for packed codes, 0 for scales and buffers."""
    if key in buffers_of(module):
        return 0
    if isinstance(module, nn.Linear) and not module.weight.is_floating_point() and key != "bias":
        return module.in_features * module.out_features if key == "weight" else 0
    return tensor.numel()


def _identity(tensor: Tensor) -> Any:
    """A value that is equal for tied tensors, whether they are one object or two over the same memory."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.numel())


def _joined(name: str, key: str) -> str:
    return name if key == "weight" else f"{name}.{key}"


def _grouped(title: str, kept: Iterable[Kept]) -> list[str]:
    """One line for all layers whose names differ only in their number."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for row in kept:
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", row.name)
        groups.setdefault((pattern, row.dtype, row.reason), []).append(row.bytes)
    lines = []
    for (pattern, dtype, reason), sizes in groups.items():
        times = f" x{len(sizes)}" if len(sizes) > 1 else ""
        lines.append(f"{title}: {pattern}{times} ({dtype}, {sum(sizes) / 2**20:.2f} MiB): {reason}")
    return lines
