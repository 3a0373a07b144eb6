"""The run: settings, data, model, trainer, files. Errors come early, and each says what to do.

Each stage returns a value, and none changes what an earlier one returned.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from nf4lora.train import banner, optimizer
from nf4lora.train import data as reading
from nf4lora.train import device as devices
from nf4lora.train import model as loading
from nf4lora.train.chat.clock import Clock
from nf4lora.train.data import Data
from nf4lora.train.device import Device, check_one_process, choose_device
from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.fit import Setup, fit
from nf4lora.train.model import Base
from nf4lora.train.process import unchanged_process
from nf4lora.train.run_folder import checkpoints
from nf4lora.train.run_folder.output import Output
from nf4lora.train.settings import TrainConfig, on_machine, within_positions, without_evaluation
from nf4lora.train.speed import options as speed
from nf4lora.train.stop import StopRequest
from nf4lora.words import dtype_name

Context = Callable[[], AbstractContextManager]


def train(
    config: TrainConfig,
    console: Console | None = None,
    stop: StopRequest | None = None,
    device: Device | None = None,
    downloading: Context = nullcontext,
) -> int:
    """Fine-tune as the options say; returns the exit code: 0 done, 130 stopped by request.

    Nothing in the process is changed but torch's random state, which is seeded: a script and a notebook find warnings,
    logging, environment and signal handlers as they were. What `nf4lora train` does beyond this for a process of its
    own stands in cli/train.py.

    Args:
        config: from `arguments.parse.parse_arguments`
        console: what the run says is printed here; default: standard output
        stop: how somebody asks for an early end, with a checkpoint; default: nobody does
        device: in place of the one that config.device means
        downloading: a context for reading the rows, which may come from the Hub

    Raises:
        UsageError, RunError: with the text to print.
    """
    with unchanged_process(), ExitStack() as stack:
        return _train(config, console or Console(), stop or StopRequest(), device, downloading, stack)


def _train(
    config: TrainConfig,
    console: Console,
    stop: StopRequest,
    device: Device | None,
    downloading: Context,
    stack: ExitStack,
) -> int:
    with banner.working(console, "loading torch and transformers"):
        import transformers

        check_one_process()
        device = device or choose_device(config.device)
    stack.enter_context(device.current())
    dtype = devices.choose_dtype(config.dtype, device.kind)
    config = on_machine(config, optimizer.choose(config, device.kind), dtype_name(dtype))
    config, notes = speed.for_machine(config, device.kind, dtype)
    output = Output(config, stack)

    config, base, data, clock = read_inputs(config, output.checkpoint, console, downloading)
    data = replace(data, notes=[*notes, *data.notes])
    identity = checkpoints.data_identity(data.train, config)
    banner.show_machine(console, device)
    banner.show_data(console, data)
    if config.dry_run or data.choice:
        banner.show_sample(console, reading.show(data.train, base.tokenizer))
    if output.checkpoint is not None:
        checkpoints.check_data(config, output.checkpoint, identity)
    if config.dry_run:
        banner.say(console, "dry run", "nothing was trained and nothing was written")
        return 0

    transformers.set_seed(config.seed)  # lora_A is drawn now; SFTTrainer seeds again, for what follows
    with banner.working(console, "loading the model"):
        model = loading.load_model(config, base, device.kind, dtype)
        check_tokens(data, base, model.get_input_embeddings().num_embeddings)
        model, remarks = loading.add_adapters(config, model, data.train.input_ids[0])
    for line in remarks:
        banner.say(console, "prepare", line)
    record = checkpoints.record(config, identity, checkpoints.base_identity(model), clock)
    return fit(Setup(config, console, device.kind, dtype, base, data, model, output, record, stop))


class Inputs(NamedTuple):
    """What a run trains on, and its settings as the base and the data leave them."""

    config: TrainConfig
    base: Base
    data: Data
    clock: Clock


def read_inputs(config: TrainConfig, checkpoint: Path | None, console: Console, downloading: Context) -> Inputs:
    """The rows as tokens and labels of the base model, with everything that is to be said about them.

    Args:
        checkpoint: the one that the run goes on from, whose date the chat template is shown
    """
    with banner.working(console, "reading the data") as status:
        with downloading():
            rows, held_out, notes = reading.read(config)
        check_reports(config)
        base = loading.read_base(config)
        config, unknown = speed.for_model(config, base.config.model_type)
        config, shortened = within_positions(config, base.positions)
        clock = Clock() if checkpoint is None else checkpoints.clock_of(checkpoint)
        with clock.shown():
            data = reading.prepare_data(
                config, base.tokenizer, (rows, held_out), base.stops, banner.count(console, status)
            )
    notes = [*notes, base.note, shortened, data.choice, clock.note, *unknown, *data.notes]
    if data.eval is None:
        config = without_evaluation(config)
    elif config.eval_strategy == "no":
        notes.append("the held-out rows are not evaluated: eval_strategy no")
    check_tokens(data, base, base.vocabulary)
    return Inputs(config, base, replace(data, notes=[note for note in notes if note]), clock)


def check_reports(config: TrainConfig) -> None:
    for name in config.report_to:
        if find_spec(name) is None:
            raise UsageError(f"report_to {name} needs the package {name}: pip install {name}")


def check_tokens(data: Data, base: Base, size: int | None) -> None:
    """Every token must have a row in the model's embedding.

    Raises:
        RunError: naming the row of the data and the token.
    """
    for split in (data.train, data.eval):
        if split is None or size is None:
            continue
        dropped = set(split.dropped)
        kept = [index for index in range(len(split.table.rows)) if index not in dropped]
        for position, ids in enumerate(split.input_ids):
            if ids.max() >= size:
                token = int(ids.max())
                where = split.table.where(kept[position]) if len(kept) == len(split.input_ids) else split.table.name
                raise RunError(
                    f"{where}: token {token} ({base.tokenizer.convert_ids_to_tokens(token)!r}) has no place in the "
                    f"model, whose embedding has {size} rows; the tokenizer belongs to another model, or tokens were "
                    "added to it without resize_token_embeddings"
                )
