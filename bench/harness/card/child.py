"""The process that Card asks: it reads a question a line and answers with a line of JSON."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from .counts import counting
from .loading import load


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not write between the answers
    load(sys.argv[1])
    for line in sys.stdin:
        try:
            answer = {"result": answer_to(**json.loads(line))}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def answer_to(file: str, name: str, arguments: dict, counted: bool, warm: int = 0) -> Any:
    function: Callable = getattr(module_of(file), name)
    result = function(**arguments)
    if not counted:
        return result
    for _ in range(warm):
        result()
    with counting() as counts:
        result()
    return asdict(counts)


@functools.cache
def module_of(file: str) -> ModuleType:
    path = Path(file)
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"asked_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
