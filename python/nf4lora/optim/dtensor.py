"""Parameters of which this process holds a shard (DTensor: FSDP2, tensor parallelism), and their state."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nf4lora.compat.torch import dtensor_like, norms
from nf4lora.optim.quantized import blocks_of

PLAIN = Tensor, torch.nn.Parameter


def is_shard(value: Any) -> bool:
    """Whether it is a DTensor; asked so that torch.distributed.tensor is imported by those who use it."""
    return type(value) not in PLAIN and hasattr(value, "to_local")


def local(value: Any) -> Any:
    """The part of a tensor that this process holds: all of it, unless it is a DTensor."""
    return value.to_local() if is_shard(value) else value


def as_shard(tensor: Tensor, p: Any, by_rows: bool = False) -> Tensor:
    """State of p's shard as a DTensor that lies like p, or along its rows: absmax, whose blocks follow the shards.

    It holds `tensor` itself, wherever that is: from_local would copy the state of a streamed arena, or of a parameter
    that FSDP2 has offloaded, from the host to the device of p's mesh, and no step would ever reach the copy.
    """
    if not is_shard(p):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate, Shard

    likeness = torch.empty_like(tensor, device="meta")  # which from_local leaves where it is
    if by_rows:
        placements = [Shard(0) if each.is_shard() else Replicate() for each in p.placements]
        shown: Any = DTensor.from_local(likeness, p.device_mesh, placements, run_check=False)
    else:
        shown = DTensor.from_local(
            likeness, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
    return dtensor_like(tensor, shown)


def shard_of(value: Any, like: Any) -> Any:
    """This process's part of a saved tensor: a DTensor's own, or that of a whole one where state lies like `like`."""
    if is_shard(value) or not isinstance(value, Tensor) or not is_shard(like) or value.shape != like.shape:
        return local(value)
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local()


def absmax_blocks(p: Any) -> int:
    """Rows of absmax: one a block.

    A shard has those of the largest, so that every process has as many and together they are a DTensor; and one more,
    for `shard_size_tag`, since blocks follow the shards, and scales of others would fit in number.
    """
    if not is_shard(p):
        return blocks_of(p.numel())
    sizes = list(p.shape)
    for parts, placement in zip(p.device_mesh.shape, p.placements, strict=True):
        if placement.is_shard():
            sizes[placement.dim] = -(-sizes[placement.dim] // parts)
    return blocks_of(math.prod(sizes)) + 1


def shard_size_tag(p: Any) -> Tensor | None:
    """The last row of absmax of a shard, which tells how many values it has: [2] float32, each exact."""
    if not is_shard(p):
        return None
    return torch.tensor(divmod(local(p).numel(), 1 << 20), dtype=torch.float32)


def gradient_of(p: Any, grad: Any) -> Tensor:
    """This process's part of p's gradient, in p's dtype and contiguous."""
    _require_dense(grad)
    if is_shard(grad):
        grad = local(grad if grad.placements == p.placements else grad.redistribute(placements=p.placements))
    if grad.dtype is not p.dtype:
        grad = grad.to(p.dtype)
    return grad if grad.is_contiguous() else grad.contiguous()


def _require_dense(grad: Any) -> None:
    if grad.layout is not torch.strided:
        raise RuntimeError(f"PagedAdamW: every gradient must be dense, got {grad.layout}")


def total_norm(grads: list[Any]) -> Tensor:
    """The 2-norm of all gradients, over all shards: [] float32, on the device of the first."""
    by_mesh: dict[Any, list[Any]] = {}
    for grad in grads:
        _require_dense(grad)
        by_mesh.setdefault(grad.device_mesh if is_shard(grad) else None, []).append(grad)
    found: list[Any] = []
    for mesh, some in by_mesh.items():
        if mesh is None:
            found += norms(some)
        else:
            norm: Any = torch.nn.utils.get_total_norm(some)
            found.append((norm.full_tensor() if is_shard(norm) else norm).float())
    return torch.linalg.vector_norm(torch.stack([each.to(found[0].device) for each in found]))
