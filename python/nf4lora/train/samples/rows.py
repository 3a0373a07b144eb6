"""Files, directories and Hub data sets to rows. Every complaint names the file and the line or row.

A table is a name, its rows as dicts, and a function from a row's index to the words that name it to a person.
"""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.paths import nearby

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
COLUMNS = frozenset((
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "system", "tools"
))  # fmt: skip
SHOWN = 5  # complaints about single rows that are printed; the others are counted


@dataclass
class Table:
    """Rows of one source; `numbers[i]` is the line (or row) at which row i stands there.

    Where a table was put together from several files, the number of a row is (file, number).
    """

    name: str
    rows: Sequence[dict]
    numbers: Sequence[int | tuple[str, int]]
    unit: str = "row"
    bad: list[str] = field(default_factory=list)  # complaints about rows that could not be read and were left out
    fills_nulls: bool = False  # the file format gives every object all keys, those that were absent as nulls
    note: str = ""  # how the file was read, where that was not obvious

    def where(self, index: int) -> str:
        number = self.numbers[index]
        name, number = number if isinstance(number, tuple) else (self.name, number)
        return f"{name}: {self.unit} {number}"

    def select(self, indices: Sequence[int]) -> Table:
        return replace(self, rows=[self.rows[i] for i in indices], numbers=[self.numbers[i] for i in indices])


def bad_rows(complaints: Sequence[str], total: int) -> str:
    """One text about all rows that cannot be used: the first few by name, and what can be done."""
    if len(complaints) == 1:
        return (
            f"{complaints[0]}\n(--skip_bad_rows trains on the other {total - 1} rows)" if total > 1 else complaints[0]
        )
    lines = [f"{len(complaints)} of {total} rows cannot be used:"]
    lines += [f"    {complaint}" for complaint in complaints[:SHOWN]]
    if len(complaints) > SHOWN:
        lines.append(f"    and {len(complaints) - SHOWN} more")
    if len(complaints) < total:
        lines.append(f"--skip_bad_rows trains on the other {total - len(complaints)} rows")
    return "\n".join(lines)


def read_file(path: Path, skip_bad: bool = False) -> Table:
    """Rows of a json, jsonl, csv, tsv, parquet or txt file; with `skip_bad`, without the lines that cannot be read.

    Raises:
        RunError: unreadable, empty or broken; with the line.
        UsageError: an ending that is not known.
    """
    readers: dict[str, Callable[[Path], Table]] = {
        ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".txt": _txt
    }  # fmt: skip
    if path.suffix.lower() not in readers:
        packed = "; unpack it first" if path.suffix.lower() in (".gz", ".zst", ".zip", ".bz2", ".xz") else ""
        raise UsageError(f"{path}: the ending must be one of {', '.join(ENDINGS)}{packed}")
    try:
        if path.stat().st_size == 0:
            raise RunError(f"{path}: the file is empty")
        table = readers[path.suffix.lower()](path)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise RunError(f"{path}: line {_undecodable_line(path)} is not UTF-8 text; save the file as UTF-8") from None
    if table.bad and not (skip_bad and table.rows):
        raise RunError(bad_rows(table.bad, len(table.bad) + len(table.rows)))
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
    try:
        shown = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply"
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _json_error(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _jsonl(path: Path) -> Table:
    rows, numbers, bad = [], [], []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append(_object(str(path), "line", number, json.loads(line)))
                numbers.append(number)
            except RunError as error:
                bad.append(str(error))
            except (ValueError, RecursionError) as error:
                bad.append(f"{path}: line {number} is not valid JSON ({_json_error(error)})")
    if bad and not rows:
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            if isinstance(content, list) or len(bad) > 1:
                return _json(path)  # one list, or one object over several lines, under the other name
    return Table(str(path), rows, numbers, "line", bad)


def _json(path: Path) -> Table:
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data" and text.lstrip().startswith("{"):
            return _jsonl(path)  # one object a line, under the other name
        line = f"line {error.lineno} is" if isinstance(error, json.JSONDecodeError) else "it is"
        raise RunError(f"{path}: {line} not valid JSON ({_json_error(error)})") from None
    value, note = rows_of_json(value)
    if not isinstance(value, list):
        raise RunError(f"{path}: must hold a list of objects, got {_short(value)}")
    rows, bad, numbers = [], [], []
    for number, row in enumerate(value, 1):
        try:
            rows.append(_object(str(path), "row", number, row))
            numbers.append(number)
        except RunError as error:
            bad.append(str(error))
    return Table(str(path), rows, numbers, "row", bad, note=note)


def rows_of_json(value: Any) -> tuple[Any, str]:
    """A list of rows from the shapes that JSON files of data have, and a note where the shape was not a list.

    An object may hold the list under a name of its own, be one row, or hold columns: lists of equal length, as
    `datasets` writes a batch, or {"0": ..., "1": ...}, as pandas does.
    """
    if not isinstance(value, dict):
        return value, ""
    columns, data = value.get("columns"), value.get("data")
    if isinstance(columns, list) and isinstance(data, list) and all(isinstance(fields, list) for fields in data):
        return [dict(zip(columns, fields, strict=False)) for fields in data], "read as a table of columns and data"
    named = [name for name, column in value.items() if isinstance(column, list) and name not in COLUMNS]
    lists = [name for name in named if value[name] and all(isinstance(row, dict) for row in value[name])]
    if isinstance(data, list) or (len(lists) == 1 and not COLUMNS & set(value)):
        name = "data" if isinstance(data, list) else lists[0]
        rows = value[name]
        if all(isinstance(entry, dict) and isinstance(entry.get("row"), dict) for entry in rows):
            rows = [entry["row"] for entry in rows]  # what the Hub's viewer answers
        return rows, "" if name == "data" else f"the rows are those under {name!r}"
    known = [column for name, column in value.items() if name in COLUMNS]
    if known and all(isinstance(column, list) and column and not isinstance(column[0], dict) for column in known):
        lengths = {len(column) for column in value.values() if isinstance(column, list)}
        if len(lengths) == 1 and all(isinstance(column, list) for column in value.values()):
            return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)], "read by columns"
        if len(lengths) > 1:
            raise RunError(f"columns of a JSON file must be of one length, got {sorted(lengths)}")
    if known and all(isinstance(column, dict) and column and all(key.isdigit() for key in column) for column in known):
        keys = list(known[0])
        return [{name: column.get(key) for name, column in value.items()} for key in keys], "read by columns"
    return [value], ""


