"""The English text that models are measured on: a story written for this bench, about 4,000 tokens long."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

TEXT = Path(__file__).resolve().parent / "text.txt"


def tokens(folder: Path | str) -> Tensor:
    """The whole text in the model's tokens: [n] int64."""
    from transformers import AutoTokenizer

    return torch.tensor(AutoTokenizer.from_pretrained(folder)(TEXT.read_text(encoding="utf-8")).input_ids)


def windows(folder: Path | str, length: int) -> Tensor:
    """The text in windows that do not overlap, without the tokens left at the end: [count, length] int64."""
    ids = tokens(folder)
    return ids[: len(ids) // length * length].reshape(-1, length)


def batches(folder: Path | str, batch: int, length: int) -> list[Tensor]:
    """All full batches of the text: [batch, length] int64 each."""
    pieces = windows(folder, length)
    return list(pieces[: len(pieces) // batch * batch].split(batch))
