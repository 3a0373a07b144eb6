"""PagedAdamW: AdamW whose state lies in one arena, in 32 or 8 bits, and gives way where memory is short.

A step is read here (what takes part), in bucket.py (which chunks, which launches) and in ops/adamw.py (the arithmetic).
arena.py is the memory, state_dict.py what is saved and loaded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nf4lora.compat.torch import tree_map_only, version_of
from nf4lora.optim.arena import Arena
from nf4lora.optim.arena_cuda import PAGING
from nf4lora.optim.bucket import Bucket, BucketGradients, ParamState, arena_of, state_sizes
from nf4lora.optim.dtensor import absmax_blocks, gradient_of, local, shard_of, shard_size_tag, total_norm
from nf4lora.optim.hyperparameters import check_hyperparameters, hyperparameters_of, require
from nf4lora.optim.layout import lay_out
from nf4lora.optim.quantized import Moments
from nf4lora.optim.state_dict import read_group, read_state, unwrapped
from nf4lora.words import dtype_name

DTYPES = torch.float32, torch.bfloat16, torch.float16


class PagedAdamW(Optimizer):
    """AdamW with its state in one arena per device, small parameters included.

    On CUDA the arena is unified memory, or pinned memory that is streamed through the card; on the CPU it is RAM, or a
    file. In 32 bits a step is that of torch.optim.AdamW; in 8 bits the moments share a scale per 256 values and take
    2.03 bytes per parameter instead of 8.

    Args:
        params: parameters or groups of them, as torch.optim takes them; float32, bfloat16 or float16
        lr, betas, eps, weight_decay: as in torch.optim.AdamW
        bits: 32 or 8, of the moments
        max_grad_norm: clip all gradients together to this norm, as part of the step; None: no clipping
        page_to: folder for a file with the state of CPU parameters, which may then exceed RAM; its room is reserved
            now, and it is scratch: gone with the process, never a checkpoint
        paging: "managed" (unified memory), "streamed" (pinned memory and staging buffers) or "auto", on CUDA

    Values whose gradient is not finite are skipped with their moments, and counted: `stats()["skipped"]`. With
    max_grad_norm, where the norm is not finite, that is all of them.

    Raises:
        ValueError, TypeError: a number or a parameter that does not fit.
        OSError, MemoryError: no room for the state.

    Source: QLoRA (arXiv:2305.14314) section 3; 8-bit optimizers (arXiv:2110.02861).

    >>> weight = torch.nn.Parameter(torch.ones(4))
    >>> optimizer = nf4lora.PagedAdamW([weight], lr=0.5, weight_decay=0.0, bits=8)
    >>> weight.grad = torch.tensor([1.0, -1.0, 0.0, float("nan")])
    >>> optimizer.step()
    >>> weight.data, optimizer.stats()["skipped"]
    (tensor([0.5000, 1.5000, 1.0000, 1.0000]), 1)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        bits: int = 32,
        *,
        max_grad_norm: float | None = None,
        page_to: str | os.PathLike[str] | None = None,
        paging: str = "auto",
    ) -> None:
        require(bits in (32, 8), "bits", "32 or 8", bits)
        require(max_grad_norm is None or max_grad_norm > 0, "max_grad_norm", "positive, or None", max_grad_norm)
        require(paging in PAGING, "paging", f"one of {', '.join(PAGING)}", paging)
        self.bits, self.max_grad_norm, self.paging = int(bits), max_grad_norm, paging
        self.page_to = None if page_to is None else os.fspath(page_to)
        self._param_states: dict[Tensor, ParamState] = {}
        self._skipped: dict[torch.device, Tensor] = {}
        self._norm: tuple[Tensor, list[tuple[Tensor, int]]] | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if page_to is not None:
            self._assign_buckets()

    # ---- parameters and their buckets

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; the state of parameters added after the first step gets an arena of its own."""
        super().add_param_group(param_group)
        try:
            check_hyperparameters(self.param_groups[-1])
            params = self.param_groups[-1]["params"]
            twice = len(params) - len(set(params))  # torch warns; a step would update it in two threads at once
            require(not twice, "every parameter", "given once", f"{twice} more than once in a group")
            for p in params:
                if p.requires_grad and p.dtype not in DTYPES:
                    raise TypeError(
                        f"PagedAdamW: every parameter must be float32, bfloat16 or float16, got {dtype_name(p.dtype)}"
                    )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _assign_buckets(self) -> None:
        """Put every trained parameter into a bucket that is in none; those of a device lie together, in step order."""
        trained = [p for p in self._params() if p.requires_grad or p.grad is not None]
        waiting = [p for p in trained if p not in self._param_states or not self._param_states[p].fits(p)]
        if not waiting:
            return
        self._param_states = {p: self._param_states[p] for p in trained if p in self._param_states}
        for device in dict.fromkeys(local(p).device for p in waiting):
            params = [p for p in waiting if local(p).device == device]
            _, size = lay_out(state_sizes(params, self.bits))
            bucket = Bucket(params, self.bits, arena_of(device, size, self.page_to, self.paging))
            self._param_states |= {p: ParamState(bucket, i, bucket.states[i]) for i, p in enumerate(params)}

    def _state_of(self, p: Tensor, address: int) -> ParamState:
        """Where the state of p is. `address`: of p, since one that moved may have changed."""
        found = self._param_states.get(p)
        if found is None or found.address != address:
            if found is None or not found.fits(p):
                self._assign_buckets()
                found = self._param_states[p]
            found.address = address
        return found

    def _is_exposed(self, p: Tensor, param_state: ParamState) -> bool:
        """Whether `state[p]` is what lies in the arena, and not what somebody has put there."""
        entry, exposed = self.state.get(p), param_state.exposed
        if not entry or len(entry) != len(exposed):
            return False
        return all(map(is_, entry.values(), exposed.values()))

    def _adopt_states(self, params: list[Tensor]) -> None:
        """Take what `state` holds into the arenas; read before any is written, since one may lie where another goes."""
        self.synchronize()
        found = {p: self._read(p, self.state[p], "state").clone() if self.state.get(p) else None for p in params}
        for p, moments in found.items():
            self._adopt_state(p, moments)

    def _read(self, p: Tensor, entry: dict[str, Any], what: str) -> Moments:
        """A state of p that lies elsewhere, this process's part; p may be frozen, and have no place in an arena yet."""
        own = self._param_states.get(p)
        like = dict.fromkeys(("exp_avg", "exp_avg_sq"), p) if own is None else own.exposed
        shard = {name: shard_of(value, like.get(name)) for name, value in unwrapped(entry).items()}
        return read_state(shard, local(p).numel(), absmax_blocks(p), shard_size_tag(p), what)

    def _adopt_state(self, p: Tensor, moments: Moments | None) -> None:
        """Write these moments, or those of no step, into the arena, and expose that in `state[p]`."""
        own = self._param_states[p]
        own.bucket.fill(own.index, moments and moments.as_bits(self.bits))
        self.state[p] = dict(own.exposed)

    # ---- the step

    @torch.compiler.disable  # a compiled caller breaks its graph here: the step is one op per chunk already
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what closure returns.

        Where the card has no memory left for a copy of the gradients, the state is moved to the host first.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_hyperparameters(group)  # all of them, before anything changes
        try:
            gradients = self._gradients()
        except torch.OutOfMemoryError:
            if not self.evict():
                raise
            gradients = None
        if gradients is None:  # outside of `except`, where the error would keep the copies made so far
            gradients = self._gradients()
        params, grads, scale = gradients
        if not params:
            return loss
        by_bucket: dict[Bucket, BucketGradients] = {}
        displaced: list[Tensor] = []  # whose state is not in the arena
        strided: list[tuple[Tensor, Tensor]] = []  # which the op takes as contiguous copies
        for (p, number), grad in zip(params, grads):
            shard = local(p)
            own = self._state_of(p, shard.data_ptr())
            if not self._is_exposed(p, own):
                displaced.append(p)
            if not shard.is_contiguous():
                strided.append((shard, shard.contiguous()))
                shard = strided[-1][1]
            if own.bucket not in by_bucket:
                by_bucket[own.bucket] = BucketGradients()
            by_bucket[own.bucket].add(own.index, shard, grad, number)
        if displaced:
            self._adopt_states(displaced)
        hyperparameters = [hyperparameters_of(group) for group in self.param_groups]
        for bucket, taking_part in by_bucket.items():
            device = bucket.arena.device
            if device not in self._skipped:
                self._skipped[device] = torch.zeros(1, dtype=torch.int64, device=device)
            on_device = None if scale is None else scale.to(device)
            bucket.step(taking_part, hyperparameters, self._skipped[device], on_device)
        for shard, updated in strided:
            shard.copy_(updated)
        torch.autograd.graph.increment_version([p for p, _ in params])
        return loss

    def _gradients(self) -> tuple[list[tuple[Tensor, int]], list[Tensor], Tensor | None]:
        """The parameters that have one, each with the number of its group; the gradients as the op takes them; and the
        factor [1] that clips them."""
        params = [(p, i) for i, group in enumerate(self.param_groups) for p in group["params"] if p.grad is not None]
        grads = [gradient_of(p, p.grad) for p, _ in params]
        if self.max_grad_norm is None or not grads:
            return params, grads, None
        norm = self.grad_norm()
        self._norm = None
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        return params, grads, torch.where(norm.isfinite(), scale, math.nan).view(1)

    @torch.compiler.disable
    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients together, of all shards: [] float32, on the device of the first.

        For whoever looks at it before a step: unless a gradient changes until then, the step clips by this one
        (max_grad_norm) instead of computing it again. Zero where there is no gradient.
        """
        grads = [p.grad for p in self._params() if p.grad is not None]
        if self._norm is not None:
            norm, seen = self._norm
            if len(seen) == len(grads) and all(
                a is b and version_of(a) == version for a, (b, version) in zip(grads, seen)
            ):
                return norm
        norm = total_norm(grads) if grads else torch.zeros(())
        self._norm = norm, [(grad, version_of(grad)) for grad in grads]
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim."""
        self._norm = None
        super().zero_grad(set_to_none)

    # ---- memory

    def _arenas(self) -> list[Arena]:
        return list(dict.fromkeys(own.bucket.arena for own in self._param_states.values()))

    def evict(self) -> int:
        """Move the state out of the way: from the card to the host, from RAM to the file. Returns the bytes freed.

        For a training step that ran out of memory, before it is tried again; the next optimizer step brings it back.
        """
        return sum(each.evict() for each in self._arenas())

    def synchronize(self) -> None:
        """Wait until the tensors in `state` hold what the last step computed; `state_dict` does."""
        for each in self._arenas():
            each.wait()

    def stats(self) -> dict[str, Any]:
        """Where the state is.

        mode: ram, file, managed or streamed; bytes: of state; resident, paged: of these, close to where they are used,
        and not; peak: most that were resident when asked, or on CUDA at any time; skipped: gradients not finite.
        """
        arenas = self._arenas()
        each = [arena.stats() for arena in arenas]
        found: dict[str, Any] = {"mode": ", ".join(dict.fromkeys(arena.mode for arena in arenas)) or "none"}
        found["bytes"] = sum(arena.bytes for arena in arenas)
        found |= {name: sum(one[name] for one in each) for name in ("resident", "paged", "peak")}
        found["skipped"] = sum(int(count) for count in self._skipped.values())
        return found

    def report(self) -> str:
        """stats() in a line, and why an arena is of its mode where that was chosen."""
        stats = self.stats()
        mebibytes = {name: f"{stats[name] / (1 << 20):.1f} MiB" for name in ("bytes", "resident", "paged", "peak")}
        line = (
            f"PagedAdamW, {self.bits} bits: {mebibytes['bytes']} of state ({stats['mode']}), {mebibytes['resident']} "
            f"resident, {mebibytes['paged']} paged, peak {mebibytes['peak']}; {stats['skipped']} gradients skipped"
        )
        return "\n".join([line, *dict.fromkeys(each.reason for each in self._arenas() if each.reason)])

    # ---- state

    @torch.compiler.disable
    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim; moments of 8 bits are uint8, with their absmax [ceil(n/256), 2] float32."""
        self.synchronize()
        return super().state_dict()

    @torch.compiler.disable
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what PagedAdamW, torch.optim.AdamW or bitsandbytes' AdamW saved, converted to `bits`.

        Raises:
            ValueError: it is of another optimizer or of other parameters; nothing has changed then.
        """
        hook = self.register_load_state_dict_pre_hook(_readable)  # the last: hooks of others see tensors
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "bits" in state:  # unpickled, or a deep copy: no state is in an arena yet
            self._param_states, self._skipped, self._norm = {}, {}, None
        super().__setstate__(state)
        for p, entry in list(self.state.items()):
            if isinstance(entry, Moments):  # of `_readable`, as is the next
                self._adopt_state(p, entry)
            elif isinstance(entry, _Waiting):
                self.state[p] = entry.entry

    def __getstate__(self) -> dict[str, Any]:
        self.synchronize()
        options = ("bits", "max_grad_norm", "page_to", "paging")
        return super().__getstate__() | {name: getattr(self, name) for name in options}


