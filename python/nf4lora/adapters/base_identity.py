"""Which base an adapter belongs to: what `nf4lora.json` records of the frozen weights, and how they are compared.

The codes of each packed layer are hashed, because they are equal to the bit wherever the same weight is packed. Scales
and 16-bit weights are compared by value: two encoders may round a few double-quantised scales to neighbouring 8-bit
values, and a bfloat16 checkpoint may be loaded in float32. For this comparison a tensor is reduced to four sums of its
values with pseudo-random signs, each divided by the square root of the number of values. If two tensors differ by d on
average (root mean square), so do these sums. About one in a hundred million other tensors is taken for the same.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Callable, Container, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from nf4lora import ops
from nf4lora.compat.torch import children_of, parameters_of, version_of
from nf4lora.nn.linear import NF4Linear
from nf4lora.nn.model_tree import adapter_names, base_name, base_of, nf4_layers

SUMS = 4
ROW, ROWS = 1 << 14, 64  # values of a row, and rows summed at a time: an embedding is never copied to float32 whole
# The largest difference of two tensors that count as equal, as a share of their root mean square. A 16-bit weight may
# be rounded to bfloat16 (2^-9) and then to float16. Of the scales half a percent may be off by one step of the 8-bit
# map, which is 1.4 % of the largest scale: 0.1 % of it on average. For comparison: a weight that was drawn anew differs
# by 1.4, the scales of another weight by 0.1.
TOLERANCE = 2**-7

LARGE = 1 << 24  # the sums of a 16-bit weight with at least so many values are cached: experts, large embeddings

_remembered: Any = WeakIdKeyDictionary()  # tensor -> {key: (state of the tensors it was taken from, value)}


def base_hash(model: nn.Module) -> str:
    """SHA-256 of the packed base: name, shape, blocksize and bytes of each NF4 layer, in module order.

    The hash is the same before and after `prepare` and on every device, and does not depend on adapters.
    """
    layers = {
        f"{name} {layer.out_features} {layer.in_features} {layer.blocksize}\n": _tensors(layer)
        for name, layer in packed_layers(model).items()
    }

    def digest() -> str:
        result = hashlib.sha256()
        for line, tensors in layers.items():
            result.update(line.encode())
            for tensor in tensors:
                result.update(_bytes(tensor))
        return result.hexdigest()

    return _remember(tuple(layers), [tensor for tensors in layers.values() for tensor in tensors], digest)


def identity(model: nn.Module, left_out: Container[str] = ()) -> dict[str, Any]:
    """What identifies the base, by the names that its tensors had before PEFT: plain values for a JSON file.

    Args:
        left_out: parameters that the adapter's own file holds

    Returns:
        packed: shape, blocksize, double_quant, hash of the codes and sums of the scales of each NF4 layer
        weights: shape and sums of each other parameter
    """
    packed = {
        name: {
            "shape": [layer.out_features, layer.in_features],
            "blocksize": layer.blocksize,
            "double_quant": layer.double_quant,
            "codes": _hash_of_codes(layer),
            "scales": _sums_of_scales(layer),
        }
        for name, layer in packed_layers(model).items()
    }
    of_tensor: dict[int, list[float]] = {}  # tied parameters have several names
    weights = {}
    for name, parameter in other_parameters(model).items():
        if name not in left_out and not parameter.is_meta:
            if id(parameter) not in of_tensor:
                of_tensor[id(parameter)] = _sums_of_weight(parameter)
            weights[name] = {"shape": list(parameter.shape), "sums": of_tensor[id(parameter)]}
    return {"packed": packed, "weights": weights}


def differences(saved: Mapping[str, Any], model: nn.Module, rename: Mapping[str, str], complete: bool) -> list[str]:
    """One text for each way in which the model differs from a saved identity; empty where the base is the same.

    Args:
        rename: module names in the model by their names in the file
        complete: whether an NF4 layer that the file does not name counts as a difference
    """
    layers, wrong = packed_layers(model), []
    for name, expected in saved["packed"].items():
        layer = layers.pop(rename.get(name, name), None)
        if layer is None:
            wrong.append(f"{name} is not in NF4")
            continue
        actual = {"shape": [layer.out_features, layer.in_features], "blocksize": layer.blocksize}
        actual["double_quant"] = layer.double_quant
        wrong_options = [key for key in actual if actual[key] != expected[key]]
        if wrong_options:
            wrong += [f"{name} has {key} {actual[key]} instead of {expected[key]}" for key in wrong_options]
        elif _hash_of_codes(layer) != expected["codes"]:
            wrong.append(f"{name} has other codes")
        elif not close(_sums_of_scales(layer), expected["scales"]):
            wrong.append(f"{name} has the same codes with other scales")
    wrong += [f"{name} is in NF4 but was not" for name in layers] if complete else []
    parameters = other_parameters(model)
    trained = _trained_copies(base_of(model))
    for name, expected in saved["weights"].items():
        module, _, key = name.rpartition(".")
        if module in saved["packed"] and key != "bias":  # some files list codes here too, which were compared above
            continue
        full_name = f"{rename.get(module, module)}.{key}" if module else key
        parameter = parameters.get(full_name)
        if parameter is None:
            wrong += [] if full_name in trained else [f"{name} is missing"]
        elif list(parameter.shape) != expected["shape"]:
            wrong.append(f"{name} has shape {list(parameter.shape)} instead of {expected['shape']}")
        elif not parameter.is_meta and not close(_sums_of_weight(parameter), expected["sums"]):
            wrong.append(f"{name} has other values")
    return wrong


def check_identity(saved: Any) -> str:
    """What is wrong with an identity that was read from a file; "" where it has the right structure."""
    numbers = [SUMS + 1, (int, float)]
    packed = {"shape": [2, int], "blocksize": int, "double_quant": bool, "codes": str, "scales": numbers}
    kinds: dict[str, dict[str, Any]] = {"packed": packed, "weights": {"shape": [None, int], "sums": numbers}}
    if not isinstance(saved, dict):
        return f"an object, got {type(saved).__name__}"
    for part, fields in kinds.items():
        if not isinstance(saved.get(part), dict):
            return f"{part} as an object, got {type(saved.get(part)).__name__}"
        for name, entry in saved[part].items():
            for field, kind in fields.items():
                value = entry.get(field) if isinstance(entry, dict) else None
                if isinstance(kind, list):
                    good = isinstance(value, list) and kind[0] in (None, len(value))
                    good = good and all(isinstance(item, kind[1]) for item in value)  # type: ignore[union-attr]
                else:
                    good = isinstance(value, kind)
                if not good:
                    return f"{field} of {name} in {part}, got {value!r}"
    return ""


# ---- the tensors of a base ----


def packed_layers(model: nn.Module) -> dict[str, NF4Linear]:
    """The NF4 layers by the names that they had before PEFT; a shared layer is listed once."""
    rename = _before_replication(model)
    layers: dict[str, NF4Linear] = {}
    for name, layer in nf4_layers(model):
        layers.setdefault(rename(name), layer)
    return layers


def other_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters that are neither packed nor replaced by a trained copy, by their names before PEFT."""
    base, rename = base_of(model), _before_replication(model)
    packed = {id(tensor) for layer in packed_layers(model).values() for tensor in _tensors(layer)}
    not_base, replaced = adapter_names(base), _replaced(base)
    parameters: dict[str, nn.Parameter] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if id(parameter) not in packed and name not in not_base and not name.startswith(replaced):
            parameters.setdefault(rename(base_name(name)), parameter)
    return parameters


