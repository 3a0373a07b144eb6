"""Results on disk: a JSON file for each device, with a record per case, and the pages that show them.

A device's page is results/<device>.md; README.md has one table of all targets, met and missed.
"""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path

from .machine import TOP, file_name
from .table import Table, grid
from .timing import warning

HERE = Path(__file__).resolve().parents[1]
README = HERE / "README.md"
IN_REPOSITORY = (TOP / "pyproject.toml").is_file()
FOLDER = HERE / "results" if IN_REPOSITORY else Path("nf4lora-bench")
UNTIMED = ("converge", "optimizers", "perplexity")  # whose figures are the same on a busy machine
START, END = "<!-- targets, written by python -m bench --table -->", "<!-- end of targets -->"


def append(path: Path, record: dict) -> None:
    """One line of JSON at the end of a file."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def keep(record: dict, folder: Path = FOLDER) -> Path:
    """Write the record into its device's file, where it replaces the record of the same case."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(record["environment"])
    cases = json.loads(path.read_text())["cases"] if path.is_file() else {}
    cases[record["case"]] = record
    path.write_text(json.dumps({"device": record["environment"]["device"], "cases": cases}, indent=1) + "\n")
    return path


def write(page: Path, folder: Path = FOLDER) -> list[Path]:
    """Write each device's page beside its results, and all targets between the markers of `page`.

    Returns:
        the result files that the page shows

    Raises:
        ValueError: the page does not have both markers once; nothing is written then.
    """
    text = page.read_text()
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"bench: {page} must hold the markers {START} and {END} once each")
    files = sorted(folder.glob("*.json"))
    by_device = {path: json.loads(path.read_text())["cases"] for path in files}
    for path, cases in by_device.items():
        path.with_suffix(".md").write_text(device_page(cases))
    body = "\n".join(summary(by_device)) or "None recorded yet."
    before, after = text.split(START)[0], text.split(END)[1]
    page.write_text(f"{before}{START}\n\n{body}\n\n{END}{after}")
    return files


def summary(by_device: dict[Path, dict[str, dict]]) -> list[str]:
    """The lines of a table of all targets, with device, case and whether the target is met."""
    rows = [["device", "case", "target", ""]]
    for path, cases in by_device.items():
        for record in cases.values():
            link = f"[{short_name(record['environment'])}](results/{path.with_suffix('.md').name})"
            for part, table in named_parts(record["tables"]):
                case = f"{record['case']}, {part}" if part else record["case"]
                rows += [[link, case, claim, "met" if met else "**missed**"] for claim, met in table["targets"]]
    return list(grid(rows)) if len(rows) > 1 else []


def named_parts(tables: list[dict]) -> list[tuple[str, dict]]:
    """The tables that have targets, each with a name if targets of two of them begin alike.

    The name is the title without the parts, between commas, with which all these titles begin.

    >>> titles, claims = ("A step, r = 16, without", "A step, r = 16, with"), [["time: at most 1", True]]
    >>> [name for name, _ in named_parts([{"title": title, "targets": claims} for title in titles])]
    ['without', 'with']
    """
    tables = [table for table in tables if table["targets"]]
    subjects = [subject for table in tables for subject in {claim.partition(": ")[0] for claim, _ in table["targets"]}]
    if len(subjects) == len(set(subjects)):
        return [("", table) for table in tables]
    titles = [table["title"].split(", ") for table in tables]
    alike = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*titles))))
    return [(", ".join(title[alike:]).lower(), table) for title, table in zip(titles, tables, strict=True)]


def device_page(cases: dict[str, dict]) -> str:
    """A device's results as Markdown."""
    last = list(cases.values())[-1]["environment"]
    head = [f"# {headline(last)}", "Written by `python -m bench --table`; [how to read it](../README.md)."]
    return "\n\n".join([*head, *(case_text(record, last) for record in cases.values())]) + "\n"


def short_name(machine: dict) -> str:
    """
    >>> short_name({"device": "AMD EPYC", "cuda": None, "instruction_set": "avx2"})
    'AMD EPYC, avx2'
    """
    return machine["device"] if machine["cuda"] else f"{machine['device']}, {machine['instruction_set']}"


def case_text(record: dict, shown: dict) -> str:
    lines = [f"## {record['case']}: {record['question']}", ""]
    machine, load = record["environment"], record["load_average"]
    lines += [f"{record['seconds']:.0f} s; load average {load[0]} at the start, {load[-1]} at the end."]
    if machine != shown:
        lines += ["", f"Run on its own: {headline(machine)}."]
    if record["case"] not in UNTIMED and (text := warning(record)):
        lines += ["", f"**Warning**: {text}."]
    lines += ["", "\n\n".join(Table(**table).markdown() for table in record["tables"])]
    return "\n".join(lines)


def headline(machine: dict) -> str:
    """Device, versions and commit in one line."""
    packages = [name for name in ("torch", "transformers", "peft", "bitsandbytes") if machine[name]]
    return ", ".join(
        [
            f"{short_name(machine)}, {machine['threads']} threads",
            f"nf4lora {machine['nf4lora']} ({machine['commit'] or 'no commit'})",
            *(f"{name} {machine[name]}" for name in packages),
        ]
    )
