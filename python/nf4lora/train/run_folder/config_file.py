"""config.yaml of a run's folder: the options as the run took them, to be given again."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

from nf4lora.train.run_folder import files
from nf4lora.train.settings import OPTIONS, PER_CALL, TrainConfig

HEAD = "# written by nf4lora "  # its first words


def write(config: TrainConfig, path: Path) -> None:
    """The resolved options as YAML, ready to be given to `nf4lora train` again."""
    import yaml

    from nf4lora import _C  # type: ignore[attr-defined]

    values = {name: getattr(config, name) for name in OPTIONS}
    values = {name: value for name, value in values.items() if name not in PER_CALL and value is not None}
    if "dataset_train_split" not in config.given:  # a folder is searched where none is named
        values.pop("dataset_train_split")
    if config.max_steps:
        values.pop("num_train_epochs")
    if config.eval_strategy != "steps":
        values.pop("eval_steps", None)
    if config.save_strategy != "steps":
        values.pop("save_steps")
    if not config.load_in_4bit:
        values = {name: value for name, value in values.items() if not name.startswith("bnb_4bit")}
    values["report_to"] = config.report_to or "none"
    head = f"{HEAD}{_C.__version__}; run again with: nf4lora train {shlex.quote(str(path))}\n"
    files.write_text(path, head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def of_earlier_version(folder: Path) -> bool:
    """Whether a run of a version that kept no record of its files has written here: it began config.yaml like this."""
    with contextlib.suppress(OSError, ValueError):
        return not files.read_record(folder) and (folder / "config.yaml").read_text("utf-8").startswith(HEAD)
    return False


def moved_from(config_file: Path, output_dir: str) -> bool:
    """Whether a config.yaml stands in a run's folder that was called output_dir when it was written, and is not now."""
    folder = config_file.parent
    return files.read_record(folder).get("output_dir") == output_dir and folder.resolve() != Path(output_dir).resolve()
