"""Writing several files so that either all of them are complete or none is changed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder for files that are moved into `folder` once all of them are on the disk.

    If anything fails (a full disk, an exception, the end of the process), the files in `folder` stay as they were. Each
    file replaces the one of its name in one step, so that a reader sees either the old or the new one. All files get
    the mode that the umask gives; without this, files written by safetensors are readable by their owner only.

    >>> with written_whole(folder) as stage:                                # doctest: +SKIP
    ...     (stage / "config.json").write_text("{}")
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Inside the folder itself, because os.replace cannot move a file to another disk.
    stage = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        mode = mode_of_a_new_file(stage)
        yield stage
        files = sorted(path for path in stage.iterdir() if path.is_file())
        for path in files:
            path.chmod(mode)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        for path in files:
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def mode_of_a_new_file(folder: Path) -> int:
    """The mode that the umask gives a new file, found by creating one: the umask cannot be read without changing it."""
    path = folder / ".mode"
    path.touch()
    mode = path.stat().st_mode & 0o777
    path.unlink()
    return mode
