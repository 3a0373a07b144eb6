"""PagedAdamW: AdamW whose state lies in one arena, in 32 or 8 bits, and can be moved away where memory is short.

The code of a step is here (which parameters), in bucket.py (which chunks and launches) and in csrc/cpu/isa/adamw.h or
csrc/cuda/adamw.cu (the arithmetic, whose formula ops/adamw.py documents). arena.py provides the memory, state_dict.py
reads saved states.
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
        page_to: folder for a file with the state of CPU parameters, which may then exceed RAM. Its disk space is
            reserved at once. The file is temporary and disappears with the process; it is not a checkpoint
        paging: "managed" (unified memory), "streamed" (pinned memory and staging buffers) or "auto", on CUDA

    Values whose gradient is not finite are left as they are, with their moments, and counted: `stats()["skipped"]`.
    With max_grad_norm all values are skipped if the norm is not finite.

    `found_inf`, as in torch's fused AdamW: a tensor of one float32 on the device; steps change no parameter while it is
    not zero, without a wait of the host. `uncount_step` takes back the count of such a step. (Moments of 8 bits may be
    rounded once more.)

    Raises:
        ValueError, TypeError: an option or a parameter that is not allowed.
        OSError, MemoryError: there is not enough memory or disk space for the state.

    Source: QLoRA (arXiv:2305.14314) section 3; 8-bit optimizers (arXiv:2110.02861).

    >>> weight = torch.nn.Parameter(torch.ones(4))
    >>> optimizer = nf4lora.PagedAdamW([weight], lr=0.5, weight_decay=0.0, bits=8)
    >>> weight.grad = torch.tensor([1.0, -1.0, 0.0, float("nan")])
    >>> optimizer.step()
    >>> weight.data, optimizer.stats()["skipped"]
    (tensor([0.5000, 1.5000, 1.0000, 1.0000]), 1)
    """

    found_inf: Tensor | None = None

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
        self._counted: list[tuple[Bucket, list[int]]] = []  # parameters that took part in the last step
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
            twice = len(params) - len(set(params))  # torch only warns; a step would update it from two threads at once
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
        """Put every trained parameter that has no bucket into a new one, one bucket per device, in step order."""
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
        """The ParamState of p. A parameter whose `address` has changed may have another size or device."""
        param_state = self._param_states.get(p)
        if param_state is None or param_state.address != address:
            if param_state is None or not param_state.fits(p):
                self._assign_buckets()
                param_state = self._param_states[p]
            param_state.address = address
        return param_state

    def _is_exposed(self, p: Tensor, param_state: ParamState) -> bool:
        """Whether `state[p]` still holds the arena's tensors, and not tensors that a user has put there."""
        entry, exposed = self.state.get(p), param_state.exposed
        if not entry or len(entry) != len(exposed):
            return False
        return all(map(is_, entry.values(), exposed.values()))

    def _adopt_states(self, params: list[Tensor]) -> None:
        """Copy what `state` holds into the arenas; all of it is read first, since a source may lie in a target."""
        self.synchronize()
        adopted = {
            p: self._read_moments(p, self.state[p], "state").clone() if self.state.get(p) else None for p in params
        }
        for p, moments in adopted.items():
            self._adopt_state(p, moments)

    def _read_moments(self, p: Tensor, entry: dict[str, Any], what: str) -> Moments:
        """This process's part of a state of p that is not in an arena; p may be frozen and have no place in one yet."""
        param_state = self._param_states.get(p)
        like = dict.fromkeys(("exp_avg", "exp_avg_sq"), p) if param_state is None else param_state.exposed
        shard = {name: shard_of(value, like.get(name)) for name, value in unwrapped(entry).items()}
        return read_state(shard, local(p).numel(), absmax_blocks(p), shard_size_tag(p), what)

    def _adopt_state(self, p: Tensor, moments: Moments | None) -> None:
        """Write these moments (None: those before any step) into the arena, and expose its tensors in `state[p]`."""
        param_state = self._param_states[p]
        param_state.bucket.fill(param_state.index, moments and moments.as_bits(self.bits))
        self.state[p] = dict(param_state.exposed)

    # ---- the step

    @torch.compiler.disable  # torch.compile would gain nothing: the step is one op per chunk already
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what closure returns.

        If the card has no memory left for a copy of the gradients, the state is moved to the host first.
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
        if gradients is None:  # not in the `except` block, where the error keeps the copies made so far alive
            gradients = self._gradients()
        params, grads, scale = gradients
        if not params:
            return loss
        by_bucket: dict[Bucket, BucketGradients] = {}
        displaced: list[Tensor] = []  # parameters whose state is not in the arena
        strided: list[tuple[Tensor, Tensor]] = []  # parameters that the op takes as contiguous copies
        for (p, number), grad in zip(params, grads):
            shard = local(p)
            param_state = self._state_of(p, shard.data_ptr())
            if not self._is_exposed(p, param_state):
                displaced.append(p)
            if not shard.is_contiguous():
                strided.append((shard, shard.contiguous()))
                shard = strided[-1][1]
            if param_state.bucket not in by_bucket:
                by_bucket[param_state.bucket] = BucketGradients()
            by_bucket[param_state.bucket].add(param_state.index, shard, grad, number)
        if displaced:
            self._adopt_states(displaced)
        hyperparameters = [hyperparameters_of(group) for group in self.param_groups]
        for bucket, taking_part in by_bucket.items():
            device = bucket.arena.device
            if device not in self._skipped:
                self._skipped[device] = torch.zeros(1, dtype=torch.int64, device=device)
            on_device = None if scale is None else scale.to(device)
            bucket.step(taking_part, hyperparameters, self._skipped[device], on_device)
        self._counted = [(bucket, taking_part.indices) for bucket, taking_part in by_bucket.items()]
        for shard, updated in strided:
            shard.copy_(updated)
        torch.autograd.graph.increment_version([p for p, _ in params])
        return loss

    def _gradients(self) -> tuple[list[tuple[Tensor, int]], list[Tensor], Tensor | None]:
        """The parameters that have a gradient, each with the number of its group; the gradients as the op takes them;
        and the factor [1] that clips them, NaN for a step that is left out."""
        params = [(p, i) for i, group in enumerate(self.param_groups) for p in group["params"] if p.grad is not None]
        grads = [gradient_of(p, p.grad) for p, _ in params]
        scale: Tensor | None = None
        if self.max_grad_norm is not None and grads:
            norm = self.grad_norm()
            self._norm = None
            scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
            scale = torch.where(norm.isfinite(), scale, math.nan).view(1)
        if self.found_inf is not None:
            taken = torch.ones_like(self.found_inf) if scale is None else scale.to(self.found_inf.device)
            scale = torch.where(self.found_inf == 0, taken, math.nan).view(1)
        return params, grads, scale

    def uncount_step(self) -> None:
        """Set the counts of steps to those before the last one, which `found_inf` has kept from changing anything."""
        for bucket, indices in self._counted:
            bucket.steps[indices] -= 1
        self._counted = []

    @torch.compiler.disable
    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients together, of all shards: [] float32, on the device of the first.

        The next step uses this norm for max_grad_norm, unless a gradient changes before it, instead of computing it
        again. The norm is zero where there is no gradient.
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
        return list(dict.fromkeys(param_state.bucket.arena for param_state in self._param_states.values()))

    def evict(self) -> int:
        """Move the state from the card to the host, or from RAM to the file; returns the bytes freed.

        For use after a training step that ran out of memory, before the step is tried again. The next optimizer step
        brings the state back.
        """
        return sum(arena.evict() for arena in self._arenas())

    def synchronize(self) -> None:
        """Wait until the tensors in `state` hold what the last step computed; `state_dict` calls this."""
        for arena in self._arenas():
            arena.wait()

    def stats(self) -> dict[str, Any]:
        """Where the state is, and how large it is.

        Returns:
            mode: ram, file, managed or streamed;  bytes: of all state;  resident, paged: bytes in the memory where they
            are used, and elsewhere;  peak: the most resident bytes, on CUDA at any time, else when stats() was called;
            skipped: how many gradients were not finite
        """
        arenas = self._arenas()
        by_arena = [arena.stats() for arena in arenas]
        stats: dict[str, Any] = {"mode": ", ".join(dict.fromkeys(arena.mode for arena in arenas)) or "none"}
        stats["bytes"] = sum(arena.bytes for arena in arenas)
        stats |= {name: sum(one[name] for one in by_arena) for name in ("resident", "paged", "peak")}
        stats["skipped"] = sum(int(count) for count in self._skipped.values())
        return stats

    def report(self) -> str:
        """stats() as one line of text, and the reason of each arena's mode where paging="auto" chose it."""
        stats = self.stats()
        mebibytes = {name: f"{stats[name] / (1 << 20):.1f} MiB" for name in ("bytes", "resident", "paged", "peak")}
        line = (
            f"PagedAdamW, {self.bits} bits: {mebibytes['bytes']} of state ({stats['mode']}), {mebibytes['resident']} "
            f"resident, {mebibytes['paged']} paged, peak {mebibytes['peak']}; {stats['skipped']} gradients skipped"
        )
        return "\n".join([line, *dict.fromkeys(arena.reason for arena in self._arenas() if arena.reason)])

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
            ValueError: the state is of another optimizer or of other parameters; the optimizer is unchanged then.
        """
        hook = self.register_load_state_dict_pre_hook(_readable)  # runs last, so that other hooks see tensors
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "bits" in state:  # unpickled, or a deep copy: no state is in an arena yet
            self._param_states, self._skipped, self._norm, self._counted = {}, {}, None, []
        super().__setstate__(state)
        for p, entry in list(self.state.items()):
            if isinstance(entry, Moments):  # these two classes come from `_readable`
                self._adopt_state(p, entry)
            elif isinstance(entry, _Waiting):
                self.state[p] = entry.entry

    def __getstate__(self) -> dict[str, Any]:
        self.synchronize()
        options = ("bits", "max_grad_norm", "page_to", "paging")
        return super().__getstate__() | {name: getattr(self, name) for name in options}


@dataclass(frozen=True)
class _Waiting:
    """The saved state of a parameter that is frozen at loading; it is adopted when the parameter is trained."""

    entry: dict[str, Any]


def _readable(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with every state read and checked, before anything of the optimizer changes.

    The states become Moments or _Waiting, since torch would cast tensors to the dtype of their parameter.
    """
    assert isinstance(optimizer, PagedAdamW)
    lengths = [
        [len(group["params"]) for group in groups] for groups in (state_dict["param_groups"], optimizer.param_groups)
    ]
    if lengths[0] != lengths[1]:
        return state_dict  # torch raises its own error
    groups = [read_group(group, i) for i, group in enumerate(state_dict["param_groups"])]
    params = dict(zip((key for group in groups for key in group["params"]), optimizer._params()))
    optimizer._assign_buckets()
    addresses = {
        local(param_state.exposed["exp_avg"]).data_ptr() for param_state in optimizer._param_states.values()
    }  # written to
    state = {}
    for key, entry in state_dict["state"].items():
        state[key] = entry
        if not entry or key not in params:
            continue
        moments = optimizer._read_moments(params[key], entry, f"the state of parameter {key}")
        if params[key] in optimizer._param_states:
            state[key] = moments.clone() if moments.exp_avg.data_ptr() in addresses else moments
        else:
            state[key] = _Waiting(tree_map_only(Tensor, torch.clone, dict(entry)))
    return {**state_dict, "state": state, "param_groups": groups}
