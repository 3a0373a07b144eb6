"""Results on disk: one JSON file per device, a record per case, and the page that shows them."""

from __future__ import annotations

import json
from pathlib import Path

from .machine import file_name
from .table import Table
from .timing import warning

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
IN_REPOSITORY = (HERE.parent / "pyproject.toml").is_file()
FOLDER = HERE / "results" if IN_REPOSITORY else Path("nf4lora-bench")
UNTIMED = ("converge", "optimizers", "perplexity")  # whose figures are the same on a busy machine
START, END = "<!-- results, written by python -m bench --table -->", "<!-- end of results -->"


def append(path: Path, record: dict) -> None:
    """One line of JSON at the end of a file."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def keep(record: dict, folder: Path = FOLDER) -> Path:
    """Put the record into its device's file, in place of the one of that case."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(record["environment"])
    kept = json.loads(path.read_text())["cases"] if path.is_file() else {}
    kept[record["case"]] = record
    path.write_text(json.dumps({"device": record["environment"]["device"], "cases": kept}, indent=1) + "\n")
    return path


def write(page: Path, folder: Path = FOLDER) -> list[Path]:
    """Replace what stands between the markers of the page; returns the files that were shown.

    Raises:
        ValueError: the page has no markers.
    """
    text = page.read_text()
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"bench: {page} must hold the markers {START} and {END} once each")
    files = sorted(folder.glob("*.json"))
    body = "\n\n".join(section(json.loads(path.read_text())["cases"]) for path in files) or "None recorded yet."
    before, after = text.split(START)[0], text.split(END)[1]
    page.write_text(f"{before}{START}\n\n{body}\n\n{END}{after}")
    return files


def section(cases: dict[str, dict]) -> str:
    """A device's results as Markdown."""
    last = list(cases.values())[-1]["environment"]
    return "\n\n".join([f"### {headline(last)}", *(case_text(record, last) for record in cases.values())])


def case_text(record: dict, shown: dict) -> str:
    lines = [f"#### {record['case']}: {record['question']}", ""]
    about, load = record["environment"], record["load_average"]
    lines += [f"{record['seconds']:.0f} s; load average {load[0]} at the start, {load[-1]} at the end."]
    if about != shown:
        lines += ["", f"Run on its own: {headline(about)}."]
    if record["case"] not in UNTIMED and (text := warning(record)):
        lines += ["", f"**Warning**: {text}."]
    lines += ["", "\n\n".join(Table(**table).markdown() for table in record["tables"])]
    return "\n".join(lines)


def headline(about: dict) -> str:
    """Device, versions and commit in one line."""
    device = about["device"] if about["cuda"] else f"{about['device']}, {about['instruction_set']}"
    packages = [name for name in ("torch", "transformers", "peft", "bitsandbytes") if about[name]]
    return ", ".join(
        [
            f"{device}, {about['threads']} threads",
            f"nf4lora {about['nf4lora']} ({about['commit'] or 'no commit'})",
            *(f"{name} {about[name]}" for name in packages),
        ]
    )
