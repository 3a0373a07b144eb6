"""The run: data, model, training, evaluation, files. Errors come early, and each says what to do."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

from nf4lora.train import banner
from nf4lora.train import config as configuration
from nf4lora.train import data as reading
from nf4lora.train import model as loading
from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.interrupt import Interrupt
from nf4lora.train.memory import peak_bytes
from nf4lora.train.options import OPTIONS, PER_CALL, TrainConfig

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
HARMLESS = {  # options that change nothing in the weights
    *PER_CALL, "output_dir", "save_strategy", "save_steps", "save_total_limit", "logging_steps", "eval_strategy",
    "eval_steps", "report_to", "per_device_eval_batch_size", "eval_file",
}  # fmt: skip


def train(config: TrainConfig, console: Console | None = None) -> int:
    """Fine-tune as the options say; returns the exit code.

    Raises:
        UsageError, RunError: with the text to print.
    """
    console = console or Console()
    loading.check_one_process()
    checkpoint = check_output(config)
    tables = reading.read(config)
    quiet()
    device, why = loading.choose_device(config.device)
    check_reports(config)
    tokenizer, stops, model_config = loading.load_tokenizer(config)
    length_note = loading.check_length(config, model_config)
    data = reading.prepare_data(config, tokenizer, tables[:2], stops)
    data.notes[:0] = [note for note in (*tables[2], length_note) if note]

    banner.show_machine(console, device, why)
    banner.show_data(console, data)
    if config.dry_run or any("could be" in note for note in data.notes):
        banner.show_sample(console, reading.show(data.train, tokenizer))
    if config.dry_run:
        banner.say(console, "dry run", "nothing was trained and nothing was written")
        return 0
    if data.eval is None:
        config.eval_strategy = "no"

    import transformers

    dtype = loading.choose_dtype(config.dtype, device)
    transformers.set_seed(config.seed)  # lora_A is drawn now; SFTTrainer seeds again, for what follows
    model = loading.load_model(config, model_config, device, dtype)
    model, said = loading.add_adapters(config, model)
    if said:
        banner.say(console, "prepare", said.removeprefix("nf4lora: "))
    return fit(config, console, device, dtype, tokenizer, data, model, checkpoint)


def quiet() -> None:
    """Silence the libraries' own bars and advice; what a user needs to know, we say."""
    # PEFT imports bitsandbytes, which misses a package that is not needed here, and says so.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import datasets
    import huggingface_hub.constants
    import transformers

    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # for processes started from here; this one has read it already
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|trl|peft|accelerate|datasets)(\..*)?")


