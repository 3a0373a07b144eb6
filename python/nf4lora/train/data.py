"""The data of one run: read, recognised, tokenised, labelled, cut to length, and counted."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nf4lora.train.chat.masking import DOUBLE_START, IGNORED, Encoder
from nf4lora.train.chat.template import choose_chat_template, install_chat_template
from nf4lora.train.chat.turns import MaskError
from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.paths import nearby, not_here
from nf4lora.train.samples.folders import read_directory
from nf4lora.train.samples.formats import Sample, convert, recognise
from nf4lora.train.samples.rows import ENDINGS, Table, bad_rows, read_file, read_hub
from nf4lora.train.settings import TrainConfig
from nf4lora.words import number

if TYPE_CHECKING:
    from datasets import Dataset


PARTS = 'the chat template takes a text as [{"type": "text", "text": ...}]'


@dataclass
class Split:
    """Tokenised rows of one part of the data, and what happened to them on the way."""

    table: Table
    kind: str
    input_ids: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    cut: int = 0  # samples longer than max_length
    dropped: list[int] = field(default_factory=list)  # rows of which nothing would be trained

    def fingerprint(self) -> dict[str, Any]:
        """How many rows there are, and a hash of their tokens and labels: equal for equal data, on any machine."""
        digest = hashlib.sha256()
        for rows in zip(self.input_ids, self.labels, strict=True):
            digest.update(len(rows[0]).to_bytes(8, "little"))
            for row in rows:
                digest.update(row.astype("<i4", copy=False).tobytes())
        return {"rows": len(self.input_ids), "sha256": digest.hexdigest()}

    @property
    def tokens(self) -> int:
        return sum(map(len, self.input_ids))

    @property
    def trained(self) -> int:
        return sum(int(np.count_nonzero(row != IGNORED)) for row in self.labels)

    def dataset(self) -> Dataset:
        from datasets import Dataset

        return Dataset.from_dict({"input_ids": self.input_ids, "labels": self.labels})


@dataclass(frozen=True)
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
        UsageError, RunError: see rows.py and folders.py
    """
    source = config.data or config.dataset_name or config.train_file or ""
    path, notes = Path(source).expanduser(), list(config.notes)
    evaluation: Table | None = None
    split = config.dataset_train_split if "dataset_train_split" in config.given else None
    if path.is_dir():
        train, evaluation, note = read_directory(
            path, config.dataset_config, split, config.dataset_test_split, skip_bad=True
        )
        notes += [note] if note else []
    elif path.is_file():
        _only_hub(config, source)
        train = read_file(path, skip_bad=True)  # bad lines are counted with the bad rows, in prepare_data
    elif path.suffix.lower() in ENDINGS or not_here(source):
        raise UsageError(f"{source}: no such file or directory{nearby(source)}")
    else:
        train = read_hub(source, config.dataset_config, config.dataset_train_split)
        if config.dataset_test_split:
            evaluation = read_hub(source, config.dataset_config, config.dataset_test_split)
    if evaluation is not None and (config.eval_file or config.val_size):
        raise UsageError(f"{source} holds evaluation rows already ({evaluation.name}); drop eval_file and val_size")
    if config.eval_file:
        evaluation = read_file(Path(config.eval_file).expanduser(), skip_bad=True)
    if config.max_samples:
        train = train.select(range(min(config.max_samples, len(train.rows))))
        evaluation = evaluation and evaluation.select(range(min(config.max_samples, len(evaluation.rows))))
    if config.val_size:
        train, evaluation = hold_out(train, config.val_size, config.seed)
    if evaluation is None and ({"eval_steps", "eval_strategy"} & config.given) and config.eval_strategy != "no":
        raise UsageError("eval_steps and eval_strategy need evaluation rows: eval_file, val_size or a file valid.jsonl")
    return train, evaluation, notes


def _only_hub(config: TrainConfig, source: str) -> None:
    for name in ("dataset_config", "dataset_train_split", "dataset_test_split"):
        if getattr(config, name) != TrainConfig.__dataclass_fields__[name].default:
            raise UsageError(f"{name} is for data sets on the Hub and for directories; {source} is a local file")


def hold_out(table: Table, size: float, seed: int) -> tuple[Table, Table]:
    """Part off a share (below 1) or a number of rows, chosen by the seed."""
    total = len(table.rows)
    count = round(total * size) if size < 1 else int(size)
    if not 1 <= count < total:
        raise UsageError(f"val_size {size} would hold out {count} of {total} rows; at least one must be on each side")
    chosen = set(random.Random(seed).sample(range(total), count))
    keep = [i for i in range(total) if i not in chosen]
    return table.select(keep), replace(table.select(sorted(chosen)), bad=[])


