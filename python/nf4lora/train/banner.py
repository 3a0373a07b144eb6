"""What a run says before its first step and after its last."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

from nf4lora.train.data import Data, Split
from nf4lora.train.device import Device
from nf4lora.train.model import Base, auto_class
from nf4lora.train.settings import TrainConfig
from nf4lora.words import dtype_name, duration, human, number

if TYPE_CHECKING:
    import torch


def tell(console: Console, text: str) -> None:
    """Print a text as it is: in a plain str rich would take the [exp] of a path for an instruction."""
    console.print(Text(text), soft_wrap=True)


def say(console: Console, name: str, text: str) -> None:
    console.print(Text(f"{name:<9}", style="bold") + Text(text), soft_wrap=True)


@contextmanager
def working(console: Console, text: str) -> Iterator[Status]:
    """Says what takes a while: in a live line of a terminal, elsewhere in a line that stays."""
    if not console.is_terminal:
        say(console, "now", text)
    with console.status(Text(text), spinner="line") as status:
        yield status


def count(console: Console, status: Status, pause: float = 5.0) -> Callable[[str], None]:
    """Shows how far something is: in the live line of a terminal, elsewhere as a line now and then."""
    started = last_line = time.monotonic()

    def show(text: str) -> None:
        nonlocal last_line
        status.update(Text(text))
        if not console.is_terminal and time.monotonic() - last_line >= pause:
            last_line = time.monotonic()
            say(console, "data", f"{text}, {duration(last_line - started)}")

    return show


def data_line(split: Split) -> str:
    rows = len(split.input_ids)
    longest = max(map(len, split.input_ids))
    share = split.trained / max(split.tokens, 1)
    return (
        f"{split.table.name}: {number(rows)} rows ({split.kind}), {number(split.tokens)} tokens, "
        f"{share:.0%} trained, longest {longest}"
    )


def show_data(console: Console, data: Data) -> None:
    say(console, "data", data_line(data.train))
    if data.eval is not None:
        say(console, "held out", data_line(data.eval))
    say(console, "loss on", "the answers" if data.answers_only else "all tokens")
    for note in data.notes:
        say(console, "note", note)


def show_sample(console: Console, pieces: Sequence[tuple[str, bool]]) -> None:
    """One sample; what is trained stands between [[ ]], and in green on a terminal."""
    text = Text()
    for piece, trained in pieces:
        text.append(f"[[{piece}]]" if trained else piece, style="bold green" if trained else "dim")
    say(console, "sample", "the first row as the model sees it, [[trained]]:")
    console.print(text, soft_wrap=True)


def show_machine(console: Console, device: Device) -> None:
    import torch

    from nf4lora.compat.library import build_info

    info = build_info()
    on_cuda, why = device.kind == "cuda", f" ({device.why})" if device.why else ""
    where = torch.cuda.get_device_name() if on_cuda else f"CPU, {info['threads']} threads"
    kernels = f"CUDA {info['cuda_built']} for {info['cuda_archs']}" if on_cuda else f"CPU, {info['cpu']}"
    say(console, "nf4lora", f"{info['version']}, torch {info['torch']}, {where}{why}")
    say(console, "kernels", kernels)


def show_model(console: Console, config: TrainConfig, model: Any, dtype: torch.dtype) -> None:
    from nf4lora.preparation.report import report

    base = "NF4" if config.load_in_4bit else "16-bit" if "float32" not in str(dtype) else "32-bit"
    say(console, "model", f"{config.model_name_or_path}, {base} base, computing in {dtype_name(dtype)}")
    tell(console, str(report(model)))


def show_plan(console: Console, config: TrainConfig, rows: int, steps: int, epochs: float, warmup: int) -> None:
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    say(
        console,
        "plan",
        f"{number(steps)} steps of {size} rows ({config.per_device_train_batch_size} x "
        f"{config.gradient_accumulation_steps}), {epochs:.3g} epochs of {number(rows)} rows, {config.optim}",
    )
    if warmup >= steps and config.lr_scheduler_type != "constant":
        say(
            console,
            "note",
            f"the warm-up of {number(warmup)} steps is longer than the run: its learning rate only reaches "
            f"{config.learning_rate * steps / (warmup + 1):.2g} of {config.learning_rate:g}",
        )


def how_to_use(config: TrainConfig, base: Base) -> str:
    """A program that loads what was trained."""
    name, folder = config.model_name_or_path or "", config.output_dir
    opened_with = auto_class(base.config, name).__name__
    revision = f", revision={config.model_revision!r}" if config.model_revision else ""
    quant, package = "", "nf4lora"
    if config.load_in_4bit and not base.quantized:
        options = "" if config.bnb_4bit_use_double_quant else "double_quant=False"
        quant = f", quantization_config=nf4lora.NF4Config({options})"
    model, adapter = f"{opened_with}.from_pretrained({name!r}{revision}{quant})", "nf4lora.load_adapter"
    if base.quantized == "bitsandbytes":
        package = "nf4lora, peft"
        model = f"nf4lora.prepare({model}, peft.LoraConfig.from_pretrained({folder!r}))"
    if not config.load_in_4bit:
        package, adapter = "peft", "peft.PeftModel.from_pretrained"
    return (
        f"    import {package}\n"
        f"    from transformers import {opened_with}, AutoTokenizer\n"
        f"    model = {model}\n"
        f"    model = {adapter}(model, {folder!r}).eval()\n"
        f"    tokenizer = AutoTokenizer.from_pretrained({folder!r})"
    )


def show_end(
    console: Console,
    config: TrainConfig,
    losses: Sequence[float],
    best: tuple[Path, float] | None,
    metrics: dict[str, Any],
    files: Sequence[Path],
    base: Base,
) -> None:
    """Held-out loss before and after, the checkpoint with the lowest, speed, memory, files, and how to load them."""
    if len(losses) > 1:
        before, after = losses[0], losses[-1]
        perplexity = f"perplexity {math.exp(min(before, 99)):.4g} -> {math.exp(min(after, 99)):.4g}"
        say(console, "held out", f"loss {before:.4f} -> {after:.4f} ({perplexity})")
        if best is not None and best[1] < after:
            say(console, "best", f"of the checkpoints, {best[0]} has the lowest held-out loss, {best[1]:.4f}")
    say(
        console,
        "speed",
        f"{number(metrics['train_tokens_per_second'])} tokens/s, {duration(metrics['train_runtime'])} in all, "
        f"peak memory {human(metrics['peak_memory'])}",
    )
    say(console, "saved", f"{config.output_dir}: {', '.join(file.name for file in files)}")
    say(console, "use it", "")
    tell(console, how_to_use(config, base))