@contextlib.contextmanager
def long_csv_fields() -> Iterator[None]:
    """Within, a field of a csv file may be of any length; Python's limit of 128 KB is one of the whole process."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _csv(path: Path) -> Table:
    rows, numbers, bad = [], [], []
    with long_csv_fields(), path.open(encoding="utf-8-sig", newline="") as file:
        delimiter, skipped = _delimiter(path, file.readline())
        if not skipped:
            file.seek(0)
        reader = csv.reader(file, strict=True, delimiter=delimiter)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise RunError(f"{path}: line 1 names a column twice")
            for fields in reader:
                if not fields:
                    continue
                number = reader.line_num + skipped
                if len(fields) != len(header):
                    bad.append(f"{path}: line {number} has {len(fields)} fields, the header has {len(header)}")
                    continue
                rows.append(dict(zip(header, fields, strict=True)))
                numbers.append(number)
        except csv.Error as error:
            raise RunError(f"{path}: line {reader.line_num + skipped} is not valid CSV ({error})") from None
    words = {"\t": "tabs", ";": "semicolons", "|": "bars"}
    note = f"fields are parted by {words[delimiter]}" if delimiter != "," and path.suffix.lower() == ".csv" else ""
    return Table(str(path), rows, numbers, "line", bad, note=note)


def _delimiter(path: Path, first: str) -> tuple[str, int]:
    """What parts the fields, by the header; and how many lines stand before that (Excel's `sep=;`)."""
    first = first.lstrip("\ufeff").rstrip("\r\n")
    if first.lower().startswith("sep=") and len(first) == 5:
        return first[4], 1
    if path.suffix.lower() == ".tsv":
        return "\t", 0
    for delimiter in (",", "\t", ";", "|"):
        header = {name.strip(" \"'").lower() for name in first.split(delimiter)}
        if len(header) > 1 and header & COLUMNS:
            return delimiter, 0
    return ",", 0


def _parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise RunError(f"{path}: not a readable parquet file ({error})") from None
    return Table(str(path), rows, range(1, len(rows) + 1), fills_nulls=True)


def _txt(path: Path) -> Table:
    with path.open(encoding="utf-8-sig") as lines:
        numbered = [(number, line.rstrip("\r\n")) for number, line in enumerate(lines, 1) if line.strip()]
    return Table(str(path), [{"text": line} for _, line in numbered], [number for number, _ in numbered], "line")


def read_hub(name: str, config: str | None, split: str) -> Table:
    """Rows of one split of a data set on the Hub."""
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # datasets raises its own, huggingface_hub's, httpx's and fsspec's
        reason = str(error).strip().splitlines()
        raise RunError(
            f"{name}: no such file or directory here{nearby(name)}, and not readable as a data set from the Hub "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'})"
        ) from error
    if len(rows) == 0:
        raise RunError(f"{name}: split {split} is empty")
    return Table(f"{name} ({split})", rows, range(1, len(rows) + 1), fills_nulls=True)
