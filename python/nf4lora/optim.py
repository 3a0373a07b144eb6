"""PagedAdamW: AdamW whose state lies in one arena, in 32 or 8 bits, and gives way where memory is short.

paged.py is the arena, region.py the step, moments.py what is saved and loaded, ops.adamw_step_ the arithmetic.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nf4lora.moments import Moments, read, unwrapped
from nf4lora.paged import Arena, lay_out
from nf4lora.region import PAGING, Place, Region, Work, arena_of, sizes
from nf4lora.shards import absmax_blocks, gradient_of, local, mark, shard_of, total_norm

NUMBERS = "lr", "betas", "eps", "weight_decay"
DTYPES = torch.float32, torch.bfloat16, torch.float16
REFUSED = "amsgrad", "maximize"  # in the groups of torch.optim.AdamW, where they change what a step does
DROPPED = {  # in the groups of torch's and bitsandbytes' AdamW, where they change nothing here
    *REFUSED, "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay",
    "alpha", "t_alpha", "t_beta3",
}  # fmt: skip


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
        _require(bits in (32, 8), "bits", "32 or 8", bits)
        _require(max_grad_norm is None or max_grad_norm > 0, "max_grad_norm", "positive, or None", max_grad_norm)
        _require(paging in PAGING, "paging", f"one of {', '.join(PAGING)}", paging)
        self.bits, self.max_grad_norm, self.paging = int(bits), max_grad_norm, paging
        self.page_to = None if page_to is None else os.fspath(page_to)
        self._places: dict[Tensor, Place] = {}
        self._skipped: dict[torch.device, Tensor] = {}
        self._norm: tuple[Tensor, list[tuple[Tensor, int]]] | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if page_to is not None:
            self._place()

    # ---- parameters and their places

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; the state of parameters added after the first step gets an arena of its own."""
        super().add_param_group(param_group)
        try:
            _check_numbers(self.param_groups[-1])
            params = self.param_groups[-1]["params"]
            twice = len(params) - len(set(params))  # torch warns; a step would update it in two threads at once
            _require(not twice, "every parameter", "given once", f"{twice} more than once in a group")
            for p in params:
                if p.requires_grad and p.dtype not in DTYPES:
                    raise TypeError(
                        f"PagedAdamW: every parameter must be float32, bfloat16 or float16, got {_name(p.dtype)}"
                    )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _place(self) -> None:
        """Give every trained parameter a place where it has none; those of a device lie together, in step order."""
        trained = [p for p in self._params() if p.requires_grad or p.grad is not None]
        waiting = [p for p in trained if p not in self._places or not self._places[p].fits(p)]
        if not waiting:
            return
        self._places = {p: self._places[p] for p in trained if p in self._places}
        for device in dict.fromkeys(local(p).device for p in waiting):
            here = [p for p in waiting if local(p).device == device]
            _, size = lay_out(sizes(here, self.bits))
            region = Region(here, self.bits, arena_of(device, size, self.page_to, self.paging))
            self._places |= {p: Place(region, i, region.states[i]) for i, p in enumerate(here)}

    def _place_of(self, p: Tensor, address: int, displaced: list[Tensor]) -> Place:
        """Where the state of p is; `displaced` gets p where `state[p]` is not there. `address`: of p, since one that
        moved may have changed."""
        place = self._places.get(p)
        if place is None or place.address != address:
            if place is None or not place.fits(p):
                self._place()
                place = self._places[p]
            place.address = address
        entry = self.state.get(p)
        if not entry or len(entry) != len(place.shown) or not all(map(is_, entry.values(), place.shown.values())):
            displaced.append(p)
        return place

    def _enter_all(self, displaced: list[Tensor]) -> None:
        """Bring states to their places; read before any is written, since one may lie where another goes."""
        self.synchronize()
        found = {p: self._read(p, self.state[p], "state").clone() if self.state.get(p) else None for p in displaced}
        for p, moments in found.items():
            self._enter(p, moments)

    def _read(self, p: Tensor, entry: dict[str, Any], what: str) -> Moments:
        """A state of p that lies elsewhere, this process's part."""
        place = self._places[p]
        mine = {name: shard_of(value, place.shown.get(name)) for name, value in unwrapped(entry).items()}
        return read(mine, place.region.counts[place.index], absmax_blocks(p), mark(p), what)

    def _enter(self, p: Tensor, moments: Moments | None) -> None:
        """Make `state[p]` that of its place, with these moments or those of no step."""
        place = self._places[p]
        place.region.fill(place.index, moments and moments.as_bits(self.bits))
        self.state[p] = dict(place.shown)

    # ---- the step

    @torch._disable_dynamo  # a compiled caller breaks its graph here: the step is one op per chunk already
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what closure returns.

        Where the card has no memory left for a copy of the gradients, the state is moved to the host first.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each in self.param_groups:
            _check_numbers(each)  # all of them, before anything changes
        try:
            found = self._gradients()
        except torch.OutOfMemoryError:
            if not self.evict():
                raise
            found = None
        if found is None:  # outside of `except`, where the error would keep the copies made so far
            found = self._gradients()
        params, grads, scale = found
        if not params:
            return loss
        work: dict[Region, Work] = {}
        displaced: list[Tensor] = []
        strided: list[tuple[Tensor, Tensor]] = []  # which the op takes as contiguous copies
        for (p, group), grad in zip(params, grads):
            mine = local(p)
            place = self._place_of(p, mine.data_ptr(), displaced)
            if not mine.is_contiguous():
                strided.append((mine, mine.contiguous()))
                mine = strided[-1][1]
            if (some := work.get(place.region)) is None:
                some = work[place.region] = Work([], [], [], [])
            some.indices.append(place.index)
            some.params.append(mine)
            some.grads.append(grad)
            some.groups.append(group)
        if displaced:
            self._enter_all(displaced)
        numbers = [_numbers(group) for group in self.param_groups]
        for region, some in work.items():
            device = region.arena.device
            if device not in self._skipped:
                self._skipped[device] = torch.zeros(1, dtype=torch.int64, device=device)
            region.step(some, numbers, self._skipped[device], None if scale is None else scale.to(device))
        for mine, updated in strided:
            mine.copy_(updated)
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

    @torch._disable_dynamo
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
                a is b and a._version == version for a, (b, version) in zip(grads, seen)
            ):
                return norm
        norm = total_norm(grads) if grads else torch.zeros(())
        self._norm = norm, [(grad, grad._version) for grad in grads]
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim."""
        self._norm = None
        super().zero_grad(set_to_none)

    # ---- memory

    def _arenas(self) -> list[Arena]:
        return list(dict.fromkeys(place.region.arena for place in self._places.values()))

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

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim; moments of 8 bits are uint8, with their absmax [ceil(n/256), 2] float32."""
        self.synchronize()
        return super().state_dict()

    @torch._disable_dynamo
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
            self._places, self._skipped, self._norm = {}, {}, None
        super().__setstate__(state)
        for p, entry in list(self.state.items()):
            if isinstance(entry, Moments):  # of `_readable`
                self._enter(p, entry)

    def __getstate__(self) -> dict[str, Any]:
        self.synchronize()
        options = ("bits", "max_grad_norm", "page_to", "paging")
        return super().__getstate__() | {name: getattr(self, name) for name in options}


