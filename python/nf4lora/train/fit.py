"""Training itself: from a model and rows that stand ready to a trained adapter in the output folder."""

from __future__ import annotations

import contextlib
import math
import shlex
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nf4lora.train import banner, optimizer
from nf4lora.train.data import Data, Split
from nf4lora.train.errors import RunError, reason
from nf4lora.train.memory import peak_bytes
from nf4lora.train.model import Base
from nf4lora.train.run_folder import checkpoints
from nf4lora.train.run_folder.output import Output
from nf4lora.train.settings import TrainConfig
from nf4lora.train.stop import StopRequest

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from nf4lora.compat.trl import OneDeviceConfig
    from nf4lora.train.progress import Progress
    from nf4lora.train.speed.graphs import BlockGraphs
    from nf4lora.train.trainer import Trainer

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


@dataclass(frozen=True)
class Setup:
    """What stands ready when training starts."""

    config: TrainConfig
    console: Console
    device: str
    dtype: torch.dtype
    base: Base
    data: Data
    model: Any
    output: Output
    record: dict[str, Any]
    stop: StopRequest


def fit(setup: Setup) -> int:
    """Train, evaluate, save; 0, or 130 where the user stopped it."""
    from nf4lora.train.plot import plot_loss
    from nf4lora.train.reach import check_reach

    config, console, output = setup.config, setup.console, setup.output
    checkpoint = output.checkpoint
    if checkpoint is not None:
        checkpoints.check_base(config, checkpoint, setup.record["base"])
        checkpoints.check_same_tensors(setup.model, checkpoint)
        optimizer.check_state(config, checkpoint)
    with setup.stop, faster(setup) as graphs, memory_told("before the first step"):
        trainer, progress = make_trainer(setup, graphs)
        steps, epochs = plan(trainer)
        finished = checkpoint is not None and checkpoints.step_of(checkpoint) >= steps  # Trainer would take one more
        if not finished:
            check_reach(setup.model, trainer.train_dataset[0]["input_ids"], trainer.accelerator.autocast)
        banner.show_model(console, config, setup.model, setup.dtype)
        banner.show_plan(
            console, config, len(trainer.train_dataset), steps, epochs, trainer.args.get_warmup_steps(steps)
        )
        for line in output.begin(config):
            banner.say(console, "output", line)
        show_resume(setup, finished)
        try:
            stopped, metrics = train_and_evaluate(setup, trainer, finished)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # which hold on to the tensors of the step
            tell_saved(setup, trainer, trainer.rescue())
            with memory_told(f"in step {trainer.state.global_step + 1}"):
                raise
        finally:
            progress.close()
        peak = peak_bytes(setup.device)  # of training; drawing and saving come on top
        state = trainer.state
        if note := output.draw(plot_loss, state.log_history):
            banner.say(console, "note", note)
        if stopped:
            return report_stop(setup, trainer)
        metrics |= {
            "train_tokens": progress.tokens,
            "train_tokens_per_second": round(progress.throughput, 1),
            "peak_memory": peak,
        }
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        for line in optimizer.state_report(trainer.optimizer):
            banner.say(console, "state", line)
        files = output.save(trainer, metrics)
    banner.show_end(console, config, losses, trainer.best(), metrics, files, setup.base)
    return 0


def evaluates(setup: Setup) -> bool:
    return setup.data.eval is not None and setup.config.eval_strategy != "no"


@contextlib.contextmanager
def faster(setup: Setup) -> Iterator[BlockGraphs | None]:
    """The model with what the options for speed change in it; the graphs of its blocks, if it has any.

    Raises:
        RunError: the model is not made for one of them.
    """
    from nf4lora.train.speed.blocks import decoder_blocks
    from nf4lora.train.speed.compiled import compile_blocks
    from nf4lora.train.speed.graphs import BlockGraphs
    from nf4lora.train.speed.liger import liger_kernels
    from nf4lora.train.speed.options import shown

    config, model, graphs = setup.config, setup.model, None
    with contextlib.ExitStack() as stack:
        if config.use_liger_kernel:
            stack.enter_context(liger_kernels(model, setup.data.train.input_ids[0].tolist()))
        if config.torch_compile:
            compile_blocks(model)
        if config.cuda_graphs:
            graphs = BlockGraphs(decoder_blocks(model, "cuda_graphs"))
            stack.callback(graphs.remove)
        if options := shown(config):
            banner.say(setup.console, "faster", options)
        yield graphs
    if graphs is not None and graphs.others:
        banner.say(setup.console, "note", f"cuda_graphs: {graphs.others} calls of blocks were not replayed")


def make_trainer(setup: Setup, graphs: BlockGraphs | None = None) -> tuple[Any, Progress]:
    from transformers.trainer_callback import PrinterCallback

    from nf4lora.train.guard import StopOnRequest
    from nf4lora.train.progress import Progress
    from nf4lora.train.trainer import Trainer

    config, data, checkpoint = setup.config, setup.data, setup.output.checkpoint
    evaluate = evaluates(setup) and (checkpoint is None or checkpoints.lacks_evaluation(config, checkpoint))
    trainer = Trainer(
        model=setup.model,
        args=arguments(config, setup.device, setup.dtype, evaluate),
        train_dataset=dataset(data.train, config),
        eval_dataset=dataset(data.eval, config) if data.eval is not None else None,
        processing_class=setup.base.tokenizer,
        callbacks=[StopOnRequest(setup.stop)],
        record=setup.record,
        keep=config.save_total_limit,
        stop=lambda: setup.stop.requested,
        graphs=graphs,
        **optimizer.keywords(config),
    )
    trainer.saved = checkpoint
    trainer.remove_callback(PrinterCallback)
    progress = Progress(trainer, setup.console, setup.output.folder / "metrics.jsonl", setup.device)
    trainer.add_callback(progress)
    if config.packing:
        check_packing(trainer)
    return trainer, progress


