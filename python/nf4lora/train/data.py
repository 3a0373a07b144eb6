"""The data of one run: read, recognised, tokenised, labelled, cut to length, and counted."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.formats import Sample, recognise, samples
from nf4lora.train.masking import IGNORED, Encoder, install_chat_template
from nf4lora.train.options import TrainConfig
from nf4lora.train.rows import ENDINGS, Table, read_directory, read_file, read_hub
from nf4lora.train.turns import MaskError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Split:
    """Tokenised rows of one part of the data, and what happened to them on the way."""

    table: Table
    kind: str
    input_ids: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    cut: int = 0  # samples longer than max_length
    dropped: list[int] = field(default_factory=list)  # rows of which nothing would be trained

    @property
    def tokens(self) -> int:
        return sum(map(len, self.input_ids))

    @property
    def trained(self) -> int:
        return sum(int(np.count_nonzero(row != IGNORED)) for row in self.labels)

    def dataset(self) -> Dataset:
        from datasets import Dataset

        return Dataset.from_dict({"input_ids": self.input_ids, "labels": self.labels})


@dataclass
class Data:
    """Training and evaluation rows, and what is to be said about them."""

    train: Split
    eval: Split | None
    answers_only: bool
    choice: str  # which format was taken, where the rows fit several
    notes: list[str]


def read(config: TrainConfig) -> tuple[Table, Table | None, list[str]]:
    """Rows to train on, rows to evaluate on, and notes.

    Raises:
        UsageError, RunError: see rows.py
    """
    source = config.data or config.dataset_name or config.train_file or ""
    path, notes = Path(source), []
    evaluation: Table | None = None
    if path.is_dir():
        train, evaluation, note = read_directory(path)
        notes += [note] if note else []
    elif path.is_file():
        train = read_file(path)
    elif path.suffix.lower() in ENDINGS or os.path.isabs(source) or source.startswith((".", "~")):
        raise UsageError(f"{source}: no such file or directory")
    else:
        train = read_hub(source, config.dataset_config, config.dataset_train_split)
        if config.dataset_test_split:
            evaluation = read_hub(source, config.dataset_config, config.dataset_test_split)
    on_hub = not path.exists()
    for name in ("dataset_config", "dataset_train_split", "dataset_test_split"):
        if (
            name in config.given
            and not on_hub
            and getattr(config, name) != TrainConfig.__dataclass_fields__[name].default
        ):
            raise UsageError(
                f"{name} is for data sets on the Hub; {source} is a local {'directory' if path.is_dir() else 'file'}"
            )
    if evaluation is not None and (config.eval_file or config.val_size):
        raise UsageError(f"{source} holds evaluation rows already ({evaluation.name}); drop eval_file and val_size")
    if config.eval_file:
        evaluation = read_file(Path(config.eval_file))
    if config.val_size:
        train, evaluation = hold_out(train, config.val_size, config.seed)
    if evaluation is None and ({"eval_steps", "eval_strategy"} & config.given) and config.eval_strategy != "no":
        raise UsageError("eval_steps and eval_strategy need evaluation rows: eval_file, val_size or a file valid.jsonl")
    return train, evaluation, notes


def hold_out(table: Table, size: float, seed: int) -> tuple[Table, Table]:
    """Part off a share (below 1) or a number of rows, chosen by the seed."""
    total = len(table.rows)
    count = round(total * size) if size < 1 else int(size)
    if not 1 <= count < total:
        raise UsageError(f"val_size {size} would hold out {count} of {total} rows; at least one must be on each side")
    chosen = set(random.Random(seed).sample(range(total), count))
    keep = [i for i in range(total) if i not in chosen]
    return table.select(keep), table.select(sorted(chosen))


def prepare_data(config: TrainConfig, tokenizer: Any, tables: tuple[Table, Table | None], stops: list[str]) -> Data:
    """Tokenise and label both parts; every row that does not fit is named before a model is loaded.

    Raises:
        RunError: a row without a usable field, an unknown role, an answer that the template hides, nothing to train.
    """
    table, other = tables
    kind, choice = recognise(table, config.dataset_format)
    parts = [(table, kind, samples(table, kind))]
    if other is not None:
        other_kind, _ = recognise(other, config.dataset_format)
        parts.append((other, other_kind, samples(other, other_kind)))
    notes: list[str] = []
    everything: list[Sample] = [sample for _, _, part in parts for sample in part]
    if any(sample.messages is not None for sample in everything) and (note := install_chat_template(tokenizer)):
        notes.append(note)
    roles = all(sample.has_roles for sample in parts[0][2])
    if config.assistant_only_loss is True and not roles:
        raise UsageError("assistant_only_loss needs data with roles or prompts; text has neither")
    answers_only = roles if config.assistant_only_loss == "auto" else bool(config.assistant_only_loss)
    encoder = Encoder(tokenizer, answers_only, stops)
    splits = [_tokenise(Split(*part[:2]), part[2], encoder, config.max_length) for part in parts]
    for split in splits:
        notes += _complaints(split, config.max_length)
    return Data(splits[0], splits[1] if len(splits) > 1 else None, answers_only, choice, notes)


def _tokenise(split: Split, rows: list[Sample], encoder: Encoder, max_length: int) -> Split:
    for index, sample in enumerate(rows):
        try:
            ids, labels = encoder(sample)
        except MaskError as error:
            raise RunError(
                f"{split.table.where(index)}: {error}; a template with {{% generation %}} tags, "
                "or --assistant_only_loss false, gets around this"
            ) from None
        split.cut += len(ids) > max_length
        row, trained = (np.array(each[:max_length], dtype=np.int32) for each in (ids, labels))
        trained[:1] = IGNORED  # the first token is predicted from nothing; transformers would count it, TRL not
        if (trained == IGNORED).all():
            split.dropped.append(index)
        else:
            split.input_ids.append(row)
            split.labels.append(trained)
    return split


def _complaints(split: Split, max_length: int) -> list[str]:
    """What the user should know about a part; an error if nothing of it is left."""
    total = len(split.table.rows)
    first = split.table.where(split.dropped[0]) if split.dropped else ""
    if not split.input_ids:
        raise RunError(
            f"{split.table.name}: no token would be trained in any of {total} rows; they have no answer"
            + (f", or it lies behind max_length {max_length}" if split.cut else "")
        )
    notes = []
    if split.dropped:
        notes.append(
            f"{len(split.dropped)} of {total} rows have nothing to train within {max_length} tokens and were dropped "
            f"(first: {first})"
        )
    if split.cut:
        notes.append(f"{split.cut} of {total} rows of {split.table.name} were cut to {max_length} tokens")
    return notes


def show(split: Split, tokenizer: Any, index: int = 0) -> list[tuple[str, bool]]:
    """One sample as (text, trained) pieces, for printing."""
    pieces: list[tuple[list[int], bool]] = []
    for token, label in zip(split.input_ids[index], split.labels[index], strict=True):
        trained = label != IGNORED
        if not pieces or pieces[-1][1] != trained:
            pieces.append(([], trained))
        pieces[-1][0].append(int(token))
    return [(tokenizer.decode(ids), trained) for ids, trained in pieces]
