"""What we change in TRL's SFTTrainer: how it counts, saves, resumes and reports; not how it trains."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nf4lora.compat.trl import OpenTrainer, set_rates
from nf4lora.loss.causal_lm import has_plain_head, score
from nf4lora.nn.model_tree import unchanged_random_state
from nf4lora.train.errors import RunError
from nf4lora.train.guard import Guard, check_gradients
from nf4lora.train.run_folder import files
from nf4lora.train.run_folder.output import writing


class Stopped(Exception):
    """The user has stopped the run while it was evaluated before its first step."""


class Trainer(OpenTrainer):
    """SFTTrainer for rows that are tokenised and labelled already.

    Args:
        record: what is written into each checkpoint, for `checkpoints.py` to compare
        keep: how many checkpoints are kept; 0: all of them
        stop: says whether the user has asked to stop
    """

    def __init__(
        self, *, record: dict[str, Any], keep: int = 0, stop: Callable[[], bool] = lambda: False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        # TRL divides by the trained tokens of all accumulated batches for every model; Trainer has to be told so for
        # those whose forward takes no loss arguments.
        self.model_accepts_loss_kwargs = True
        model: Any = self.model
        self.plain_head = not self.aux_loss_enabled and has_plain_head(model.get_base_model(), self.args.device)
        self.record, self.keep, self.stop = record, keep, stop
        self.saved: Path | None = None  # the last checkpoint that was written, or the one gone on from
        self._written = -1  # the step of the last checkpoint that this process has written
        self.step_loss = 0.0  # of the running optimizer step, complete at its end
        self._checked = False  # whether the first step's gradients have arrived
        self.in_step = False  # whether the weights are between two steps' values
        self.began_at = 0  # the step of the checkpoint that the run goes on from
        self._sums: Tensor | None = None  # loss and tokens of this step, on the device: reading them waits for it
        self._eval_sums: Tensor | None = None
        self.add_callback(Guard(self))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The output folder holds what was asked for; no README about TRL."""

    # ---- loss and gradients ------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        tokens, seen = inputs["labels"][..., 1:].ne(-100).sum(), inputs["labels"].new_zeros(())
        if self.plain_head and not return_outputs:
            ids = inputs["input_ids"]
            seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else seen + ids.numel()
            result = self._loss(model, inputs, num_items_in_batch, tokens)
        else:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = (result[0] if return_outputs else result).detach().double()
        if loss.device.type == "cpu":  # where reading waits for nothing; elsewhere it is read once a step
            check_finite(loss.item(), f"step {self.state.global_step + 1}" if model.training else "the evaluation")
        if model.training:
            sums = torch.stack((loss, seen.double()))
            self._sums = sums if self._sums is None else self._sums + sums
        else:
            sums = torch.stack((loss * tokens, tokens.double()))
            self._eval_sums = sums if self._eval_sums is None else self._eval_sums + sums
        return result

    def _loss(self, model: Any, inputs: dict, num_items_in_batch: Any, tokens: Tensor) -> Tensor:
        """TRL's loss and metrics, over trained tokens only."""
        with self.accelerator.autocast():
            log_p, correct = score(self.accelerator.unwrap_model(model).get_base_model(), inputs)
        tokens = tokens.clamp(min=1)
        self.metrics["train" if model.training else "eval"]["mean_token_accuracy"].append(correct.sum() / tokens)
        return -log_p.sum() / (tokens if num_items_in_batch is None else num_items_in_batch.clamp(min=1))

    def gradient_norm(self, model: Any) -> Tensor:
        """The norm of all gradients, before anything is changed in them; refuses what is not finite.

        Here the device is waited for, once a step.

        Raises:
            RunError: the loss or a gradient is NaN or infinite; the weights are still those of the step before.
        """
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = super().gradient_norm(model)
        assert self._sums is not None  # compute_loss has just run
        size, self.step_loss, seen = torch.cat((norm.double()[None], self._sums.to(norm.device))).tolist()
        self._sums = None
        self.tokens_seen += int(seen)
        step = self.state.global_step + 1
        check_finite(self.step_loss, f"step {step}")
        if not math.isfinite(size):
            bad = [name for name, grad in grads.items() if not grad.isfinite().all()]
            what = bad[0] if bad else "all parameters together"
            raise RunError(
                f"the gradient of {what} is not finite in step {step}; nothing of this step was kept. "
                "A smaller learning_rate or dtype float32 may help"
            )
        if not self._checked:
            check_gradients([(name, p) for name, p in model.named_parameters() if p.requires_grad])
            self._checked = True
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for metrics in self.metrics.values():
            if self.plain_head and metrics.get("mean_token_accuracy"):
                metrics["num_tokens"] = [self.tokens_seen]
            for name, values in metrics.items():
                metrics[name] = [float(value) for value in values]
        super().log(logs, start_time)

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The mean over all trained tokens, where Trainer takes the mean of the batches' means."""
        self._eval_sums = None
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        total, tokens = (0.0, 0.0) if self._eval_sums is None else self._eval_sums.tolist()
        check_finite(total, "the evaluation")
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(tokens, 1)
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's, without a trace in the random state; nothing is returned where the user stopped it.

        Raises:
            Stopped: that was before the first step of this process.
        """
        with unchanged_random_state():
            try:
                return super().evaluate(*args, **kwargs)
            except Stopped:
                if self.state.global_step == self.began_at:
                    raise
                self.metrics["eval"].clear()
                self.control.should_save = self.control.should_training_stop = True
                return {}

    def evaluate_between_steps(self, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The checkpoint of a step is written before its evaluation, which may take longer than the steps between two
        checkpoints: whatever ends the process then, no step is lost. The result is added afterwards."""
        if self.control.should_save:
            self.save_checkpoint()
        metrics = evaluate()
        if self._written == self.state.global_step:
            self.save_checkpoint()
        return metrics

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.stop():
            raise Stopped
        return super().prediction_step(*args, **kwargs)

    # ---- learning rate -----------------------------------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """transformers' schedule, with a warm-up whose first step is not lost at rate 0."""
        made = self.lr_scheduler is None
        scheduler: Any = super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        if made and warmup:
            scheduler.lr_lambdas = [warmed_up(factor, warmup) for factor in scheduler.lr_lambdas]
            set_rates(scheduler)
        return scheduler

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def save_checkpoint(self, rotate: bool = True) -> None:
        """Write a checkpoint that is whole as soon as it has its name, then drop those that are too many. Of one that
        is there already, from before an evaluation of the same step, the history is all that has changed.

        Raises:
            RunError: it could not be written; nothing of it is left.
        """
        folder = Path(self.args.output_dir or "")
        final = folder / f"checkpoint-{self.state.global_step}"
        if self._written == self.state.global_step:
            states: Any = self.state.stateful_callbacks  # a dict once a run has begun
            states["TrainerControl"] = self.control.state()
            with writing(final, self.saved), files.staging(folder) as place:
                self.state.save_to_json(str(place / "trainer_state.json"))
                files.finish(place)
                (place / "trainer_state.json").replace(final / "trainer_state.json")
            self._rotate(folder)
            return
        with writing(final, self.saved), files.staging(folder) as self.checkpoint_parent:
            try:
                super().save_checkpoint()
            finally:
                place, self.checkpoint_parent = self.checkpoint_parent / final.name, None
            (place / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in
            (place / files.CHECKPOINT_RECORD).write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")
            files.finish(place)
            if final.exists():  # of an earlier process
                files.remove(final)
            place.rename(final)
        self.saved, self._written = final, self.state.global_step
        if rotate:
            self._rotate(folder)

    def _rotate(self, folder: Path) -> None:
        """Drop the checkpoints before the current one that are too many; the best one is kept beside the last."""
        earlier = [
            checkpoint for step, checkpoint in files.own_checkpoints(folder).items() if step < self.state.global_step
        ]
        best = self.best()
        for checkpoint in earlier[: max(len(earlier) + 1 - self.keep, 0)] if self.keep else ():
            if best is None or checkpoint.name != best[0].name:
                with contextlib.suppress(OSError):  # one too many is no reason to stop
                    files.remove(checkpoint)

    def best(self) -> tuple[Path, float] | None:
        """Of the run's checkpoints the one with the lowest held-out loss, and that loss; None where none has any."""
        there = files.own_checkpoints(Path(self.args.output_dir or ""))
        losses = {int(entry["step"]): entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry}
        step = min(losses.keys() & there.keys(), key=lambda step: (losses[step], step), default=None)
        return None if step is None else (there[step], losses[step])

    def rescue(self) -> bool:
        """After an error within a step: save the steps before, unless they are saved; says whether that was done."""
        done = self.state.global_step
        if self.in_step or done <= self.began_at:
            return False
        if self.saved is not None and self.saved.name == f"checkpoint-{done}":
            return False
        self.model.zero_grad()  # type: ignore[union-attr]
        with contextlib.suppress(Exception):  # the first error is the one to be told
            self.save_checkpoint(rotate=False)
            return True
        return False

    def on_state(self, max_steps: int) -> None:
        self.state.compute_steps(self.args, max_steps)  # the intervals asked for now, in place of those of a checkpoint

    def load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Moments and position come from the checkpoint; learning rate and weight decay are those asked for now."""
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        asked = [{name: group[name] for name in ("weight_decay", "initial_lr")} for group in optimizer.param_groups]
        rates = list(scheduler.base_lrs)
        super().load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            for group, options in zip(optimizer.param_groups, asked, strict=True):
                group.update(options)
            scheduler.base_lrs = rates
            set_rates(scheduler)


def check_finite(loss: float, part: str) -> None:
    if not math.isfinite(loss):
        raise RunError(
            f"the loss is {loss} in {part}; a smaller learning_rate, dtype float32 or a look at the data may help"
        )


def warmed_up(factor: Callable[[int], float], warmup: int) -> Callable[[int], float]:
    """The factor of each step (counted from 0): it rises to 1 in warmup + 1 equal parts, the first step has one."""
    return lambda step: (step + 1) / (warmup + 1) if step < warmup else factor(step)