def train_and_evaluate(setup: Setup, trainer: Trainer, finished: bool) -> tuple[bool, dict[str, Any]]:
    """Train and evaluate; -> whether the user stopped it, and Trainer's metrics."""
    from nf4lora.train.trainer import Stopped

    checkpoint = setup.output.checkpoint
    if finished and checkpoint is not None:
        restore(trainer, checkpoint)
        metrics = {"train_runtime": 0.0}
    else:
        try:
            metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
        except Stopped:
            return True, {}
    state = trainer.state
    stopped = setup.stop.requested and state.global_step < state.max_steps
    evaluated = any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
    if evaluates(setup) and not stopped and not evaluated and not setup.stop.requested:
        trainer.evaluate()
    return stopped, metrics


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Weights and history of a checkpoint, for a run that has nothing left to train."""
    from transformers import TrainerState

    trainer.load_weights(checkpoint)
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def show_resume(setup: Setup, finished: bool) -> None:
    config, checkpoint = setup.config, setup.output.checkpoint
    if config.resume_from_checkpoint:
        text = "no checkpoint yet: starting from the beginning"
        if checkpoint is not None:
            text = f"going on from {checkpoint}{checkpoints.changes(config, checkpoint)}"
        banner.say(setup.console, "resume", text)
    if finished and checkpoint is not None:
        banner.say(setup.console, "resume", "nothing is left to train")


def tell_saved(setup: Setup, trainer: Trainer, rescued: bool) -> None:
    """After an error: from where the run can go on."""
    if trainer.saved is not None and (rescued or trainer.saved != setup.output.checkpoint):
        banner.say(setup.console, "saved", f"{trainer.saved}; go on with:\n    {command(setup)}")


def command(setup: Setup) -> str:
    return f"nf4lora train {shlex.quote(str(setup.output.folder / 'config.yaml'))} --resume_from_checkpoint"


@contextlib.contextmanager
def memory_told(when: str) -> Iterator[None]:
    """Say in one sentence that memory was too small, and what needs less.

    Raises:
        RunError: in place of what the device, the system or Python raised.
    """
    import torch

    words = ("out of memory", "can't allocate memory", "not enough memory")
    try:
        yield
    except Exception as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not (
            isinstance(error, RuntimeError) and any(word in str(error) for word in words)
        ):
            raise
        raise RunError(
            f"out of memory {when} ({reason(error)}); a smaller per_device_train_batch_size with more "
            "gradient_accumulation_steps, a smaller max_length, or gradient_checkpointing true needs less"
        ) from error


def report_stop(setup: Setup, trainer: Trainer) -> int:
    state = trainer.state
    if state.global_step and trainer.saved is not None:
        done = f"stopped after step {state.global_step} of {state.max_steps}"
        banner.tell(setup.console, f"{done}; {trainer.saved} is saved. Go on with:\n    {command(setup)}")
    else:
        banner.tell(setup.console, "stopped before the first step; nothing was saved")
    return INTERRUPTED


def arguments(config: TrainConfig, device: str, dtype: torch.dtype, evaluate: bool) -> OneDeviceConfig:
    """The options as TRL's SFTConfig."""
    import torch

    from nf4lora.compat.trl import OneDeviceConfig, recomputation

    options: dict[str, Any] = {name: getattr(config, name) for name in (
        "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
        "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm",
        "seed", "save_strategy", "save_steps", "logging_steps", "eval_steps", "report_to", "max_length", "packing",
    )}  # fmt: skip
    return OneDeviceConfig(
        **options,
        max_steps=config.max_steps or -1,
        data_seed=config.seed,
        eval_strategy=config.eval_strategy or "no",
        full_determinism=config.deterministic,
        optim="adamw_torch_fused",  # unless optimizer.keywords names another
        **recomputation(config.gradient_checkpointing),
        eval_on_start=evaluate,
        bf16=dtype is torch.bfloat16 and needs_autocast(config),
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        accelerator_config={"non_blocking": device == "cuda"},  # else each tensor of a batch waits for the card
        dataset_kwargs={"skip_prepare_dataset": True},  # tokenised and labelled already
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would replace a loss that is not finite by an average; we stop instead
        disable_tqdm=True,
        log_level="error",
    )


def needs_autocast(config: TrainConfig) -> bool:
    """Whether float32 parameters meet 16-bit activations outside our layers, which take both."""
    return bool(not config.load_in_4bit or config.use_dora or config.modules_to_save)


def dataset(split: Split, config: TrainConfig) -> Dataset:
    rows = split.dataset()
    if config.packing:
        from trl import pack_dataset

        rows = pack_dataset(rows, config.max_length, strategy="bfd")  # whole samples only: all are cut to max_length
    return rows


def plan(trainer: Trainer) -> tuple[int, float]:
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

    from nf4lora.nn.model_tree import evaluating
    from nf4lora.train.batch import KNOWN

    model, scores = trainer.model, []
    size = model.config.get_text_config().vocab_size
    for step in (7, 11):  # another first sample, the same second one
        ids = [(3 + step * i) % size for i in range(12)] + [(5 + 13 * i) % size for i in range(9)]
        batch = trainer.data_collator([{"input_ids": ids, "labels": ids, "seq_lengths": [12, 9]}])
        batch = {name: tensor for name, tensor in trainer.on_device(batch).items() if name not in ("labels", KNOWN)}
        with evaluating(model), torch.no_grad():
            scores.append(model(**batch, use_cache=False).logits[0, 12:].float())
    if (scores[0] - scores[1]).abs().max() > 1e-3 * scores[0].std():
        raise RunError("packing: the attention of this model mixes the samples of a row; use packing false")
