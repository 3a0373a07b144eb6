"""Linear layers of real models, by what their configuration calls them: N out features, K in features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One linear layer; layers of equal shape in a block share a line."""

    model: str
    layer: str
    N: int
    K: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.layer} {self.N} x {self.K}"

    @property
    def weights(self) -> int:
        return self.N * self.K

    @property
    def layers(self) -> list[str]:
        """The layers of a block that have this shape.

        >>> Shape("Llama-3.1-8B", "k, v", 1024, 4096).layers
        ['k', 'v']
        """
        return self.layer.split(", ")

    @property
    def count(self) -> int:
        """How many layers of a block have this shape."""
        return len(self.layers)


@dataclass(frozen=True)
class Group:
    """Layers of a block that are called with the same input, in the order of the calls; `parts` has their shapes."""

    model: str
    layers: tuple[str, ...]
    parts: tuple[Shape, ...]

    @property
    def name(self) -> str:
        """
        >>> groups_of(block_of("Llama-3.1-8B"))[0].name
        'Llama-3.1-8B q, k, v 4096 + 1024 + 1024 x 4096'
        """
        out_features = " + ".join(str(part.N) for part in self.parts)
        return f"{self.model} {', '.join(self.layers)} {out_features} x {self.K}"

    @property
    def K(self) -> int:
        return self.parts[0].K

    @property
    def weights(self) -> int:
        return sum(part.weights for part in self.parts)


SHAPES = (
    Shape("SmolLM2-135M", "q, o", 576, 576),
    Shape("SmolLM2-135M", "k, v", 192, 576),
    Shape("SmolLM2-135M", "gate, up", 1536, 576),
    Shape("SmolLM2-135M", "down", 576, 1536),
    Shape("TinyLlama-1.1B", "down", 2048, 5632),
    Shape("Llama-2-7B", "gate, up", 11008, 4096),
    Shape("Llama-3.1-8B", "q, o", 4096, 4096),
    Shape("Llama-3.1-8B", "k, v", 1024, 4096),
    Shape("Llama-3.1-8B", "gate, up", 14336, 4096),
    Shape("Llama-3.1-8B", "down", 4096, 14336),
    Shape("Qwen2.5-7B", "q, o", 3584, 3584),
    Shape("Qwen2.5-7B", "k, v", 512, 3584),
    Shape("Qwen2.5-7B", "gate, up", 18944, 3584),
    Shape("Qwen2.5-7B", "down", 3584, 18944),
)
QUICK = SHAPES[:2]
ON_A_CARD = (  # whose layers are measured there only: a processor takes minutes for them
    Shape("Llama-3.2-1B", "q, o", 2048, 2048),
    Shape("Llama-3.2-1B", "k, v", 512, 2048),
    Shape("Llama-3.2-1B", "gate, up", 8192, 2048),
    Shape("Llama-3.2-1B", "down", 2048, 8192),
    Shape("Llama-3.1-70B", "gate, up", 28672, 8192),
)
SAME_INPUT = (("q", "k", "v"), ("gate", "up"))


def named(*names: str) -> list[Shape]:
    """The shapes of 'model layer' names."""
    every = {f"{shape.model} {shape.layer}": shape for shape in (*SHAPES, *ON_A_CARD)}
    return [every[name] for name in names]


def block_of(model: str) -> list[Shape]:
    """All shapes of a model's block; their `count`s tell how many layers of it have each.

    >>> [shape.layer for shape in block_of("Llama-3.1-8B")]
    ['q, o', 'k, v', 'gate, up', 'down']
    """
    return [shape for shape in (*SHAPES, *ON_A_CARD) if shape.model == model]


def groups_of(block: Sequence[Shape]) -> list[Group]:
    """The groups of a model's block; one that lacks a layer among these shapes is left out.

    >>> [group.layers for group in groups_of(block_of("Llama-3.1-8B"))]
    [('q', 'k', 'v'), ('gate', 'up')]
    """
    by_layer = {layer: shape for shape in block for layer in shape.layers}
    return [
        Group(block[0].model, layers, tuple(by_layer[layer] for layer in layers))
        for layers in SAME_INPUT
        if set(layers) <= set(by_layer)
    ]