@dataclass(frozen=True)
class _Waiting:
    """The state of a parameter that is frozen while it is loaded, as it was saved: adopted once it is trained."""

    entry: dict[str, Any]


def _readable(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with every state read and checked, before anything of the optimizer changes.

    As Moments, or waiting: torch would cast tensors to the dtype of their parameter.
    """
    assert isinstance(optimizer, PagedAdamW)
    lengths = [
        [len(group["params"]) for group in each] for each in (state_dict["param_groups"], optimizer.param_groups)
    ]
    if lengths[0] != lengths[1]:
        return state_dict  # torch says so
    groups = [read_group(group, i) for i, group in enumerate(state_dict["param_groups"])]
    params = dict(zip((key for group in groups for key in group["params"]), optimizer._params()))
    optimizer._assign_buckets()
    addresses = {local(each.exposed["exp_avg"]).data_ptr() for each in optimizer._param_states.values()}  # written to
    state = {}
    for key, entry in state_dict["state"].items():
        state[key] = entry
        if not entry or key not in params:
            continue
        moments = optimizer._read(params[key], entry, f"the state of parameter {key}")
        if params[key] in optimizer._param_states:
            state[key] = moments.clone() if moments.exp_avg.data_ptr() in addresses else moments
        else:
            state[key] = _Waiting(tree_map_only(Tensor, torch.clone, dict(entry)))
    return {**state_dict, "state": state, "param_groups": groups}
