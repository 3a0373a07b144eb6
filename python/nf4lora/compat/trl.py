"""The private names of TRL's and transformers' trainers that nf4lora uses, each in one place.

Tested with TRL 1.16 and transformers 5.17 to 5.24. `tests/test_compat.py` fails where one of these names is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import utils
from trl import SFTConfig, SFTTrainer

from nf4lora.compat.torch import norms_in_groups


def recomputation(wanted: bool) -> dict[str, Any]:
    """The options of SFTConfig for computing activations again in the backward pass, by their names in this release:
    transformers 5.24 warns of the former names, which are the only ones in earlier releases."""
    names = {field.name for field in fields(SFTConfig)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: wanted, f"{name}_kwargs": {"use_reentrant": False}}


class OneDeviceConfig(SFTConfig):
    """TRL's options for one process on the current card; TRL itself takes card 0 and spreads batches over all cards."""

    @cached_property
    def _setup_devices(self) -> torch.device:
        card = torch.cuda.current_device() if not self.use_cpu and torch.cuda.is_available() else None
        device = super()._setup_devices
        if card is not None:
            torch.cuda.set_device(card)
            self._n_gpu, device = 1, torch.device("cuda", card)
        return device


class OpenTrainer(SFTTrainer):
    """SFTTrainer whose inner steps have public names, which a subclass may call and override.

    An override calls `super()` for what TRL and transformers do. A checkpoint always belongs to the whole run, because
    there is no hyperparameter search.

    Attributes:
        checkpoint_parent: the folder that a checkpoint is written into; None: output_dir
    """

    checkpoint_parent: Path | None = None

    def _send_telemetry(self) -> None:
        """Send nothing: TRL's own method reports each run to huggingface.co."""

    # ---- counts

    @property
    def tokens_seen(self) -> int:
        """The number of tokens trained on so far, without padding; SFTTrainer logs it as num_tokens."""
        return int(self._total_train_tokens)

    @tokens_seen.setter
    def tokens_seen(self, count: int) -> None:
        self._total_train_tokens = count

    @property
    def metrics(self) -> Mapping[str, dict[str, list[Any]]]:
        """The values collected since the last log, by "train" or "eval" and by name."""
        return self._metrics

    # ---- one step

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of the collator, moved to the model's device."""
        return self._prepare_inputs(batch)

    @property
    def summed_loss(self) -> Tensor:
        """The sum of the losses since the last log, on the device."""
        return self._tr_loss

    def gradient_norms(self, model: Any) -> tuple[Tensor, list[str]]:
        """The norm of each gradient, [n], and the name of its parameter."""
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if not grads:
            return torch.zeros(0, device=self.args.device), []
        norms, order = norms_in_groups(list(grads.values()))
        names = list(grads)
        return norms, [names[i] for i in order]

    def gradient_norm(self, model: Any) -> Tensor:
        """The norm of all gradients; called once a step, before the optimizer's."""
        return torch.linalg.vector_norm(self.gradient_norms(model)[0])

    def _clip_grad_norm(self, model: Any) -> Tensor:
        norm = self.gradient_norm(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        utils.clip_grads_with_norm_(trained, self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(model, self.gradient_norm(model) if grad_norm is None else grad_norm)

    # ---- what is shown of a step

    def known_at_log(self) -> tuple[float, float] | None:
        """`summed_loss` and the last norm of the gradients, if the host has them; None: Trainer reads both from the
        device, one after the other."""
        return None

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            known = self.known_at_log()
            if known is not None:
                loss, grad_norm = known
                tr_loss.zero_()  # as Trainer does with the one that it is given
                tr_loss = torch.tensor(loss, dtype=tr_loss.dtype)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def step_back(self, epoch: float | None) -> None:
        """Set the counters of steps to those before the last one, which has changed no weight, and `state.epoch` to
        what it was then."""
        self.state.global_step -= 1
        self.state.epoch = epoch  # type: ignore[assignment]  # None before the first
        scheduler: Any = self.lr_scheduler
        scheduler.last_epoch -= 1
        scheduler._step_count -= 1
        set_rates(scheduler)

    # ---- evaluation between steps

    def evaluate_between_steps(self, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Run `evaluate` during training, before the checkpoint of the same step."""
        return evaluate()

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        evaluate = super()._evaluate
        return self.evaluate_between_steps(lambda: evaluate(*args, **kwargs))

    # ---- checkpoints

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this step."""
        super()._save_checkpoint(self.model, None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.save_checkpoint()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoint_parent or super()._get_output_dir(trial))

    def load_weights(self, checkpoint: Path) -> None:
        """Load the weights of a checkpoint, and nothing else of it."""
        self._load_from_checkpoint(str(checkpoint))

    def load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer's and the scheduler's state of a checkpoint; nothing where there is none."""
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.load_optimizer_and_scheduler(checkpoint)

    def on_state(self, max_steps: int) -> None:
        """Called before the first step, when the state of the run is set, new or from a checkpoint."""

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        result = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.train_batch_size = self._train_batch_size  # that of a checkpoint may have been another
        self.on_state(max_steps)
        return result


def set_rates(scheduler: Any) -> None:
    """Set the optimizer's learning rates to those of its schedule at the current step."""
    rates = [base * factor(scheduler.last_epoch) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
