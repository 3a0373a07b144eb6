"""Folders of data: files by split, as people lay them out, and as the Hub does.

A folder may hold train.jsonl beside valid.jsonl, or be a data set as it was downloaded from the Hub: shards such as
data/train-00000-of-00003.parquet, a folder for each split, a folder for each configuration.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.samples.rows import ENDINGS, Table, read_file

TRAIN, EVAL, TEST = ("train", "training"), ("valid", "validation", "val", "dev", "eval"), ("test",)
SHARD = re.compile(r"(?P<name>.*?)[-_.](?P<number>\d{3,})(-of-(?P<total>\d{3,}))?(-[0-9a-f]{8,})?")
ABOUT = re.compile(
    r"(dataset_infos?|state|dataset_dict|readme|license|requirements|.*config)\.(json|txt)", re.IGNORECASE
)


def read_directory(
    path: Path, config: str | None = None, train: str | None = None, test: str | None = None, skip_bad: bool = False
) -> tuple[Table, Table | None, str]:
    """Training rows, evaluation rows where there are any, and a note on what was left alone.

    `config` names a folder within, `train` and `test` the splits, where they are not called so.

    Raises:
        UsageError, RunError: what is meant cannot be told, or a file is missing or broken.
    """
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_to_disk(path, train, test)
    splits = _splits(_configuration(path, config))

    def pick(names: tuple[str, ...]) -> str | None:
        matching = [name for name in splits if name.lower() in names]
        files = [file for name in matching for file in splits[name]]
        if len(matching) > 1 or (len(files) > 1 and not all(SHARD.fullmatch(file.stem) for file in files)):
            shown = " and ".join(str(file.relative_to(path)) for file in files[:4])
            raise RunError(f"{path}: {shown} could both be meant; keep one")
        return matching[0] if matching else None

    for option, wanted in (("dataset_train_split", train), ("dataset_test_split", test)):
        if wanted and wanted not in splits:
            raise UsageError(f"{option} {wanted}: {path} holds {', '.join(splits) or 'no data files'}")
    chosen, note = train or pick(TRAIN), ""
    if chosen is None:
        like = [name for name in splits if name.lower().startswith("train")]
        others = [name for name in splits if name.lower() not in (*EVAL, *TEST)]
        if len(like) == 1 or (not like and len(others) == 1):
            chosen = (like or others)[0]
            note = f"{_shown(path, splits[chosen])} is trained on"
        elif like or others:
            raise RunError(f"{path}: no file train.jsonl; name one of {', '.join(splits)} as dataset_train_split")
        else:
            raise RunError(f"{path}: no file train.jsonl (or {', '.join(ENDINGS[1:])}) in this directory")
    valid, held_out = (None, test) if test else (pick(EVAL), pick(TEST))
    if not test and held_out:
        shown = _shown(path, splits[held_out])
        note += (", " if note else "") + f"{shown} is {'left alone' if valid else 'evaluated on'}"
    other = valid or held_out
    return (
        _joined(path, chosen, splits[chosen], skip_bad),
        _joined(path, other, splits[other], skip_bad) if other else None,
        note,
    )


def _shown(path: Path, files: list[Path]) -> str:
    first = str(files[0].relative_to(path))
    return first if len(files) == 1 else f"{first} and {len(files) - 1} more"


def _data_files(path: Path) -> list[Path]:
    """Data files in a folder, its split folders and `data/`; hidden ones and descriptions aside."""
    files = []
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        if len(parts) > 3 or any(part.startswith((".", "_")) for part in parts) or not file.is_file():
            continue
        if file.suffix.lower() in ENDINGS and not ABOUT.fullmatch(file.name):
            files.append(file)
    return files


def _configuration(path: Path, config: str | None) -> Path:
    """The folder that holds the splits: this one, or that of a configuration."""
    if config:
        if not (path / config).is_dir():
            raise UsageError(f"dataset_config {config}: {path} has no folder of this name")
        return path / config
    inner = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and _has_train(folder)]
    named = [folder for folder in inner if folder.name.lower() not in ("data", *TRAIN, *EVAL, *TEST)]
    if len(named) > 1 and not any(file.parent == path for file in _data_files(path)):
        names = ", ".join(folder.name for folder in named)
        raise UsageError(f"{path} holds several configurations, {names}: choose a dataset_config")
    return path


def _has_train(path: Path) -> bool:
    return any(_split(path, file).lower().startswith("train") for file in _data_files(path))


def _split(path: Path, file: Path) -> str:
    """The split that a file belongs to: by its own name, or by the folder that it lies in."""
    shard = SHARD.fullmatch(file.stem)
    name = shard["name"] if shard else file.stem
    folder = file.parent.name
    if file.parent != path and folder.lower() in (*TRAIN, *EVAL, *TEST):
        return folder
    return name or folder


def _splits(path: Path) -> dict[str, list[Path]]:
    """Splits and their files. Where the folder itself holds train files, the folders in it are something else."""
    splits: dict[str, list[Path]] = {}
    files = _data_files(path)
    here = [file for file in files if file.parent == path]
    for file in here if any(_split(path, file).lower() in TRAIN for file in here) else files:
        splits.setdefault(_split(path, file), []).append(file)
    return splits


def _joined(path: Path, split: str, files: list[Path], skip_bad: bool) -> Table:
    """The rows of all shards of a split, in their order.

    Raises:
        RunError: a shard is missing.
    """
    shards = [SHARD.fullmatch(file.stem) for file in files]
    totals = {int(shard["total"]) for shard in shards if shard and shard["total"]}
    if len(totals) == 1:
        there = {int(shard["number"]) for shard in shards if shard}
        missing = sorted(set(range(totals.pop())) - there)
        if missing:
            raise RunError(
                f"{path}: of the split {split} the shard {missing[0]:05} is missing"
                + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
                + "; download it again"
            )
    tables = [read_file(file, skip_bad) for file in files]
    if len(tables) == 1:
        return tables[0]
    return replace(
        tables[0],
        name=f"{path} ({split}, {len(files)} files)",
        rows=[row for table in tables for row in table.rows],
        numbers=[(table.name, number) for table in tables for number in table.numbers if isinstance(number, int)],
        bad=[complaint for table in tables for complaint in table.bad],
    )


def _saved_to_disk(path: Path, train: str | None, test: str | None) -> tuple[Table, Table | None, str]:
    """What `datasets` wrote with save_to_disk."""
    import datasets

    try:
        data_set = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises its own errors and pyarrow's
        raise RunError(f"{path}: cannot be read as a folder of datasets.save_to_disk ({error})") from None
    splits = dict(data_set) if isinstance(data_set, dict) else {train or "train": data_set}

    def table(names: tuple[str, ...]) -> Table | None:
        name = next((name for name in splits if name in names), None)
        if name is None:
            return None
        rows = splits[name]
        if len(rows) == 0:
            raise RunError(f"{path}: split {name} is empty")
        return Table(f"{path} ({name})", rows, range(1, len(rows) + 1), fills_nulls=True)

    training = table((train,) if train else TRAIN)
    if training is None:
        raise UsageError(f"{path} holds {', '.join(splits)}; choose one: --dataset_train_split")
    return training, table((test,)) if test else table(EVAL) or table(TEST), ""
