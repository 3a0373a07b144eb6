"""Layers that are called with the same input, computed together: q, k and v; gate and up.

The first of them computes all, in one op with one autograd node, and the others return what it has left for them. On a
card S of all their adapters then takes one pass over x, their dA another, and dx is summed by the products with the
weights.

No model says which layers belong together, so that is found by watching: those that a forward pass has called with the
same tensor are a group from a later one on. A group comes, or goes, only where no graph still waits for its backward
pass: activation checkpointing computes such a graph again and expects the same tensors to be saved. A layer that turns
out to be called with another tensor computes itself, as does every layer where a hook, a wrapper, dropout, or adapters
of different kinds forbid to compute it before its turn.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from nf4lora.compat.torch import (
    hooks_every_module,
    is_any_autocast_enabled,
    is_called_plainly,
    is_forward_mode,
    is_transformed,
    is_waiting,
    running_backward,
    stream_of,
    version_of,
)
from nf4lora.nn.linear import NF4Linear
from nf4lora.ops.lora_group import MOST_SIBLINGS, Layers, lora_linear_group

DEVICES = {"cuda"}  # types of device; on a CPU a step of training gains 0 to 4 % (python -m bench lora)
MOST_MISSES = 3  # in a row, after which a group is given up
_MOST_INPUTS = 4  # that are remembered at a time
_MOST_STASHES = 2  # at a time: between siblings, those of another tensor may be called

Ref = weakref.ref


class Branch(NamedTuple):
    """A LoRA layer's base, adapter and dropout, as one op computes them."""

    base: NF4Linear
    lora_A: Tensor  # [R, K]
    lora_B: Tensor  # [N, R]
    scaling: float
    dropout: float


class _Known:
    """What has been seen of a layer."""

    __slots__ = ("given_up", "group", "layer", "misses", "most_nodes", "nodes", "proposed")

    def __init__(self, layer: nn.Module):
        at = id(layer)
        self.layer = weakref.ref(layer, lambda _: _gone(at))
        self.nodes: list[Ref[Any]] = []  # of graphs in which the layer was computed, alone or first of its group
        self.most_nodes = 8  # before those that are over are dropped
        self.proposed: tuple[Ref[nn.Module], ...] | None = None  # the layers that it was called with, itself first
        self.group: tuple[Ref[nn.Module], ...] | None = None  # those that it computes
        self.misses = 0  # in a row: times that not all of them were called
        self.given_up = False

    def settle(self) -> None:
        """Let the group come or go, unless a graph waits that must be computed again as it was."""
        if self.proposed is None and self.misses < MOST_MISSES:
            return
        if running_backward() is not None or any(_waits(node) for node in self.nodes):
            return
        if self.misses >= MOST_MISSES:
            self.group, self.given_up, self.misses = None, True, 0
        elif not self.given_up:
            self.group = self.proposed
        self.proposed = None

    def note(self, y: Tensor) -> None:
        """Remember the graph, if there is one, in which y was computed."""
        if isinstance(y.grad_fn, BackwardCFunction):  # no other node can be referred to
            if len(self.nodes) >= self.most_nodes:
                self.nodes = [node for node in self.nodes if _waits(node)]
                self.most_nodes = max(8, 2 * len(self.nodes))
            self.nodes.append(weakref.ref(y.grad_fn))


class _Row:
    """Layers in the order in which they were called with the same x."""

    __slots__ = ("layers", "version", "x")

    def __init__(self, x: Tensor):
        self.x, self.version = weakref.ref(x), version_of(x)
        self.layers: list[_Known] = []


