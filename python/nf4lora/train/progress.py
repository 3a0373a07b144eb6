"""One live line while training, and metrics.jsonl beside it."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nf4lora.train import banner
from nf4lora.train.errors import reason
from nf4lora.train.memory import peak_bytes, total_bytes
from nf4lora.train.run_folder.files import write_text
from nf4lora.train.trainer import Trainer
from nf4lora.words import duration, human, number

PAUSE = 3.0  # seconds without a line where there is no terminal


class Progress(TrainerCallback):
    """Shows step, loss, held-out loss, learning rate, tokens/s, peak memory and time left.

    On a terminal it is one line that is rewritten; elsewhere a line for each log, and one where none was printed for
    PAUSE seconds. tokens/s counts tokens that are not padding, over the time spent in steps: evaluations and
    checkpoints are left out.
    """

    def __init__(self, trainer: Trainer, console: Console, path: Path, device: str) -> None:
        self.trainer, self.console, self.path, self.device = trainer, console, path, device
        self.live: Live | None = None
        self.loss: float | None = None
        self.held_out: float | None = None
        self.rate: float | None = None
        self.training_seconds = 0.0
        self.elapsed_before = 0.0
        self.began = self.step_began = self.said = time.monotonic()
        self.first_began = 0.0
        self.first_step = self.first_tokens = 0
        self.evaluated = 0
        self.unwritten = False  # whether metrics.jsonl has refused a line

    @property
    def tokens(self) -> int:
        return self.trainer.tokens_seen - self.first_tokens

    @property
    def throughput(self) -> float:
        """Tokens per second of training in this call."""
        return self.tokens / self.training_seconds if self.training_seconds else 0.0

    @property
    def elapsed(self) -> float:
        return self.elapsed_before + time.monotonic() - self.began

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with contextlib.suppress(OSError):  # as in `write`
            evaluated = any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
            self.elapsed_before = trim_metrics(self.path, state.global_step, evaluated)
        self.began = time.monotonic()
        self.first_step, self.first_tokens = state.global_step, self.trainer.tokens_seen
        held_out = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        self.held_out = held_out[-1] if held_out else None
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        self.step_began = time.monotonic()
        self.first_began = self.first_began or self.step_began
        self.rate = lr_scheduler.get_last_lr()[0]  # of this step; at its end the scheduler shows that of the next

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.training_seconds += time.monotonic() - self.step_began
        self.loss = self.trainer.step_loss
        self.show(self.line(state))

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self.evaluated += 1
        self.show(f"{self.line(state)} | evaluating {self.evaluated}/{len(eval_dataloader)}")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        self.evaluated = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        logs = dict(logs or {})
        if "eval_loss" in logs:
            self.held_out = logs["eval_loss"]
            self.show(self.line(state))
            banner.tell(self.console, f"step {state.global_step}: held-out loss {self.held_out:.4f}")
        elif "loss" in logs:
            self.loss, self.rate = logs["loss"], logs["learning_rate"]
            if self.live is None:
                self.print(self.line(state))
        if "loss" in logs or "eval_loss" in logs:
            self.write(logs, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def show(self, line: str) -> None:
        if self.live is not None:
            self.live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif time.monotonic() - self.said >= PAUSE:
            self.print(line)

    def print(self, line: str) -> None:
        """A line that stays."""
        self.said = time.monotonic()
        banner.tell(self.console, line)

    def remaining(self, state: TrainerState) -> float | None:
        """Seconds, at the pace since the first step began: with evaluations and checkpoints, without loading."""
        done = state.global_step - self.first_step
        return (time.monotonic() - self.first_began) / done * (state.max_steps - state.global_step) if done else None

    def line(self, state: TrainerState) -> str:
        parts = [f"step {state.global_step}/{state.max_steps} {state.global_step / max(state.max_steps, 1):.0%}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.held_out is not None:
            parts.append(f"eval {self.held_out:.4f}")
        if self.rate is not None:
            parts.append(f"lr {self.rate:.2g}")
        if self.throughput:
            parts.append(f"{number(self.throughput)} tok/s")
        total = total_bytes(self.device)
        parts.append(f"peak {human(peak_bytes(self.device))}" + (f" of {human(total)}" if total else ""))
        left = self.remaining(state)
        if left is not None:
            parts.append(f"ETA {duration(left)}")
        return " | ".join(parts)

    def write(self, logs: dict, state: TrainerState) -> None:
        """One line of metrics.jsonl: Hugging Face's keys, and seconds, tokens/s and bytes."""
        left = self.remaining(state)
        record = {
            "step": state.global_step,
            **logs,
            "percentage": round(100 * state.global_step / max(state.max_steps, 1), 2),
            "elapsed_time": round(self.elapsed, 3),
            "remaining_time": None if left is None else round(left, 3),
            "throughput": round(self.throughput, 1),
            "peak_memory": peak_bytes(self.device),
        }
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # the log is no reason to lose a run; a checkpoint that cannot be written will stop it
            if not self.unwritten:
                banner.tell(self.console, f"{self.path} cannot be written ({reason(error)}); going on without it")
            self.unwritten = True


def trim_metrics(path: Path, step: int, evaluated: bool = True) -> float:
    """Drop what a run that was broken off logged behind its checkpoint; returns the seconds spent up to there.

    Args:
        evaluated: whether the checkpoint, which is of this step, knows of an evaluation there; else that is dropped too
    """
    if not path.exists():
        return 0.0
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the line that was being written
            continue
        if not isinstance(record, dict):
            continue
        at = record.get("step", 0)
        if at < step or (at == step and (evaluated or "eval_loss" not in record)):
            records.append(record)
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    return records[-1].get("elapsed_time", 0.0) if records else 0.0
