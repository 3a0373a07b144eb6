"""Files, directories and Hub data sets to rows. Every complaint names the file and the line or row.

A table is a name, its rows as dicts, and a function from a row's index to the words that name it to a person.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nf4lora.train.errors import RunError, UsageError

ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
TRAIN, EVAL, TEST = ("train", "training"), ("valid", "validation", "val", "dev", "eval"), ("test",)


@dataclass
class Table:
    """Rows of one source; `numbers[i]` is the line (or row) at which row i stands there."""

    name: str
    rows: Sequence[dict]
    numbers: Sequence[int]
    unit: str = "row"

    def where(self, index: int) -> str:
        return f"{self.name}: {self.unit} {self.numbers[index]}"

    def select(self, indices: Sequence[int]) -> Table:
        return Table(self.name, [self.rows[i] for i in indices], [self.numbers[i] for i in indices], self.unit)


def read_file(path: Path) -> Table:
    """Rows of a json, jsonl, csv, parquet or txt file.

    Raises:
        RunError: unreadable, empty or broken; with the line.
        UsageError: an ending that is not known.
    """
    readers: dict[str, Callable[[Path], Table]] = {
        ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _txt
    }  # fmt: skip
    if path.suffix.lower() not in readers:
        raise UsageError(f"{path}: the ending must be one of {', '.join(ENDINGS)}")
    try:
        if path.stat().st_size == 0:
            raise RunError(f"{path}: the file is empty")
        table = readers[path.suffix.lower()](path)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise RunError(f"{path}: line {_undecodable_line(path)} is not UTF-8 text") from None
    if not table.rows:
        raise RunError(f"{path}: the file holds no rows")
    return table


def _undecodable_line(path: Path) -> int:
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:  # its start counts from the start of the file, unlike a buffered reader's
        return content[: error.start].count(b"\n") + 1
    return 1


def _object(name: str, unit: str, number: int, value: Any) -> dict:
    if not isinstance(value, dict):
        raise RunError(f'{name}: {unit} {number} must be an object like {{"messages": [...]}}, got {_short(value)}')
    return value


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _jsonl(path: Path) -> Table:
    rows, numbers = [], []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise RunError(f"{path}: line {number} is not valid JSON ({error.msg}, column {error.colno})") from None
            rows.append(_object(str(path), "line", number, value))
            numbers.append(number)
    return Table(str(path), rows, numbers, "line")


def _json(path: Path) -> Table:
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _jsonl(path)  # one object a line, under the other name
        raise RunError(f"{path}: line {error.lineno} is not valid JSON ({error.msg}, column {error.colno})") from None
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RunError(f"{path}: must hold a list of objects, got {_short(value)}")
    rows = [_object(str(path), "row", number, each) for number, each in enumerate(value, 1)]
    return Table(str(path), rows, range(1, len(rows) + 1))


def _csv(path: Path) -> Table:
    csv.field_size_limit(sys.maxsize)
    rows, numbers = [], []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise RunError(f"{path}: line 1 names a column twice")
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise RunError(
                        f"{path}: line {reader.line_num} has {len(fields)} fields, the header has {len(header)}"
                    )
                rows.append(dict(zip(header, fields, strict=True)))
                numbers.append(reader.line_num)
        except csv.Error as error:
            raise RunError(f"{path}: line {reader.line_num} is not valid CSV ({error})") from None
    return Table(str(path), rows, numbers, "line")


def _parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise RunError(f"{path}: not a readable parquet file ({error})") from None
    return Table(str(path), rows, range(1, len(rows) + 1))


def _txt(path: Path) -> Table:
    with path.open(encoding="utf-8-sig") as lines:
        found = [(number, line.rstrip("\r\n")) for number, line in enumerate(lines, 1) if line.strip()]
    return Table(str(path), [{"text": line} for _, line in found], [number for number, _ in found], "line")


def read_directory(path: Path) -> tuple[Table, Table | None, str]:
    """Training rows, evaluation rows where there are any, and a note on what was left alone."""
    files = sorted(each for each in path.iterdir() if each.suffix.lower() in ENDINGS and each.is_file())

    def pick(names: tuple[str, ...]) -> Path | None:
        found = [each for each in files if each.stem.lower() in names]
        if len(found) > 1:
            raise RunError(f"{path}: {' and '.join(each.name for each in found)} could both be meant; keep one")
        return found[0] if found else None

    train, valid, test = pick(TRAIN), pick(EVAL), pick(TEST)
    if train is None:
        raise RunError(f"{path}: no file train.jsonl (or .json, .csv, .parquet, .txt) in this directory")
    chosen = valid or test
    note = f"{test.name} is left alone" if valid and test else f"{test.name} is evaluated on" if test else ""
    return read_file(train), read_file(chosen) if chosen else None, note


def read_hub(name: str, config: str | None, split: str) -> Table:
    """Rows of one split of a data set on the Hub."""
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # datasets raises its own, huggingface_hub's, httpx's and fsspec's
        reason = str(error).strip().splitlines()
        raise RunError(
            f"{name}: no such file or directory here, and not readable as a data set from the Hub "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'})"
        ) from error
    if len(rows) == 0:
        raise RunError(f"{name}: split {split} is empty")
    return Table(f"{name} ({split})", rows, range(1, len(rows) + 1))