def _replaced(base: nn.Module) -> tuple[str, ...]:
    """Prefixes of the original modules that an adapter replaces by trained copies, each with a dot at the end."""
    wrappers = [name for name, module in base.named_modules() if children_of(module).get("modules_to_save")]
    return tuple(f"{name}.original_module." for name in wrappers)


def _trained_copies(base: nn.Module) -> set[str]:
    """Names of the parameters that an adapter trains in full."""
    replaced = _replaced(base)
    return {base_name(name) for name, _ in base.named_parameters(remove_duplicate=False) if name.startswith(replaced)}


def _before_replication(model: nn.Module) -> Callable[[str], str]:
    """A function from a layer's name to the one before PEFT's layer_replication, which repeats and renumbers layers."""
    config = next(iter((getattr(base_of(model), "peft_config", None) or {}).values()), None)
    ranges = getattr(config, "layer_replication", None)
    if not ranges:
        return lambda name: name
    numbers = [number for first, end in ranges for number in range(first, end)]

    def rename(name: str) -> str:
        def original(match: re.Match[str]) -> str:
            return f"{match[1]}{numbers[int(match[2])]}." if int(match[2]) < len(numbers) else match[0]

        return re.sub(r"^(.*?\b(?:layers?|h)\.)(\d+)\.", original, name, count=1)

    return rename


