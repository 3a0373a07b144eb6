"""What we change in TRL's SFTTrainer: how it counts, saves, resumes and reports; not how it trains."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nf4lora.compat.transformers import known_batch
from nf4lora.compat.trl import OpenTrainer, set_rates
from nf4lora.loss.causal_lm import has_plain_head, score
from nf4lora.nn.model_tree import unchanged_random_state
from nf4lora.train import optimizer as optimizers
from nf4lora.train.batch import KNOWN, KnowingCollator, Known
from nf4lora.train.errors import RunError
from nf4lora.train.guard import Guard, arrivals, check_arrivals
from nf4lora.train.reading import Reading, read
from nf4lora.train.run_folder import files
from nf4lora.train.run_folder.output import writing
from nf4lora.train.speed.graphs import BlockGraphs


class Stopped(Exception):
    """The user has stopped the run while it was evaluated before its first step."""


@dataclass
class Batches:
    """What the batches of a step, or of an evaluation, have given so far: tensors that nobody has waited for."""

    losses: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # that are trained
    metrics: list[tuple[str, Tensor]] = field(default_factory=list)  # by name


@dataclass
class Step:
    """An optimizer step whose numbers are on their way to the host."""

    number: int
    epoch: float | None  # before the step
    reading: Reading  # loss since the last log, norm, loss of each batch, metrics, arrivals
    batches: int
    metrics: list[str]
    norms: Tensor  # of each gradient, on the device
    names: list[str]  # of the parameters that they belong to
    trained: list[tuple[str, Tensor]]  # parameters whose gradients are checked: in the first step
    arrivals: list[str]


class Trainer(OpenTrainer):
    """SFTTrainer for rows that are tokenised and labelled already.

    The host reads the numbers of a step once, all together: on a CPU before the optimizer's step, on a GPU where a log,
    a checkpoint or an evaluation follows, else one step later, when the card has long computed them. A step whose loss
    or gradients are not finite changes no weight either way: on a GPU the optimizer leaves it out (`found_inf`).

    Args:
        record: what is written into each checkpoint, for `checkpoints.py` to compare
        keep: how many checkpoints are kept; 0: all of them
        stop: says whether the user has asked to stop
        graphs: of the model's blocks, if they are to be replayed; batches then all have the same number of tokens
    """

    def __init__(
        self,
        *,
        record: dict[str, Any],
        keep: int = 0,
        stop: Callable[[], bool] = lambda: False,
        graphs: BlockGraphs | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        trainer: Any = self
        self.data_collator = KnowingCollator(trainer.data_collator)
        self.graphs = graphs
        if graphs is not None:
            self.data_collator.length = self.args.per_device_train_batch_size * trainer.args.max_length
            self.data_collator.filler = trainer.processing_class.pad_token_id
        # TRL divides by the trained tokens of all accumulated batches for every model; Trainer has to be told so for
        # those whose forward takes no loss arguments.
        self.model_accepts_loss_kwargs = True
        model: Any = self.model
        self.plain_head = not self.aux_loss_enabled and has_plain_head(model.get_base_model(), self.args.device)
        self.record, self.keep, self.stop = record, keep, stop
        self.saved: Path | None = None  # the last checkpoint that was written, or the one gone on from
        self._written = -1  # the step of the last checkpoint that this process has written
        self.step_loss = 0.0  # of the last step whose numbers the host has read
        self.in_step = False  # whether the weights are between two steps' values
        self.began_at = 0  # the step of the checkpoint that the run goes on from
        self._checked = False  # whether the first step's gradients have arrived
        self._batches = Batches()  # of this step
        self._evaluated = Batches()
        self._unread: Step | None = None
        self._shown: tuple[float, float] | None = None  # loss since the last log and norm, of the last step read
        self.add_callback(Guard(self))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The output folder holds what was asked for; no README about TRL."""

    # ---- loss and gradients ------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        known: Known = inputs.pop(KNOWN, None) or Known.of(inputs)
        batches = self._batches if model.training else self._evaluated
        replayed = self.graphs.batch() if self.graphs is not None and model.training else contextlib.nullcontext()
        with replayed, known_batch(inputs["labels"].shape, known.padded, known.packed):
            if self.plain_head and not return_outputs:
                if model.training:
                    self.tokens_seen += known.seen
                result = self._loss(model, inputs, num_items_in_batch, known.positions, batches)
            else:
                result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batches.losses.append((result[0] if return_outputs else result).detach())
        batches.tokens.append(len(known.positions))
        return result

    def _loss(self, model: Any, inputs: dict, num_items_in_batch: Any, positions: Tensor, batches: Batches) -> Tensor:
        """TRL's loss and metrics, over trained tokens only."""
        with self.accelerator.autocast():
            log_p, correct = score(self.accelerator.unwrap_model(model).get_base_model(), inputs, positions)
        tokens = max(len(positions), 1)
        batches.metrics.append(("mean_token_accuracy", correct.sum() / tokens))
        return -log_p.sum() / (tokens if num_items_in_batch is None else num_items_in_batch.clamp(min=1))

    def gradient_norm(self, model: Any) -> Tensor:
        """The norm of all gradients, before anything is changed in them; refuses what is not finite.

        Raises:
            RunError: the loss or a gradient of this step or, on a GPU, of the one before is NaN or infinite; the
                weights are those of the step before that.
        """
        self.read_step()
        norms, names = self.gradient_norms(model)
        norm = torch.linalg.vector_norm(norms)
        batches, self._batches = self._batches, Batches()
        trained = [] if self._checked else [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        arrived = arrivals(trained)
        metrics = [value for _, value in batches.metrics]
        step = self._unread = Step(
            number=self.state.global_step + 1,
            epoch=self.state.epoch,
            reading=Reading([self.summed_loss, norm, *batches.losses, *metrics, *arrived.values()]),
            batches=len(batches.losses),
            metrics=[name for name, _ in batches.metrics],
            norms=norms,
            names=names,
            trained=trained,
            arrivals=list(arrived),
        )
        optimizer = optimizers.unwrapped(self.optimizer)
        bad = None
        if trained or step.reading.has_arrived() or not optimizers.can_leave_out(optimizer):
            self.read_step()
        else:
            bad = torch.stack([norm, *batches.losses]).isfinite().all().logical_not().float()
        optimizers.leave_out(optimizer, bad)
        return norm

    def read_step(self) -> None:
        """Read the numbers of the last step, unless that was done; here a GPU is waited for.

        Raises:
            RunError: the loss or a gradient is not finite; weights and counters are those of the step before.
        """
        step, self._unread = self._unread, None
        if step is None:
            return
        summed, norm, *rest = step.reading.values()
        losses, rest = rest[: step.batches], rest[step.batches :]
        try:
            for loss in losses:
                check_finite(loss, f"step {step.number}")
            if not math.isfinite(norm):
                finite = dict(zip(step.names, step.norms.isfinite().tolist(), strict=True))
                bad = next((name for name, is_finite in finite.items() if not is_finite), "all parameters together")
                raise RunError(
                    f"the gradient of {bad} is not finite in step {step.number}; nothing of this step was kept. "
                    "A smaller learning_rate or dtype float32 may help"
                )
        except RunError:
            if self.state.global_step == step.number:  # the optimizer has left it out
                optimizers.uncount(optimizers.unwrapped(self.optimizer))
                self.step_back(step.epoch)
            raise
        if step.trained:
            check_arrivals(step.trained, dict(zip(step.arrivals, rest[len(step.metrics) :], strict=True)))
            self._checked = True
        self.step_loss, self._shown = sum(losses), (summed, norm)
        for name, value in zip(step.metrics, rest):
            self.metrics["train"][name].append(value)

    def known_at_log(self) -> tuple[float, float] | None:
        self.read_step()
        return self._shown

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for metrics in self.metrics.values():
            if self.plain_head and metrics.get("mean_token_accuracy"):
                metrics["num_tokens"] = [self.tokens_seen]
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
        self._evaluated = Batches()
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        batches, self._evaluated = self._evaluated, Batches()
        values = read([*batches.losses, *(value for _, value in batches.metrics)])
        losses, metrics = values[: len(batches.losses)], values[len(batches.losses) :]
        for loss in losses:
            check_finite(loss, "the evaluation")
        for (name, _), value in zip(batches.metrics, metrics, strict=True):
            self.metrics["eval"][name].append(value)
        total = sum(loss * tokens for loss, tokens in zip(losses, batches.tokens, strict=True))
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(sum(batches.tokens), 1)
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
        self.read_step()  # nothing of a step is saved before its numbers are known to be finite
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
        with contextlib.suppress(Exception):  # the first error is the one to be told
            self.read_step()
        done = self.state.global_step
        if self.in_step or done <= self.began_at:
            return False
        if self.saved is not None and self.saved.name == f"checkpoint-{done}":
            return False
        self.model.zero_grad()  # type: ignore[union-attr]
        with contextlib.suppress(Exception):
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
