"""What watches a training run: gradients that do not arrive, the count of tokens, requests to stop."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nf4lora.train.reach import refuse_unreached
from nf4lora.train.stop import StopRequest


class Guarded(Protocol):
    """What a guard notes down in a trainer."""

    began_at: int  # the step of the checkpoint that the run goes on from
    in_step: bool  # whether the weights are between two steps' values
    tokens_seen: int  # without padding

    def read_step(self) -> None:
        """Read the numbers of the last step; refuse what is not finite."""


class Guard(TrainerCallback):
    """Resumes the token count, knows when weights are between two steps, logs what is worth reading."""

    def __init__(self, trainer: Guarded) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        counted = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self.trainer.began_at = state.global_step
        self.trainer.tokens_seen = int(counted[-1]) if counted else 0  # TRL starts again from 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.in_step = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.in_step = False
        # A checkpoint forgets the losses since the last log: logging first makes the log of a resumed run the same. The
        # last step is logged too, so that a run of fewer steps than logging_steps shows where it ended.
        control.should_log = control.should_log or control.should_save or state.global_step >= state.max_steps
        self.read(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.read(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.read_step()

    def read(self, control: TrainerControl) -> None:
        """Read the step's numbers where something of it is about to be shown, measured or written."""
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self.trainer.read_step()


class StopOnRequest(TrainerCallback):
    """Makes of a request to stop a checkpoint and an end."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stop.requested:
            control.should_save = control.should_log = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stop.requested:  # Trainer takes breaking off for the end of the epoch
            control.should_save = control.should_evaluate = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stop.requested and state.global_step:
            control.should_save = control.should_training_stop = True


def arrivals(trainable: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whether each gradient has arrived, by name: [] bool, on its device, for those that only their values tell of.

    lora_A's is zero as long as B is, so that one only has to be there.
    """
    return {name: p.grad.any() for name, p in trainable if p.grad is not None and "lora_B" in name}


def check_arrivals(trainable: list[tuple[str, Tensor]], arrived: dict[str, float]) -> None:
    """Every adapter tensor must have a gradient after the first step, else it would silently never be trained.

    Experts that no token was sent to have none.

    Args:
        arrived: the values of `arrivals`
    """
    dead = {name for name, p in trainable if p.grad is None or not arrived.get(name, True)}
    refuse_unreached(dead, [name for name, _ in trainable])
