"""Checkpoints: which are whole, what each says of the run that wrote it, and whether this run may go on from it.

A run that goes on must take the same rows in the same order over the same weights. What may change (the learning rate,
intervals, the number of steps) is applied; what may not is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nf4lora.train.chat.clock import Clock
from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.run_folder.files import CHECKPOINT_RECORD, checkpoint_folders
from nf4lora.train.settings import OPTIONS, PER_CALL, TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from nf4lora.train.data import Split

WHOLE = ("trainer_state.json", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt")
OPTIONAL = ("rng_state.pth", CHECKPOINT_RECORD)
HARMLESS = {  # options that change nothing in the weights
    *PER_CALL, "output_dir", "save_strategy", "save_steps", "save_total_limit", "logging_steps", "eval_strategy",
    "eval_steps", "report_to", "per_device_eval_batch_size", "eval_file", "page_to",
}  # fmt: skip
OF_DATA = tuple(name for name, option in OPTIONS.items() if option.metadata["section"] == "Data")
OF_BASE = ("model_name_or_path", "model_revision", "load_in_4bit", "bnb_4bit_use_double_quant", "dtype")


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a folder, oldest first."""
    return [checkpoint for checkpoint in checkpoint_folders(folder).values() if is_whole(checkpoint)]


def is_whole(checkpoint: Path) -> bool:
    return not broken(checkpoint)


def broken(checkpoint: Path) -> str:
    """Why no run can go on from it; "" where one can. Of large files the part is read that says how long they are."""
    for name in WHOLE:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    for name in (*WHOLE, *OPTIONAL):
        path = checkpoint / name
        if path.exists() and not _is_readable(path):
            return f"{name} is {'truncated or broken' if path.is_file() and path.stat().st_size else 'empty'}"
    return ""