# ---- hashes and sums of tensors ----


def sums(tensor: Tensor) -> list[float]:
    """Root mean square, and four sums with pseudo-random signs, each over the square root of the number of values."""
    flat = tensor.detach().reshape(-1)
    squares = torch.zeros((), dtype=torch.float64, device=flat.device)
    totals = torch.zeros(SUMS, dtype=torch.float64, device=flat.device)
    signs = _signs(0, ROW, flat.device)
    for number, chunk in enumerate(flat.split(ROW * ROWS)):
        values = chunk.float()
        squares += torch.linalg.vector_norm(values).double().square()
        # All rows of values use the signs of the first row, and row i is then multiplied by a sign of its own. So the
        # signs are a small matrix, which stays in the cache.
        full_rows = values.numel() // ROW
        rows = values[: full_rows * ROW].view(full_rows, ROW) @ signs.T
        if remainder := values.numel() - full_rows * ROW:
            rows = torch.cat([rows, (signs[:, :remainder] @ values[full_rows * ROW :])[None]])
        totals += (rows.double() * _signs(number * ROWS, len(rows), flat.device).T.double()).sum(0)
    count = max(flat.numel(), 1)
    numbers = [math.sqrt(squares.item() / count), *(totals / math.sqrt(count)).tolist()]
    return [float(f"{number:.6g}") for number in numbers]


def close(one: list[float], other: list[float]) -> bool:
    """Whether tensors with these sums count as equal."""
    if not all(map(math.isfinite, [*one, *other])):
        return str(one) == str(other)
    allowed = TOLERANCE * max(one[0], other[0])
    apart = math.sqrt(sum((a - b) ** 2 for a, b in zip(one[1:], other[1:])) / SUMS)
    return abs(one[0] - other[0]) <= allowed and apart <= allowed


@functools.lru_cache(maxsize=4)
def _signs(first: int, length: int, device: torch.device) -> Tensor:
    """[SUMS, length] of +1 and -1, the same on every machine: one bit of a hash of each index from `first` on."""
    index = torch.arange(first, first + length, dtype=torch.int64)
    rows = []
    for row in range(SUMS):
        mixed = (index * 2654435761 + row * 40503 + 12345) & 0xFFFFFFFF
        for factor in (2246822519, 3266489917):
            mixed = ((mixed ^ (mixed >> 15)) * factor) & 0xFFFFFFFF  # int64 may overflow: the low 32 bits stay right
        rows.append(1.0 - 2.0 * ((mixed >> 16) & 1).float())
    return torch.stack(rows).to(device)


def _tensors(layer: NF4Linear) -> list[Tensor]:
    """The parameters themselves: `layer.weight` would be a guard, which is not kept alive by the layer."""
    state = parameters_of(layer)
    tensors = (state.get(name, vars(layer).get(name)) for name in ("weight", "weight_absmax", "weight_nested"))
    return [tensor for tensor in tensors if tensor is not None]


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()


def _hash_of_codes(layer: NF4Linear) -> str:
    codes = _tensors(layer)[0]
    return _remember("codes", [codes], lambda: hashlib.sha256(_bytes(codes)).hexdigest()[:16])


def _sums_of_weight(parameter: nn.Parameter) -> list[float]:
    # Small weights are summed each time, because a write through `.data` does not change a tensor's version.
    small = parameter.numel() < LARGE or parameter.requires_grad
    return sums(parameter) if small else _remember("sums", [parameter], lambda: sums(parameter))


def _sums_of_scales(layer: NF4Linear) -> list[float]:
    def scales() -> list[float]:
        arguments = layer.op_arguments()
        absmax, nested = arguments["absmax"], arguments["nested"]
        return sums(absmax if nested is None else ops.absmax_dequantize(absmax, nested))

    return _remember("scales", _tensors(layer)[1:], scales)


def _remember(key: Hashable, tensors: list[Tensor], make: Callable[[], Any]) -> Any:
    """The result of make(), cached until one of the tensors is written to or moved."""
    try:
        state = tuple((version_of(t), t.data_ptr(), t.dtype, t.shape, t.device) for t in tensors)
    except RuntimeError:  # a tensor made in inference mode counts no versions
        return make()
    if not tensors:
        return make()
    values = _remembered.setdefault(tensors[0], {})
    if key not in values or values[key][0] != state:
        values[key] = (state, make())
    return values[key][1]