def _readable(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with every state read and checked, before anything of the optimizer changes.

    As Moments: torch would cast tensors to the dtype of their parameter.
    """
    assert isinstance(optimizer, PagedAdamW)
    lengths = [
        [len(group["params"]) for group in each] for each in (state_dict["param_groups"], optimizer.param_groups)
    ]
    if lengths[0] != lengths[1]:
        return state_dict  # torch says so
    groups = [_known(group, i) for i, group in enumerate(state_dict["param_groups"])]
    params = dict(zip((key for group in groups for key in group["params"]), optimizer._params()))
    optimizer._place()
    own = {local(place.shown["exp_avg"]).data_ptr() for place in optimizer._places.values()}  # which will be written to
    state = {}
    for key, entry in state_dict["state"].items():
        state[key] = entry
        if entry and key in params and params[key] in optimizer._places:
            moments = optimizer._read(params[key], entry, f"the state of parameter {key}")
            state[key] = moments if moments.exp_avg.data_ptr() not in own else moments.clone()
    return {**state_dict, "state": state, "param_groups": groups}


def _known(group: dict[str, Any], index: int) -> dict[str, Any]:
    """A saved group, without what other optimizers keep there."""
    what = f"PagedAdamW: group {index} of the state dict"
    missing = [name for name in NUMBERS if name not in group]
    if missing:
        raise ValueError(f"{what} must be of an AdamW, got none of {', '.join(missing)}")
    if "momentum_decay" in group or ("foreach" in group and "amsgrad" not in group):
        raise ValueError(f"{what} must be of an AdamW, got that of a NAdam or a RAdam")
    for name in REFUSED:
        if group.get(name):
            raise ValueError(f"{what} must be without {name}, got {group[name]}")
    if group["weight_decay"] and not group.get("decoupled_weight_decay", True):
        raise ValueError(f"{what} must have a decoupled weight decay, got Adam's {group['weight_decay']}")
    found = {name: value for name, value in group.items() if name not in DROPPED}
    _check_numbers(found)
    return found


def _numbers(group: dict[str, Any]) -> tuple[float, ...]:
    return float(group["lr"]), *map(float, group["betas"]), float(group["eps"]), float(group["weight_decay"])


def _check_numbers(group: dict[str, Any]) -> None:
    try:
        two, _ = len(group["betas"]), _numbers(group)
    except (TypeError, ValueError, RuntimeError):
        given = ", ".join(f"{name} {group[name]!r}" for name in NUMBERS)
        raise TypeError(
            f"PagedAdamW: lr, eps and weight_decay must be numbers, betas two of them, got {given}"
        ) from None
    _require(two == 2, "betas", "two numbers", group["betas"])
    lr, beta1, beta2, eps, weight_decay = _numbers(group)
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        _require(0.0 <= value < math.inf, name, "finite and not negative", value)
    for value in (beta1, beta2):
        _require(0.0 <= value < 1.0, "betas", "in [0, 1)", value)


def _require(held: bool, what: str, contract: str, value: Any) -> None:
    if not held:
        raise ValueError(f"PagedAdamW: {what} must be {contract}, got {value}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
