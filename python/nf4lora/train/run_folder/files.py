"""The output folder on the disk: which files in it are a run's own, who uses it, and how files get there whole.

`nf4lora_run.json` lists the files that runs have put into the folder, and only these are ever removed or replaced.
Every file is written beside its place and then renamed, so that a process that is killed at any moment, or a full disk,
leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nf4lora.adapters.whole_files import mode_of_a_new_file
from nf4lora.train.errors import UsageError

RECORD = "nf4lora_run.json"
STAGING = ".writing"  # folder for what is not whole yet
CHECKPOINT_RECORD = "nf4lora_resume.json"  # in a checkpoint: what a run that goes on from it must agree with


def read_record(folder: Path) -> dict[str, Any]:
    """What runs have noted about their folder; {} where no run has been."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("files"), list):
            return content
    return {}


def own_files(folder: Path) -> list[str]:
    """Names of files in the folder that runs have written."""
    names = [name for name in read_record(folder).get("files", []) if isinstance(name, str) and Path(name).name == name]
    return [name for name in names if os.path.lexists(folder / name)]


def note_files(folder: Path, names: Iterable[str], **more: Any) -> None:
    """Note that these files are ours, before they are written."""
    from nf4lora import _C  # type: ignore[attr-defined]

    before = read_record(folder)
    files = sorted({*before.get("files", []), *names})
    about = {"written_by": f"nf4lora train {_C.__version__}", **before, **more, "files": files}
    write_text(folder / RECORD, json.dumps(about, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that its old content or its new one is there at any moment."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder; the lock ends with this process, however that ends.

    Raises:
        UsageError: another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"output_dir {folder} is in use by another nf4lora train; wait for its end, or name another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A folder within this one, in which files are written before they get their names; it is removed at the end."""
    place = folder / STAGING
    remove(place)
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        with contextlib.suppress(OSError):  # the reason why we are here is the error to be shown
            remove(place)


def finish(place: Path) -> None:
    """Put all files below on the disk, with the permissions that new files have; some libraries make them private."""
    mode = mode_of_a_new_file(place)
    for path in [place, *place.rglob("*")]:
        if path.is_symlink():
            continue
        if path.is_file():
            path.chmod(mode)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some file systems have no fsync for folders
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def publish(place: Path, folder: Path, last: Iterable[str] = ()) -> list[str]:
    """Move the finished files of `place` into the folder, those named `last` at the end; returns their names."""
    finish(place)
    last = tuple(last)
    names = sorted(file.name for file in place.iterdir())
    note_files(folder, names)
    for name in sorted(names, key=lambda name: (name in last, name)):
        if (folder / name).is_dir():
            remove(folder / name)
        os.replace(place / name, folder / name)
    return names


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """What is called checkpoint-<number>, by number."""
    paths = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return dict(sorted((int(path.name.partition("-")[2]), path) for path in paths))


def own_checkpoints(folder: Path) -> dict[int, Path]:
    """Those that a run has written here."""
    return {step: path for step, path in checkpoint_folders(folder).items() if (path / CHECKPOINT_RECORD).is_file()}


def remove(path: Path) -> None:
    """Remove a file, or a folder with everything in it; a folder loses its name first, so that no half of it is left.

    A link is removed, not what it leads to.
    """
    if path.is_dir() and not path.is_symlink():
        hidden = path.with_name(f".{path.name.lstrip('.')}.removed")
        if path != hidden:
            shutil.rmtree(hidden, ignore_errors=True)
            path.rename(hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a process that was killed was writing, or removing."""
    remove(folder / STAGING)
    for leftover in [*folder.glob(".checkpoint-*.removed"), *folder.glob(".*.part")]:
        if leftover.suffix == ".removed":
            shutil.rmtree(leftover)
        elif leftover.name.removeprefix(".").removesuffix(".part") in (RECORD, *own_files(folder)):
            leftover.unlink()


def clear(folder: Path) -> None:
    """Remove what earlier runs have written, and nothing else."""
    for checkpoint in own_checkpoints(folder).values():
        remove(checkpoint)
    for name in own_files(folder):
        if name != RECORD:  # last: it says what is ours
            remove(folder / name)
    remove(folder / RECORD)


def set_aside(folder: Path, step: int) -> Path | None:
    """Move checkpoints later than `step`, and results, into a folder of their own; None where there are none.

    A run that goes back to an earlier checkpoint would otherwise leave its new checkpoints among later ones of the old
    course, and replace these one by one. A damaged one may still hold the weights.
    """
    later = [checkpoint for number, checkpoint in own_checkpoints(folder).items() if number > step]
    names = [name for name in own_files(folder) if name not in (RECORD, "config.yaml", "metrics.jsonl")]
    if not later:
        return None
    number = 1
    while (place := folder / f"superseded-{number}").exists():
        number += 1
    place.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):  # these the run that goes on needs too
        if (folder / name).is_file():
            shutil.copy2(folder / name, place / name)
    for path in [*(folder / name for name in names), *reversed(later)]:
        path.rename(place / path.name)
    return place
