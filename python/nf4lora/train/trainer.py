"""What we change in TRL's SFTTrainer: nothing in how it trains, a few things in how it counts, saves and reports."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTTrainer

from nf4lora.loss import has_plain_head, score
from nf4lora.train.errors import RunError
from nf4lora.train.interrupt import Interrupt


class Trainer(SFTTrainer):
    """SFTTrainer for rows that are tokenised and labelled already."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # TRL divides by the trained tokens of all accumulated batches for every model; Trainer has to be told so for
        # those whose forward takes no loss arguments.
        self.model_accepts_loss_kwargs = True
        model: Any = self.model
        self.plain_head = not self.aux_loss_enabled and has_plain_head(model.get_base_model(), self.args.device)
        self.step_loss = 0.0  # of the running optimizer step, complete at its end
        self._eval_loss, self._eval_tokens = 0.0, 0
        self.add_callback(Guard(self))

    def _send_telemetry(self) -> None:
        """TRL reports each run to huggingface.co; this does not."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The output folder holds what was asked for; no README about TRL."""

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        tokens = int(inputs["labels"][..., 1:].ne(-100).sum())
        if self.plain_head and not return_outputs:
            result = self._loss(model, inputs, num_items_in_batch, tokens)
        else:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = (result[0] if return_outputs else result).detach().item()
        if loss != loss or abs(loss) == float("inf"):
            part = f"step {self.state.global_step + 1}" if model.training else "the evaluation"
            raise RunError(
                f"the loss is {loss} in {part}; a smaller learning_rate, dtype float32 or a look at the data may help"
            )
        if model.training:
            self.step_loss += loss
        else:
            self._eval_loss += loss * tokens
            self._eval_tokens += tokens
        return result

    def _loss(self, model: Any, inputs: dict, num_items_in_batch: Any, tokens: int) -> Tensor:
        """TRL's loss and metrics, over trained tokens only."""
        with self.accelerator.autocast():
            log_p, correct = score(self.accelerator.unwrap_model(model).get_base_model(), inputs)
        mode = "train" if model.training else "eval"
        if mode == "train":
            seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            self._total_train_tokens += int(seen)
        self._metrics[mode]["mean_token_accuracy"].append(correct.sum().item() / max(tokens, 1))
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return -log_p.sum() / (max(tokens, 1) if num_items_in_batch is None else num_items_in_batch.clamp(min=1))

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The mean over all trained tokens, where Trainer takes the mean of the batches' means."""
        self._eval_loss, self._eval_tokens = 0.0, 0
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        output.metrics[f"{metric_key_prefix}_loss"] = self._eval_loss / max(self._eval_tokens, 1)
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with unchanged_random_state():
            return super().evaluate(*args, **kwargs)


@contextlib.contextmanager
def unchanged_random_state() -> Iterator[None]:
    """A data loader draws a seed when it starts: without this, evaluating would change the dropout masks that follow,
    and a run resumed behind an evaluation would differ from one that went through it."""
    state = random.getstate()
    with torch.random.fork_rng():
        yield
    random.setstate(state)


class Guard(TrainerCallback):
    """Refuses to step on gradients that are missing or not finite; resumes the token count; logs what it saves."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.checked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        counted = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self.trainer._total_train_tokens = counted[-1] if counted else 0  # TRL starts again from 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.step_loss = 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trainable = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        grads = [each.grad for _, each in trainable if each.grad is not None]
        if not self.checked:
            self.checked = True
            check_gradients(trainable)
        norm = torch.nn.utils.get_total_norm(grads)
        if not torch.isfinite(norm):
            bad = next(name for name, each in trainable if each.grad is not None and not each.grad.isfinite().all())
            raise RunError(
                f"the gradient of {bad} is not finite in step {state.global_step + 1}; nothing of this step was kept. "
                "A smaller learning_rate or dtype float32 may help"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A checkpoint forgets the losses since the last log: logging first makes the log of a resumed run the same.
        control.should_log = control.should_log or control.should_save


def check_gradients(trainable: list[tuple[str, Tensor]]) -> None:
    """Every adapter tensor must have a gradient after the first step, else it would silently never be trained.

    lora_A's is zero as long as B is; experts that no token was sent to have none.
    """
    dead = [name for name, each in trainable if each.grad is None or ("lora_B" in name and not each.grad.any())]
    dead = [name for name in dead if "expert" not in name]
    if dead:
        shown = ", ".join(dead[:3]) + (f" and {len(dead) - 3} more" if len(dead) > 3 else "")
        raise RunError(
            f"no gradient reaches {shown}: these would never be trained; take them out of lora_target_modules"
        )


class StopOnInterrupt(TrainerCallback):
    """Turns a requested interruption into a checkpoint and an end."""

    def __init__(self, interrupt: Interrupt) -> None:
        self.interrupt = interrupt

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupt.requested:
            control.should_save = control.should_log = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupt.requested:  # Trainer takes breaking off for the end of the epoch
            control.should_save = control.should_evaluate = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupt.requested and state.global_step:
            control.should_save = control.should_training_stop = True
