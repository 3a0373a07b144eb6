"""Files that are there whole or not at all: written beside their place, then moved into it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write files into, which are moved into `folder` once all of them are on the disk.

    If anything fails (a full disk, an exception, the end of the process), the files that stood in `folder` stay as they
    were. Each file replaces the one of its name in one step; a reader sees the old one or the new one. The files get
    the mode that the umask gives, whatever wrote them: safetensors' own files can be read by their owner alone.

    >>> with written_whole(folder) as stage:                                # doctest: +SKIP
    ...     (stage / "config.json").write_text("{}")
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))  # in the folder itself: os.replace crosses no disk
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
    """The mode that the umask gives, asked for by making a file: reading the umask would have to change it."""
    path = folder / ".mode"
    path.touch()
    mode = path.stat().st_mode & 0o777
    path.unlink()
    return mode