class _Stash:
    """What the first layer of a group has computed for the others."""

    __slots__ = ("again", "leader", "state", "version", "waiting", "x")

    def __init__(self, leader: _Known, x: Tensor, waiting: dict[int, tuple[Tensor, Branch, tuple[int, int]]]):
        self.leader, self.waiting = leader, waiting
        self.x, self.version, self.state = weakref.ref(x, _drop_of), version_of(x), _state(x)
        self.again = running_backward() is not None  # then torch may stop in the middle of it

    def take(self, layer: nn.Module, x: Tensor, branch: Branch) -> Tensor | None:
        """The output for this layer, if it is called as was expected."""
        if self.x() is not x:
            return None
        entry = self.waiting.pop(id(layer), None)
        if entry is None:
            return None
        y, expected, versions = entry
        as_expected = (
            version_of(x) == self.version
            and _state(x) == self.state
            and branch.base is expected.base
            and branch.lora_A is expected.lora_A
            and branch.lora_B is expected.lora_B
            and branch.scaling == expected.scaling
            and branch.dropout == 0
            and _versions(branch) == versions
        )
        if not as_expected:
            self.waiting[id(layer)] = entry
            self.missed()
        elif not self.waiting:
            self.leader.misses = 0
        return y if as_expected else None

    def missed(self) -> None:
        """What is left is for nobody."""
        if self.waiting and not self.again:
            self.leader.misses += 1
        self.waiting.clear()


class _Here(threading.local):
    def __init__(self) -> None:
        self.rows: list[_Row] = []
        self.stashes: list[_Stash] = []


_PLAIN = (Tensor, nn.Parameter)
_here = _Here()
_known: dict[int, _Known] = {}  # by the layer's id


def output_of(layer: Any, x: Tensor, branch: Branch) -> Tensor | None:
    """The layer's output, if its group is computed together; None: it is to compute itself, and to be `watched`.

    Without gradients every layer computes itself: a token that is generated takes less time than to look for siblings.
    """
    known = _known.get(id(layer))
    if known is not None:
        known.settle()
    if not torch.is_grad_enabled():
        return None
    for stash in _here.stashes:
        y = stash.take(layer, x, branch)
        if y is not None:
            return y
    if known is None or known.group is None:
        return None
    layers = [ref() for ref in known.group]
    branches = _branches(layers, x, branch)
    return None if branches is None else _compute(known, layers, branches, x)


def watched(layer: nn.Module, x: Tensor, y: Tensor) -> None:
    """To be called with the output of a layer that has computed itself."""
    if x.is_inference() or running_backward() is not None:
        return
    if y.requires_grad and not isinstance(y.grad_fn, BackwardCFunction):
        return  # a wrapper or a hook has added to what the op computed
    rows = _here.rows
    row = next((row for row in rows if row.x() is x and row.version == version_of(x)), None)
    known = _seen(layer)
    if row is None or known in row.layers or len(row.layers) == MOST_SIBLINGS:
        row = _Row(x)
        rows[:] = [*(other for other in rows if not _is_over(other, x)), row][-_MOST_INPUTS:]
    row.layers.append(known)
    known.note(y)
    if len(row.layers) > 1:
        first = row.layers[0]
        proposed = tuple(member.layer for member in row.layers)
        if not first.given_up:
            first.proposed = None if proposed == first.group else proposed


def groups(model: nn.Module) -> list[list[str]]:
    """The names of the layers of the model that are computed together, a list for each group.

    >>> groups(model)                                                       # doctest: +SKIP
    [['model.layers.0.self_attn.q_proj', 'model.layers.0.self_attn.k_proj', 'model.layers.0.self_attn.v_proj'], ...]
    """
    names = {id(module): name for name, module in model.named_modules()}
    leaders = (_known[at] for at in names if at in _known)
    return [[names.get(id(ref()), "") for ref in known.group] for known in leaders if known.group is not None]


def learn(model: nn.Module, forward: Callable[[], object]) -> list[list[str]]:
    """Find the groups of the model in a forward pass without gradients, so that the next pass already uses them.

    Without it the first forward pass is the one that is watched. Numbers then differ in their last bits between the
    first and the second step, and so between a run that was interrupted and one that was not.
    """
    with torch.no_grad():
        forward()
    for module in model.modules():
        if id(module) in _known:
            _known[id(module)].settle()
    return groups(model)