def check_reports(config: TrainConfig) -> None:
    from importlib.util import find_spec

    for name in config.report_to:
        if find_spec(name) is None:
            raise UsageError(f"report_to {name} needs the package {name}: pip install {name}")


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first; one whose writing was broken off lacks trainer_state.json, written last."""
    found = [each for each in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", each.name)]
    found = [each for each in found if (each / "trainer_state.json").is_file()]
    return sorted(found, key=lambda each: int(each.name.partition("-")[2]))


def check_output(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from; refuses a folder that holds another run.

    Raises:
        UsageError: no such checkpoint, one of another adapter, or a folder in use.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output_dir: {folder} is a file")
    holds_run = any(folder.glob("checkpoint-*")) or any(
        (folder / name).exists() for name in ("adapter_model.safetensors", "config.yaml", "metrics.jsonl")
    )
    checkpoint: Path | None = None
    if config.resume_from_checkpoint == "auto":
        checkpoint = (checkpoints(folder) or [None])[-1]
    elif config.resume_from_checkpoint:
        checkpoint = Path(config.resume_from_checkpoint)
        if not (checkpoint / "trainer_state.json").is_file():
            raise UsageError(f"resume_from_checkpoint: {checkpoint} is not a whole checkpoint (no trainer_state.json)")
    if checkpoint is not None:
        if config.overwrite_output_dir:
            raise UsageError("resume_from_checkpoint and overwrite_output_dir contradict each other")
        check_same_adapter(config, checkpoint)
    elif holds_run and not config.overwrite_output_dir and not config.dry_run:
        raise UsageError(
            f"output_dir {folder} holds a run; go on with --resume_from_checkpoint, start anew with "
            "--overwrite_output_dir, or name another folder"
        )
    return checkpoint


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
    for name in ("adapter_model.safetensors", "adapter_config.json", "nf4lora.json", "metrics.jsonl", "loss.png",
                 "trainer_state.json", "train_results.json", "eval_results.json", "config.yaml"):  # fmt: skip
        (folder / name).unlink(missing_ok=True)


def fit(
    config: TrainConfig,
    console: Console,
    device: str,
    dtype: Any,
    tokenizer: Any,
    data: reading.Data,
    model: Any,
    checkpoint: Path | None,
) -> int:
    """Train, evaluate, save; 0, or 130 where the user stopped it."""
    from transformers.trainer_callback import PrinterCallback

    from nf4lora.train.plot import plot_loss
    from nf4lora.train.progress import Progress
    from nf4lora.train.trainer import StopOnInterrupt, Trainer

    folder = Path(config.output_dir)
    changed = changes(config, checkpoint) if checkpoint else ""
    if checkpoint is None:
        clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    configuration.write(config, folder / "config.yaml")
    with Interrupt() as interrupt:
        trainer = Trainer(
            model=model,
            args=arguments(config, device, dtype, evaluate=data.eval is not None and checkpoint is None),
            train_dataset=dataset(data.train, config),
            eval_dataset=dataset(data.eval, config) if data.eval is not None else None,
            processing_class=tokenizer,
            callbacks=[StopOnInterrupt(interrupt)],
        )
        trainer.remove_callback(PrinterCallback)
        progress = Progress(trainer, console, folder / "metrics.jsonl", device)
        trainer.add_callback(progress)
        if config.packing:
            check_packing(trainer)
        banner.show_model(console, config, model, dtype)
        steps, epochs = plan(trainer)
        banner.show_plan(console, config, len(trainer.train_dataset), steps, epochs)
        if config.resume_from_checkpoint:
            text = f"going on from {checkpoint}" if checkpoint else "no checkpoint yet: starting from the beginning"
            banner.say(console, "resume", text + changed)
        try:
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            state = trainer.state
            stopped = interrupt.requested and state.global_step < state.max_steps
            if (
                data.eval is not None
                and not stopped
                and not any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
            ):
                trainer.evaluate()
        finally:
            progress.close()
    peak = peak_bytes(device)  # of training; drawing and saving come on top
    plot_loss(state.log_history, folder / "loss.png")
    if stopped:
        return report_stop(config, console, state)
    metrics = {
        **result.metrics,
        "train_tokens": progress.tokens,
        "train_tokens_per_second": round(progress.throughput, 1),
        "peak_memory": peak,
    }
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    files = save(config, trainer, metrics)
    banner.show_end(console, config, losses, metrics, files)
    return 0


def report_stop(config: TrainConfig, console: Console, state: Any) -> int:
    folder = Path(config.output_dir)
    saved = checkpoints(folder)
    if state.global_step and saved:
        console.print(
            f"stopped after step {state.global_step} of {state.max_steps}; {saved[-1]} is saved. Go on with:\n"
            f"    nf4lora train {folder / 'config.yaml'} --resume_from_checkpoint",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print("stopped before the first step; nothing was saved")
    return INTERRUPTED


def arguments(config: TrainConfig, device: str, dtype: Any, evaluate: bool) -> Any:
    """The options as TRL's SFTConfig."""
    import torch
    from trl import SFTConfig

    options: dict[str, Any] = {name: getattr(config, name) for name in (
        "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
        "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm",
        "gradient_checkpointing", "seed", "save_strategy", "save_steps", "save_total_limit", "logging_steps",
        "eval_strategy", "eval_steps", "report_to", "max_length", "packing",
    )}  # fmt: skip
    return SFTConfig(
        **options,
        max_steps=config.max_steps or -1,
        data_seed=config.seed,
        full_determinism=config.deterministic,
        optim="adamw_torch_fused",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        eval_on_start=evaluate,
        bf16=dtype is torch.bfloat16 and needs_autocast(config),
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        dataset_kwargs={"skip_prepare_dataset": True},  # tokenised and labelled already
        logging_nan_inf_filter=False,  # it would replace a loss that is not finite by an average; we stop instead
        disable_tqdm=True,
        log_level="error",
    )


def needs_autocast(config: TrainConfig) -> bool:
    """Whether float32 parameters meet 16-bit activations outside our layers, which take both."""
    return bool(not config.load_in_4bit or config.use_dora or config.modules_to_save)


def dataset(split: Any, config: TrainConfig) -> Any:
    rows = split.dataset()
    if config.packing:
        from trl import pack_dataset

        rows = pack_dataset(rows, config.max_length, strategy="bfd")  # whole samples only: all are cut to max_length
    return rows


def plan(trainer: Any) -> tuple[int, float]:
    """Steps and epochs that Trainer will make of the options."""
    args = trainer.args
    per_epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return steps, steps / per_epoch


def check_packing(trainer: Any) -> None:
    """What a sample scores must not depend on its neighbour in the row: an attention that mixes them is refused.

    Raises:
        RunError: it mixes them.
    """
    import torch

    model, scores = trainer.model, []
    size = model.config.get_text_config().vocab_size
    mode = model.training
    model.eval()
    for step in (7, 11):  # another first sample, the same second one
        ids = [(3 + step * i) % size for i in range(12)] + [(5 + 13 * i) % size for i in range(9)]
        batch = trainer.data_collator([{"input_ids": ids, "labels": ids, "seq_lengths": [12, 9]}])
        batch = {name: each for name, each in trainer._prepare_inputs(batch).items() if name != "labels"}
        with torch.no_grad():
            scores.append(model(**batch, use_cache=False).logits[0, 12:].float())
    model.train(mode)
    if (scores[0] - scores[1]).abs().max() > 1e-3 * scores[0].std():
        raise RunError("packing: the attention of this model mixes the samples of a row; use packing false")


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
    names = ("adapter_model.safetensors", "adapter_config.json", "nf4lora.json", "chat_template.jinja", "config.yaml",
             "metrics.jsonl", "loss.png", "trainer_state.json", "train_results.json", "eval_results.json")  # fmt: skip
    return [folder / name for name in names if (folder / name).exists()]


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