def _is_readable(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size)) if size < path.stat().st_size else {}
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            return bool(ends) and path.stat().st_size == 8 + size + max(ends)
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if path.name == "trainer_state.json":
                return isinstance(content["global_step"], int) and isinstance(content["log_history"], list)
            return isinstance(content, dict)
        return zipfile.is_zipfile(path)  # as torch.save writes; the directory of a zip file is its end
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def step_of(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def lacks_evaluation(config: TrainConfig, checkpoint: Path) -> bool:
    """Whether its step was to be evaluated and the run ended before that was done."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if any("eval_loss" in entry and entry["step"] == state["global_step"] for entry in state["log_history"]):
        return False
    if config.eval_strategy == "steps":
        every = int(state.get("eval_steps") or 0)  # in steps, also where the option is a share of them
        return bool(every) and state["global_step"] % every == 0
    return config.eval_strategy == "epoch" and float(state.get("epoch") or 0.5).is_integer()


def lies_in(checkpoint: Path, folder: Path) -> bool:
    return checkpoint.resolve().parent == folder.resolve()


def rows_per_step(config: TrainConfig) -> int:
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


# ---- what a checkpoint says of its run -------------------------------------------------------------------------------


def data_identity(split: Split, config: TrainConfig) -> dict[str, Any]:
    """Number of training rows and a hash of their tokens, labels and packing, in order."""
    fingerprint = split.fingerprint()
    packed = f"{fingerprint['sha256']} packing {config.max_length if config.packing else False}"
    return fingerprint | {"sha256": hashlib.sha256(packed.encode()).hexdigest()}


def base_identity(model: nn.Module) -> str:
    """A hash of the base without its adapter: name, kind and shape of every tensor, and a thousand values of each."""
    import torch

    from nf4lora.adapters.files import base_state_dict

    digest = hashlib.sha256()
    for name, tensor in sorted(base_state_dict(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().flatten()
        sample = flat[:: max(len(flat) // 1000, 1)].cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def record(config: TrainConfig, data: dict[str, Any], base: str, clock: Clock) -> dict[str, Any]:
    """What is written into each checkpoint."""
    from nf4lora import _C  # type: ignore[attr-defined]

    options = {name: getattr(config, name) for name in OPTIONS if name not in PER_CALL}
    about = {"written_by": f"nf4lora train {_C.__version__}", "date": clock.moment.isoformat()}
    return {**about, "data": data, "base": base, "options": options}


def clock_of(checkpoint: Path) -> Clock:
    """What the templates of the run that wrote it took for now."""
    try:
        noted = read_record(checkpoint).get("date")
        return Clock(datetime.fromisoformat(noted)) if noted else Clock()
    except (TypeError, ValueError):
        raise UsageError(f"resume_from_checkpoint: {checkpoint / CHECKPOINT_RECORD} holds no date as `date`") from None


def read_record(checkpoint: Path) -> dict[str, Any]:
    """The same, read; {} where another program wrote the checkpoint."""
    try:
        content = json.loads((checkpoint / CHECKPOINT_RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"resume_from_checkpoint: {checkpoint / CHECKPOINT_RECORD} cannot be read ({error})") from None
    parts = [content, content.get("options", {}), content.get("data", {})] if isinstance(content, dict) else [content]
    if not all(isinstance(part, dict) for part in parts):
        raise UsageError(f"resume_from_checkpoint: {checkpoint / CHECKPOINT_RECORD} is not what nf4lora train writes")
    return content


# ---- whether this run may go on from it ------------------------------------------------------------------------------


def check_options(config: TrainConfig, checkpoint: Path) -> None:
    """Refuse options that a run cannot change on its way.

    Raises:
        UsageError: naming the option and both values.
    """
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
    before = read_record(checkpoint).get("options", {})
    if before.get("seed", config.seed) != config.seed:
        raise UsageError(
            f"seed {config.seed} cannot go on from {checkpoint}, which has {before['seed']}: the rows would come in "
            "another order, some twice and some never"
        )
    size, batches = before.get("per_device_train_batch_size"), before.get("gradient_accumulation_steps")
    if size and batches and size * batches != rows_per_step(config):
        raise UsageError(
            f"per_device_train_batch_size {config.per_device_train_batch_size} x gradient_accumulation_steps "
            f"{config.gradient_accumulation_steps} = {rows_per_step(config)} rows a step cannot go on from "
            f"{checkpoint}, which has {size} x {batches} = {size * batches}: rows would be skipped or repeated. Other "
            f"sizes with the same product can"
        )


def check_data(config: TrainConfig, checkpoint: Path, data: dict[str, Any]) -> None:
    """Refuse to go on with other rows than those that the checkpoint was trained on.

    Raises:
        RunError: what differs, with the options that may be the reason.
    """
    saved = read_record(checkpoint)
    before = saved.get("data")
    if not before or before == data:
        return
    rows = f"{before['rows']} rows then, {data['rows']} now" if before["rows"] != data["rows"] else "other tokens"
    raise RunError(
        f"the training data is not what {checkpoint} was trained on ({rows}{_differing(config, saved, OF_DATA)}): rows "
        "would be repeated or missed. Go on with the same data, or start a new run in another output_dir"
    )


def check_base(config: TrainConfig, checkpoint: Path, base: str) -> None:
    """Refuse to go on over other weights.

    Raises:
        RunError: what differs, with the options that may be the reason.
    """
    saved = read_record(checkpoint)
    if saved.get("base", base) != base:
        reason = _differing(config, saved, OF_BASE) or "; the files of the model have changed"
        raise RunError(f"{checkpoint} was trained over another base than {config.model_name_or_path}{reason}")


def _differing(config: TrainConfig, saved: dict[str, Any], names: tuple[str, ...]) -> str:
    before = saved.get("options", {})
    return "".join(
        f"; {name} {getattr(config, name)} (was {before[name]})"
        for name in names
        if name in before and before[name] != getattr(config, name)
    )


def check_same_tensors(model: nn.Module, checkpoint: Path) -> None:
    """Refuse a checkpoint that does not hold exactly the model's trainable tensors; PEFT would load what fits.

    Raises:
        RunError: a tensor is missing, left over or of another shape; the file is broken.
    """
    from peft import get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(checkpoint / "adapter_model.safetensors", framework="pt") as file:
            there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise RunError(f"{checkpoint / 'adapter_model.safetensors'} is truncated or broken ({error})") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    differing = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
    if differing:
        raise RunError(
            f"{checkpoint} cannot be gone on from: {len(differing)} tensors of its adapter are not those of the model, "
            f"the first {differing[0]}; check model_name_or_path and lora_target_modules"
        )


def changes(config: TrainConfig, checkpoint: Path) -> str:
    """What differs from the run that wrote the checkpoint, and so from its exact continuation."""
    saved = read_record(checkpoint)
    if not saved:
        return "; another program wrote it, so that its data and its base cannot be compared with these"
    before = saved.get("options", {})
    covered = {*HARMLESS, *OF_DATA, "model_name_or_path"}  # data and base are compared by their content
    differing = [
        f"{name} {getattr(config, name)} (was {before[name]})"
        for name in OPTIONS
        if name not in covered and name in before and before[name] != getattr(config, name)
    ]
    return f"; this is another run from here on: {', '.join(differing)}" if differing else ""
