"""Whether a name that is no file here was meant as one, rather than as a name on the Hub."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from nf4lora.words import listed


def not_here(name: str) -> bool:
    """Whether a name can only be a path: a Hub id is `name` or `owner/name`, and nothing in a folder is spelled so.

    `models/SmolLM2-135M-Instuct` has the form of a Hub id. Where the folder models/ holds SmolLM2-135M-Instruct it is
    a slip of the pen; numbers must agree, so that Qwen/Qwen3-4B beside a local Qwen/Qwen3-8B is still looked up.
    """
    if os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name:
        return True
    return bool(_close(name))


def _close(name: str) -> str:
    path = Path(name).expanduser()
    try:
        there = [entry.name for entry in path.parent.iterdir()] if "/" in name else []
    except OSError:
        return ""
    close = _like(path.name, there, 0.85)
    return str(path.parent / close) if close and _digits(close) == _digits(path.name) else ""


def _like(name: str, others: list[str], cutoff: float) -> str:
    """That of the others which is most like a name, capitals aside; nothing where none is."""
    folded = {other.casefold(): other for other in others}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=cutoff)
    return folded[close[0]] if close else ""


def _digits(name: str) -> list[str]:
    return re.findall(r"\d+", name)


def nearby(name: str) -> str:
    """Words for an error about a path that is not what it should be: what is most like it, or what its folder holds."""
    path = Path(name).expanduser()
    if path.exists():
        return f" (it is a {'folder' if path.is_dir() else 'file'})"
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    if parent != path.parent:
        return f" ({parent} holds no {path.relative_to(parent).parts[0]})"
    there = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    close = _like(path.name, there, 0.6)
    if close:
        return f"; did you mean {parent / close}?"
    return f" ({parent} holds {listed(there, 5)})" if there and parent != Path(".") else ""
