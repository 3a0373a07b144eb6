"""The lowest versions that pyproject.toml allows, as constraints for pip, and a check of the installed versions.

    python tools/oldest.py constraints FILE     write the constraints; print the versions that pip cannot install
    python tools/oldest.py installed            print the installed versions; exit code 1 if one differs

`make oldest` runs the tests with these versions. A version that cannot be installed is left out of the file, so that
the others are tested, and is printed again at the end.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def bounds(pyproject: Path = PYPROJECT) -> dict[str, str]:
    """Lowest version by package, for all requirements of nf4lora and its tests that give one."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    versions = {}
    for requirement in [*project["dependencies"], *extras["train"], *extras["test"]]:
        if match := re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", requirement):
            versions[match[1].lower()] = match[2]
    return versions


def can_be_installed(name: str, version: str) -> bool:
    """Whether pip finds this version; its dependencies are not checked."""
    command = [*PIP, "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", f"{name}=={version}"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def write_constraints(path: Path) -> int:
    constraints = []
    for name, version in bounds().items():
        if can_be_installed(name, version):
            constraints.append(f"{name}=={version}")
            print(f"oldest: {name} {version}", flush=True)
        else:
            print(f"oldest: {name} {version} cannot be installed here, and is NOT tested", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in constraints), encoding="utf-8")
    return 0


def show_installed() -> int:
    differs = 0
    for name, version in bounds().items():
        try:
            has = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            has = "none"
        same = is_same(has, version)
        print(f"oldest: {name} {has}" + ("" if same else f", NOT the {version} that pyproject.toml names"))
        differs |= not same
    return int(differs)


def is_same(version: str, bound: str) -> bool:
    """Whether a version equals the bound; 2.11.0+cpu equals 2.11."""

    def release(text: str) -> str:
        return re.sub(r"(\.0)*$", "", text.split("+")[0])

    return release(version) == release(bound)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) == 2 and arguments[0] == "constraints":
        return write_constraints(Path(arguments[1]))
    if list(arguments) == ["installed"]:
        return show_installed()
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
