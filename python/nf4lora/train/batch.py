"""What is known of a batch while it is still on the host: on a GPU nobody then has to wait for the card to ask it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

KNOWN = "known"  # the key under which a batch has its Known


@dataclass(frozen=True)
class Known:
    """What the host knows of a batch [B, T].

    Attributes:
        positions: [M] int64, where the next token is trained: b * T + t for each label [b, t + 1] that is not -100
        seen: tokens that are not padding
        padded: whether a row has padding
        packed: whether a row holds several samples
    """

    positions: Tensor
    seen: int
    padded: bool
    packed: bool

    @classmethod
    def of(cls, batch: dict[str, Any]) -> Known:
        """Read a batch of TRL's collator; on a GPU, one that is there already costs a wait."""
        labels, mask, places = batch["labels"], batch.get("attention_mask"), batch.get("position_ids")
        asked = torch.zeros_like(labels, dtype=torch.bool)
        asked[:, :-1] = labels[:, 1:] != -100
        return cls(
            positions=asked.flatten().nonzero()[:, 0],
            seen=labels.numel() if mask is None else int(mask.sum()),
            padded=mask is not None and not bool(mask.all()),
            packed=places is not None and bool((places[:, 1:] - places[:, :-1] != 1).any()),
        )

    def to(self, *where: Any, **how: Any) -> Known:
        """With positions on another device; accelerate calls this for everything in a batch that has such a method."""
        return replace(self, positions=self.positions.to(*where, **how))

    def pin_memory(self, device: Any = None) -> Known:
        """With positions in pinned memory; torch's DataLoader calls this."""
        return replace(self, positions=self.positions.pin_memory())


@dataclass
class KnowingCollator:
    """A collator that adds to each batch of another one what the host knows of it.

    Attributes:
        length: if given, packed batches that are shorter get this many tokens, by a last sample that is not trained
        filler: the token of that sample
    """

    collate: Callable[[list], dict[str, Any]]
    length: int | None = None
    filler: int = 0

    def __call__(self, rows: list) -> dict[str, Any]:
        batch = self.collate(rows)
        known = Known.of(batch)
        if self.length is not None:
            # Even a batch of one sample counts as packed, so that the mask is there in all of them.
            batch = lengthened(batch, self.length, self.filler)
            known = replace(Known.of(batch), seen=known.seen, packed=True)
        return {**batch, KNOWN: known}


def lengthened(batch: dict[str, Any], length: int, filler: int) -> dict[str, Tensor]:
    """A packed batch [1, T] with so many tokens at least, and with nothing whose shape depends on the samples.

    What is added is a sample of its own to the attention, by its positions, and its labels are -100.
    """
    missing = max(length - batch["input_ids"].shape[1], 0)
    ids = torch.full((1, missing), filler)
    added = {"input_ids": ids, "labels": torch.full_like(ids, -100), "position_ids": torch.arange(missing)[None]}
    return {name: torch.cat([batch[name], more], 1) for name, more in added.items()}