def prepare_data(
    config: TrainConfig,
    tokenizer: Any,
    tables: tuple[Table, Table | None],
    stops: list[str],
    progress: Callable[[str], None] = lambda text: None,
) -> Data:
    """Tokenise and label both parts; every row that does not fit is named before a model is loaded.

    `progress` is told now and then how far this is.

    Raises:
        RunError: a row without a usable field, an unknown role, an answer that the template hides, nothing to train.
    """
    check_special_tokens(config, tokenizer)
    notes: list[str] = []
    parts, choice = [], ""
    for table in tables:
        if table is not None:
            part, why, remarks = _convert(table, config)
            parts.append(part)
            choice = choice or why
            notes += remarks
    everything: list[Sample] = [sample for part in parts for sample in part.samples]
    if any(sample.messages is not None for sample in everything):
        chosen = choose_chat_template(tokenizer, config.chat_template), install_chat_template(tokenizer)
        notes[:0] = [note for note in chosen if note]
    roles = all(sample.has_roles for sample in parts[0].samples)
    if config.assistant_only_loss is True and not roles:
        raise UsageError("assistant_only_loss needs data with roles or prompts; text has neither")
    answers_only = roles if config.assistant_only_loss == "auto" else bool(config.assistant_only_loss)
    encoder = Encoder(tokenizer, answers_only, [*stops, *(config.eot_tokens or [])])
    if encoder.parts:
        notes.insert(0, f"{PARTS}, here and when the model is used")
    splits = []
    for part in parts:
        split, remarks = _tokenise(part, encoder, config, progress)
        splits.append(split)
        notes += [*remarks, *_complaints(split, config.max_length)]
    return Data(splits[0], splits[1] if len(splits) > 1 else None, answers_only, choice, notes)


@dataclass
class _Part:
    """The rows of one part that fit their format, as samples."""

    table: Table
    kind: str
    samples: list[Sample]
    bad: list[str]  # complaints about rows that were left out


def _convert(table: Table, config: TrainConfig) -> tuple[_Part, str, list[str]]:
    kind, choice = recognise(table, config.dataset_format)
    converted = convert(table, kind)
    bad = [*table.bad, *converted.bad]
    if bad and not (config.skip_bad_rows and converted.samples):
        raise RunError(bad_rows(bad, len(table.rows) + len(table.bad)))
    notes = [f"{table.name}: {table.note}"] if table.note else []
    if converted.unused:
        notes.append(f"columns of {table.name} that are not used: {', '.join(converted.unused)}")
    nulls = sum(sample.nulls for sample in converted.samples)
    if nulls and not table.fills_nulls:
        notes.append(f"{nulls} keys of tools and tool calls are null and were left out, as a parquet file has it")
    kept = table if len(converted.indices) == len(table.rows) else table.select(converted.indices)
    return _Part(kept, kind, converted.samples, bad), choice, notes


def check_special_tokens(config: TrainConfig, tokenizer: Any) -> None:
    """Hold the tokens that a configuration file names against those of the tokenizer, which are the ones used.

    Raises:
        UsageError: they differ.
    """
    for name, token in (config.special_tokens or {}).items():
        own = getattr(tokenizer, name, None)
        if name != "pad_token" and own != token:
            raise UsageError(f"special_tokens: {name} must be the tokenizer's own, {own!r}, got {token!r}")
    for token in config.eot_tokens or []:
        if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1:
            raise UsageError(f"eot_tokens must be single tokens of the tokenizer, got {token!r}")


def _tokenise(
    part: _Part, encoder: Encoder, config: TrainConfig, progress: Callable[[str], None]
) -> tuple[Split, list[str]]:
    """-> the tokenised part, and what is to be said about its rows.

    Raises:
        RunError: rows that cannot be encoded.
    """
    split, bad = Split(part.table, part.kind), list(part.bad)
    left_out: dict[str, list[int]] = {}
    total, due = len(part.samples), 0.0
    for index, sample in enumerate(part.samples):
        if time.monotonic() >= due:
            progress(f"tokenising {part.table.name}: {number(index)} of {number(total)} rows")
            due = time.monotonic() + 0.2
        try:
            ids, labels = encoder(sample)
        except MaskError as error:
            bad.append(f"{part.table.where(index)}: {error}{encoder.advice(sample, error)}")
            continue
        except (TypeError, ValueError, OverflowError, UnicodeError, RecursionError) as error:
            bad.append(f"{part.table.where(index)}: the tokenizer refuses this row ({type(error).__name__}: {error})")
            continue
        for what in encoder.left_out:
            left_out.setdefault(what, []).append(index)
        split.cut += len(ids) > config.max_length
        row, trained = (np.array(tokens[: config.max_length], dtype=np.int32) for tokens in (ids, labels))
        trained[:1] = IGNORED  # the first token is predicted from nothing; transformers would count it, TRL not
        if (trained == IGNORED).all():
            split.dropped.append(index)
        else:
            split.input_ids.append(row)
            split.labels.append(trained)
    everything = total + len(part.bad)
    if bad and not (config.skip_bad_rows and len(bad) < everything):
        raise RunError(bad_rows(bad, everything))
    notes = []
    if bad:
        notes.append(f"{len(bad)} of {everything} rows of {part.table.name} cannot be used and were left out: {bad[0]}")
    for what, rows in left_out.items():
        where = f"in {len(rows)} of {total} rows (first: {part.table.where(rows[0])})"
        notes.append(
            f"texts hold a start token, and the tokenizer adds one: one of them was taken {where}"
            if what == DOUBLE_START
            else f"the chat template leaves out {what} {where}"
        )
    return split, notes


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
