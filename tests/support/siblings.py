"""Models whose layers are called with the same tensor, each beside a twin that calls every layer alone."""

import contextlib
import copy
from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nf4lora import prepare
from nf4lora.adapters import siblings
from nf4lora.adapters.lora_layer import NF4LoraLinear
from nf4lora.compat.torch import tree_leaves

from support.bits import assert_same_bits

K = 128
# Where a tensor has other readers than a group, autograd adds the group's sum to theirs: a few units in the last place.
REORDERED = 1e-6
GROUP, SINGLE = "lora_linear_group", "lora_linear"  # the ops; with "_backward" those of the gradient


@contextlib.contextmanager
def alone():
    """Here every layer computes alone."""
    kept, siblings.DEVICES = siblings.DEVICES, set()
    try:
        yield
    finally:
        siblings.DEVICES = kept


class Calls(TorchDispatchMode):
    """How often each op of LoRA layers is called."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name
        if name.startswith("nf4lora::lora_linear"):
            self.of[name.removeprefix("nf4lora::")] += 1
        return op(*args, **(kwargs or {}))


def calls_of(function):
    """The calls of ops that a function makes."""
    with Calls() as calls:
        function()
    return calls.of


class Row(nn.Module):
    """Linear layers a, b, c, ... of different sizes, called one after the other with the same tensor."""

    def __init__(self, letters="abc", bias=False):
        super().__init__()
        self.letters = letters
        for number, letter in enumerate(sorted(set(letters))):
            self.add_module(letter, nn.Linear(K, 32 * (1 + number % 3), bias))

    def forward(self, x, letters=None, between=None):
        """The layers' results; `between(letter)` is called before each call but the first and may return another x."""
        results = []
        for number, letter in enumerate(self.letters if letters is None else letters):
            if number and between is not None:
                other = between(letter)
                x = other if isinstance(other, torch.Tensor) else x
            results.append(getattr(self, letter)(x))
        return results


def row(letters="abc", biased=False, **options):
    """A prepared `Row`, whose B are not zero."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 8, "target_modules": sorted(set(letters)), "init_lora_weights": False, **options}
    return prepare(Row(letters, biased), **options)


def layer(model, letter):
    """A layer of a row."""
    return model.get_base_model().get_submodule(letter)


def layers(model):
    return [module for module in model.modules() if isinstance(module, NF4LoraLinear)]


def grouped(model):
    """The last parts of the names in each group of the model; all names are those of layers of the model."""
    found = siblings.groups(model)
    assert all(isinstance(model.get_submodule(name), NF4LoraLinear) for names in found for name in names)
    return [[name.rpartition(".")[2] for name in names] for names in found]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*(shape or (5, K)), generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_of(results):
    """A number that depends on each result in another way."""
    terms = [(number + 1) * y.float().square().sum() for number, y in enumerate(results)]
    return torch.stack(terms).sum()


def gradients(model):
    """The gradient of each parameter that has one or wants one; None where it got none."""
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad or p.grad is not None}


def step(x=None, loss=loss_of, context=contextlib.nullcontext, wants=True, **call):
    """A function of a row: its results, the gradient of x and of all parameters."""

    def run(model):
        model.zero_grad(set_to_none=True)
        leaf = (drawn() if x is None else x).clone().requires_grad_(wants)
        with context():
            results = model(leaf, **call)
        value = loss(results)
        if value.requires_grad:
            value.backward()
        return {"y": [y.detach() for y in results], "loss": value.detach(), "dx": leaf.grad, **gradients(model)}

    return run


def assert_same(got, expected, tolerance=0.0):
    """The same tensors in the same places, to the bit, or to `tolerance` of the largest value of each."""
    __tracebackhide__ = True
    if isinstance(got, dict):
        assert got.keys() == expected.keys()
    ours, theirs = tree_leaves(got), tree_leaves(expected)
    assert len(ours) == len(theirs)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        what = f"{list(got)[number]}" if isinstance(got, dict) and len(got) == len(ours) else f"number {number}"
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            assert type(a) is type(b), what
            assert a == b, what
        elif not tolerance:
            assert a.requires_grad == b.requires_grad, what
            assert_same_bits(a, b, what)
        else:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), what
            distance = (a.double() - b.double()).abs().max() if a.numel() else torch.zeros(())
            assert distance <= tolerance * b.double().abs().max().clamp(min=1e-3), f"{what}: {distance:.1e}"


class Twins:
    """A model, and a copy of it that computes every layer alone."""

    def __init__(self, model):
        self.ours, self.twin = model, copy.deepcopy(model)

    def learn(self, *inputs, **options):
        """Watch one pass of our model; the names that it computes together from now on, each by its last part."""
        siblings.learn(self.ours, lambda: self.ours(*(inputs or (() if options else (drawn(),))), **options))
        return grouped(self.ours)

    def change(self, function):
        function(self.ours)
        with alone():
            function(self.twin)

    def compare(self, function, tolerance=0.0):
        """Hold the function's results on both models against each other; the calls of ops that ours made."""
        with Calls() as calls:
            got = function(self.ours)
        with alone(), Calls() as single:
            expected = function(self.twin)
        assert not any(name.startswith(GROUP) for name in single.of)
        assert_same(got, expected, tolerance)
        return calls.of


def learned(letters="abc", **options):
    """Twins of a row, of which ours has learned its groups."""
    twins = Twins(row(letters, **options))
    found = [list(letters[first : first + 4]) for first in range(0, len(letters), 4)]
    assert twins.learn() == [letters for letters in found if len(letters) > 1]
    return twins
