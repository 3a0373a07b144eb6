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
    """Whether this is a DTensor, without importing torch.distributed.tensor."""
    return type(value) not in PLAIN and hasattr(value, "to_local")


def local(value: Any) -> Any:
    """The part of a tensor that this process holds: all of it, unless it is a DTensor."""
    return value.to_local() if is_shard(value) else value


def as_shard(tensor: Tensor, p: Any, by_rows: bool = False) -> Tensor:
    """State of p's shard as a DTensor that is sharded as p is, or by rows (absmax, whose blocks follow the shards).

    The DTensor holds `tensor` itself. `DTensor.from_local` would copy it to the device of p's mesh if it is on the host
    (a streamed arena, a parameter that FSDP2 has offloaded), and a step would not update the copy.
    """
    if not is_shard(p):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate, Shard

    likeness = torch.empty_like(tensor, device="meta")  # from_local does not copy meta tensors
    if by_rows:
        placements = [Shard(0) if placement.is_shard() else Replicate() for placement in p.placements]
        shown: Any = DTensor.from_local(likeness, p.device_mesh, placements, run_check=False)
    else:
        shown = DTensor.from_local(
            likeness, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
    return dtensor_like(tensor, shown)


def shard_of(value: Any, like: Any) -> Any:
    """This process's part of a saved tensor. A full tensor of the shape of `like`, a DTensor, is sharded as that is."""
    if is_shard(value) or not isinstance(value, Tensor) or not is_shard(like) or value.shape != like.shape:
        return local(value)
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local()


def absmax_blocks(p: Any) -> int:
    """The number of rows of absmax: one for each block.

    Every shard has as many rows as the largest one, so that the rows of all processes form a DTensor, and one more for
    `shard_size_tag`. The tag is needed because the rows of a shard of another size could have the right number.
    """
    if not is_shard(p):
        return blocks_of(p.numel())
    sizes = list(p.shape)
    for parts, placement in zip(p.device_mesh.shape, p.placements, strict=True):
        if placement.is_shard():
            sizes[placement.dim] = -(-sizes[placement.dim] // parts)
    return blocks_of(math.prod(sizes)) + 1


def shard_size_tag(p: Any) -> Tensor | None:
    """The last row of a shard's absmax, which holds its number of values: [2] float32, both exact."""
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
    of_meshes: list[Any] = []
    for mesh, grads_of_mesh in by_mesh.items():
        if mesh is None:
            of_meshes += norms(grads_of_mesh)
        else:
            norm: Any = torch.nn.utils.get_total_norm(grads_of_mesh)
            of_meshes.append((norm.full_tensor() if is_shard(norm) else norm).float())
    return torch.linalg.vector_norm(torch.stack([value.to(of_meshes[0].device) for value in of_meshes]))
