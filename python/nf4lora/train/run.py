"""The run: data, model, training, evaluation, files. Errors come early, and each says what to do."""

from __future__ import annotations

import logging
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from nf4lora.train import banner, optimizer, output
from nf4lora.train import config as configuration
from nf4lora.train import data as reading
from nf4lora.train import model as loading
from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.interrupt import Interrupt
from nf4lora.train.memory import peak_bytes
from nf4lora.train.options import TrainConfig

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def train(config: TrainConfig, console: Console | None = None) -> int:
    """Fine-tune as the options say; returns the exit code.

    Raises:
        UsageError, RunError: with the text to print.
    """
    import transformers

    console = console or Console()
    loading.check_one_process()
    checkpoint = output.check_output(config)
    with console.status("reading the data") as status:
        tables = reading.read(config)
        quiet()
        device, why = loading.choose_device(config.device)
        config.optim = optimizer.choose(config, device)
        check_reports(config)
        tokenizer, stops, model_config = loading.load_tokenizer(config)
        length_note = loading.check_length(config, model_config)
        data = reading.prepare_data(config, tokenizer, tables[:2], stops, banner.count(console, status))
    data.notes[:0] = [note for note in (*tables[2], length_note, data.choice) if note]

    banner.show_machine(console, device, why)
    banner.show_data(console, data)
    if config.dry_run or data.choice:
        banner.show_sample(console, reading.show(data.train, tokenizer))
    if config.dry_run:
        banner.say(console, "dry run", "nothing was trained and nothing was written")
        return 0
    if data.eval is None:
        config.eval_strategy = "no"

    dtype = loading.choose_dtype(config.dtype, device)
    transformers.set_seed(config.seed)  # lora_A is drawn now; SFTTrainer seeds again, for what follows
    quantized = loading.quantization_of(model_config)
    with console.status("loading the model"):
        model = loading.load_model(config, model_config, device, dtype)
        model, said = loading.add_adapters(config, model)
    for line in said:
        banner.say(console, "prepare", line)
    return fit(Setup(config, console, device, dtype, tokenizer, data, model, quantized, checkpoint))


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


@dataclass
class Setup:
    """What stands ready when training starts."""

    config: TrainConfig
    console: Console
    device: str
    dtype: Any
    tokenizer: Any
    data: reading.Data
    model: Any
    quantized: str  # method that the base came quantised with, or nothing
    checkpoint: Path | None


def fit(setup: Setup) -> int:
    """Train, evaluate, save; 0, or 130 where the user stopped it."""
    from transformers.trainer_callback import PrinterCallback

    from nf4lora.train.plot import plot_loss
    from nf4lora.train.progress import Progress
    from nf4lora.train.trainer import StopOnInterrupt, Trainer

    config, console, data, checkpoint = setup.config, setup.console, setup.data, setup.checkpoint
    folder = Path(config.output_dir)
    changed = output.changes(config, checkpoint) if checkpoint else ""
    if checkpoint is not None:
        output.check_same_tensors(setup.model, checkpoint)
        optimizer.check_state(config, checkpoint)
    if checkpoint is None or not output.lies_in(checkpoint, folder):
        output.clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    configuration.write(config, folder / "config.yaml")
    with Interrupt() as interrupt:
        rows = dataset(data.train, config)
        trainer = Trainer(
            model=setup.model,
            args=arguments(config, setup.device, setup.dtype, evaluate=data.eval is not None and checkpoint is None),
            train_dataset=rows,
            eval_dataset=dataset(data.eval, config) if data.eval is not None else None,
            processing_class=setup.tokenizer,
            callbacks=[StopOnInterrupt(interrupt)],
            **optimizer.keywords(config),
        )
        trainer.remove_callback(PrinterCallback)
        progress = Progress(trainer, console, folder / "metrics.jsonl", setup.device)
        trainer.add_callback(progress)
        if config.packing:
            check_packing(trainer)
        banner.show_model(console, config, setup.model, setup.dtype)
        steps, epochs = plan(trainer)
        banner.show_plan(console, config, len(rows), steps, epochs)
        if config.resume_from_checkpoint:
            text = f"going on from {checkpoint}" if checkpoint else "no checkpoint yet: starting from the beginning"
            banner.say(console, "resume", text + changed)
        try:
            if checkpoint and output.step_of(checkpoint) >= steps:  # Trainer would take one step more
                banner.say(console, "resume", "nothing is left to train")
                output.restore(trainer, checkpoint)
                metrics = {"train_runtime": 0.0}
            else:
                metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
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
    peak = peak_bytes(setup.device)  # of training; drawing and saving come on top
    plot_loss(state.log_history, folder / "loss.png")
    if stopped:
        return report_stop(config, console, state)
    metrics |= {
        "train_tokens": progress.tokens,
        "train_tokens_per_second": round(progress.throughput, 1),
        "peak_memory": peak,
    }
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    for line in optimizer.told(trainer):
        banner.say(console, "state", line)
    files = output.save(config, trainer, metrics)
    banner.show_end(console, config, losses, metrics, files, setup.quantized)
    return 0


def report_stop(config: TrainConfig, console: Console, state: Any) -> int:
    folder = Path(config.output_dir)
    saved = output.checkpoints(folder)
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
        optim="adamw_torch_fused",  # unless optimizer.keywords names another
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

    from nf4lora.model_tree import evaluating

    model, scores = trainer.model, []
    size = model.config.get_text_config().vocab_size
    for step in (7, 11):  # another first sample, the same second one
        ids = [(3 + step * i) % size for i in range(12)] + [(5 + 13 * i) % size for i in range(9)]
        batch = trainer.data_collator([{"input_ids": ids, "labels": ids, "seq_lengths": [12, 9]}])
        batch = {name: each for name, each in trainer._prepare_inputs(batch).items() if name != "labels"}
        with evaluating(model), torch.no_grad():
            scores.append(model(**batch, use_cache=False).logits[0, 12:].float())
    if (scores[0] - scores[1]).abs().max() > 1e-3 * scores[0].std():
        raise RunError("packing: the attention of this model mixes the samples of a row; use packing false")