def forget(model: nn.Module) -> None:
    """Forget the groups of the model and what was seen of its layers.

    Not between a forward pass and its backward pass, for which activation checkpointing may have to compute again.
    """
    for module in model.modules():
        _known.pop(id(module), None)
    _here.rows.clear()
    _here.stashes.clear()


def _seen(layer: nn.Module) -> _Known:
    known = _known.get(id(layer))
    if known is None:
        known = _known[id(layer)] = _Known(layer)
    return known


def _is_over(seen: _Row | _Stash, x: Tensor) -> bool:
    """Whether x starts anew, or what was seen with another tensor cannot go on."""
    other = seen.x()
    return other is None or other is x


def _waits(node: Ref[Any]) -> bool:
    alive = node()
    return alive is not None and is_waiting(alive)


def _state(x: Tensor) -> tuple[bool, int]:
    """What two calls must have in common so that one can compute for the other."""
    return is_any_autocast_enabled(), stream_of(x)


def _versions(branch: Branch) -> tuple[int, int]:
    return version_of(branch.lora_A), version_of(branch.lora_B)


def _branches(layers: Sequence[Any], x: Tensor, first: Branch) -> list[Branch] | None:
    """What each layer computes; None where one of them must be called in its turn, or another way."""
    if type(x) not in _PLAIN or x.is_inference() or hooks_every_module() or is_transformed() or is_forward_mode():
        return None
    branches = []
    for layer in layers:
        if layer is None or not is_called_plainly(layer, type(layers[0])):
            return None
        branch = layer.branch()
        if branch is None or not _is_plain(branch, x) or not _is_alike(branch, first):
            return None
        branches.append(branch)
    return branches


def _is_plain(branch: Branch, x: Tensor) -> bool:
    base, A, B, _, p = branch
    bias = base.bias_parameter()
    return (
        p == 0
        and is_called_plainly(base, NF4Linear)
        and base.dtypes_for(x) == (x.dtype, x.dtype)
        and (bias is None or not bias.requires_grad)
        and type(A) in _PLAIN
        and type(B) in _PLAIN
        and A.dtype == B.dtype == torch.float32
    )


def _is_alike(branch: Branch, first: Branch) -> bool:
    return (
        branch.scaling == first.scaling
        and branch.base.blocksize == first.base.blocksize
        and branch.lora_A.requires_grad == first.lora_A.requires_grad
        and branch.lora_B.requires_grad == first.lora_B.requires_grad
    )


def _compute(leader: _Known, layers: Sequence[Any], branches: Sequence[Branch], x: Tensor) -> Tensor:
    """All outputs: the first is returned, the others are left for their layers."""
    packed = [branch.base.packed() for branch in branches]
    biases = [branch.base.bias_parameter() for branch in branches]
    layers_of_x = Layers(
        qweight=[codes for codes, _, _ in packed],
        absmax=[absmax for _, absmax, _ in packed],
        nested=[nested for _, _, nested in packed],
        bias=[bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype) for bias in biases],
        lora_A=[branch.lora_A for branch in branches],
        lora_B=[branch.lora_B for branch in branches],
        scaling=branches[0].scaling,
        blocksize=branches[0].base.blocksize,
    )
    y, *others = lora_linear_group(x, layers_of_x)
    leader.note(y)
    stashes = _here.stashes
    for stash in stashes[:]:
        is_old = stash.leader is leader or _is_over(stash, x) or len(stashes) == _MOST_STASHES
        if is_old or not stash.waiting:
            stashes.remove(stash)
            stash.missed()
    rest = zip(layers[1:], others, branches[1:], strict=True)
    waiting = {id(layer): (output, branch, _versions(branch)) for layer, output, branch in rest}
    stashes.append(_Stash(leader, x, waiting))
    return y


def _gone(at: int) -> None:
    """Forget a layer that is no more, and what it has computed for others."""
    known = _known.pop(at, None)
    for stash in _here.stashes:
        if stash.leader is known:
            stash.waiting.clear()


def _drop_of(x: Ref[Tensor]) -> None:
    """Free what was computed for a tensor that is gone."""
    for stash in _here.stashes:
        if stash.x is x:
            stash.missed()
