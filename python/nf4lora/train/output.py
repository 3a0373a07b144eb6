"""The output folder: what is in it, whether it may be written to, what a run leaves there."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from nf4lora.train import config as configuration
from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.options import OPTIONS, PER_CALL, TrainConfig

HARMLESS = {  # options that change nothing in the weights
    *PER_CALL, "output_dir", "save_strategy", "save_steps", "save_total_limit", "logging_steps", "eval_strategy",
    "eval_steps", "report_to", "per_device_eval_batch_size", "eval_file", "page_to",
}  # fmt: skip
RESULTS = (
    "adapter_model.safetensors", "adapter_config.json", "nf4lora.json", "chat_template.jinja", "config.yaml",
    "metrics.jsonl", "loss.png", "trainer_state.json", "train_results.json", "eval_results.json",
)  # fmt: skip
WHOLE = ("trainer_state.json", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt")


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first; one whose writing was broken off lacks trainer_state.json, written last."""
    found = [each for each in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", each.name)]
    return sorted(filter(is_whole, found), key=lambda each: int(each.name.partition("-")[2]))


def is_whole(checkpoint: Path) -> bool:
    return all((checkpoint / name).is_file() for name in WHOLE)


def lies_in(checkpoint: Path, folder: Path) -> bool:
    return checkpoint.resolve().parent == folder.resolve()


def step_of(checkpoint: Path) -> int:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]


def restore(trainer: Any, checkpoint: Path) -> None:
    """Weights and history of a checkpoint, for a run that has nothing left to train."""
    from transformers import TrainerState

    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def check_output(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from; refuses a folder that holds another run.

    Raises:
        UsageError: no such checkpoint, one of another adapter, or a folder in use.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output_dir: {folder} is a file")
    checkpoint: Path | None = None
    if config.resume_from_checkpoint == "auto":
        checkpoint = next(reversed(checkpoints(folder)), None)
    elif config.resume_from_checkpoint:
        checkpoint = Path(config.resume_from_checkpoint)
        if not is_whole(checkpoint):
            raise UsageError(f"resume_from_checkpoint: {checkpoint} is not a whole checkpoint ({', '.join(WHOLE)})")
    goes_on = checkpoint is not None and lies_in(checkpoint, folder)
    if goes_on and config.overwrite_output_dir:
        raise UsageError("resume_from_checkpoint and overwrite_output_dir contradict each other")
    if checkpoint is not None:
        check_same_adapter(config, checkpoint)
    if not goes_on and not config.overwrite_output_dir and not config.dry_run and holds_run(folder):
        raise UsageError(
            f"output_dir {folder} holds a run; go on with --resume_from_checkpoint, start anew with "
            "--overwrite_output_dir, or name another folder"
        )
    return checkpoint


def holds_run(folder: Path) -> bool:
    names = ("adapter_model.safetensors", "config.yaml", "metrics.jsonl")
    return any(folder.glob("checkpoint-*")) or any((folder / name).exists() for name in names)


def check_same_adapter(config: TrainConfig, checkpoint: Path) -> None:
    """Refuse a checkpoint whose adapter has another shape or scaling than the options ask for."""
    saved = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    for name, key in (
        ("lora_r", "r"),
        ("lora_alpha", "lora_alpha"),
        ("lora_dropout", "lora_dropout"),
        ("use_rslora", "use_rslora"),
        ("use_dora", "use_dora"),
    ):
        if saved.get(key) != getattr(config, name):
            raise UsageError(
                f"{name} {getattr(config, name)} cannot go on from {checkpoint}, which has {saved.get(key)}"
            )


def check_same_tensors(model: Any, checkpoint: Path) -> None:
    """Refuse a checkpoint that does not hold exactly the model's trainable tensors; PEFT would load what fits.

    Raises:
        RunError: a tensor is missing, left over or of another shape.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(checkpoint / "adapter_model.safetensors", framework="pt") as file:
        there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    wanted = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    differing = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
    if differing:
        raise RunError(
            f"{checkpoint} cannot be gone on from: {len(differing)} tensors of its adapter are not those of the model, "
            f"the first {differing[0]}; check model_name_or_path and lora_target_modules"
        )


def changes(config: TrainConfig, checkpoint: Path) -> str:
    """What differs from the run that wrote the checkpoint, and so from its exact continuation."""
    path = checkpoint.parent / "config.yaml"
    if not path.is_file():
        return ""
    with contextlib.suppress(UsageError):  # a file of an older version, or one that was edited
        before = configuration.parse_arguments([str(path)])
        differing = [
            f"{name} {getattr(config, name)} (was {getattr(before, name)})"
            for name in OPTIONS
            if name not in HARMLESS and getattr(before, name) != getattr(config, name)
        ]
        return f"; this is another run from here on: {', '.join(differing)}" if differing else ""
    return ""


def clear(folder: Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    for each in folder.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", each.name) and each.is_dir():
            shutil.rmtree(each)
    for name in RESULTS:
        (folder / name).unlink(missing_ok=True)


def save(config: TrainConfig, trainer: Any, metrics: dict[str, Any]) -> list[Path]:
    """Adapter, tokenizer, state and results; returns the files a user will look for."""
    import nf4lora

    folder = Path(config.output_dir)
    if config.load_in_4bit:
        nf4lora.save_adapter(trainer.model, folder)
    else:
        trainer.model.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    write_json(folder / "train_results.json", metrics)
    held_out = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if held_out:
        write_json(folder / "eval_results.json", {"eval_loss_before": held_out[0]["eval_loss"], **held_out[-1]})
    return [folder / name for name in RESULTS if (folder / name).exists()]


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
