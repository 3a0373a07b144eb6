"""How often `nf4lora train` waits for a card, counted on one that computes nothing (bench/harness/card).

Results there are memory that nobody wrote, so the run is not shown them: the numbers of a step are read as zeros after
they were waited for, and the checks that look at values are left out.
"""

import contextlib
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("trl")
import torch

from bench.harness.card import counting

from support.models import tiny_llama, tiny_tokenizer
from support.train_runs import data_file, options, train

pytestmark = pytest.mark.slow  # a process of its own, which loads torch for CUDA

ACCUMULATED, STEPS = 4, 5
ROWS = {"padded": (), "packed": ("--packing", "--max_length", "64")}


class Parts:
    """Counts of one part of a run after the other: (step, whether it is a batch, what is counted)."""

    def __init__(self):
        self.all = []
        self.counting = contextlib.ExitStack()

    def turn(self, step, is_batch):
        """What follows is a part of its own."""
        self.counting.close()
        self.all.append((step, is_batch, self.counting.enter_context(counting())))

    @contextlib.contextmanager
    def batch(self, step):
        self.turn(step, True)
        try:
            yield
        finally:
            self.turn(step, False)


def run(rows, more, logging, blocks=1):
    """[step, whether it is a batch, synchronisations, cudaMallocs, launches that were not captured, those that were,
    replays of graphs] of each part of a run."""
    from nf4lora import _C
    from nf4lora.train import fit, model, trainer
    from nf4lora.train.reading import Reading

    parts, step, values = Parts(), trainer.Trainer.training_step, Reading.values

    def counted(self, *arguments, **keywords):
        with parts.batch(self.state.global_step + 1):
            return step(self, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(_C, "CUDA_VERSION", torch.version.cuda)  # the ops for the card are loaded beside it
        patch.setattr(trainer.Trainer, "training_step", counted)
        patch.setattr(Reading, "has_arrived", lambda self: False)  # a card that computes has not finished so soon
        patch.setattr(Reading, "values", lambda self: [0.0 for _ in values(self)])
        patch.setattr(trainer, "has_plain_head", lambda base, device: True)
        patch.setattr(trainer, "check_arrivals", lambda trained, arrived: None)
        patch.setattr(fit, "check_packing", lambda trainer: None)
        patch.setattr("nf4lora.train.reach.check_reach", lambda *arguments: None)
        load = model.load_model  # weights are quantised where something is computed
        patch.setattr(
            model, "load_model", lambda config, base, device, dtype: load(config, base, "cpu", dtype).to(device)
        )
        patch.setattr("nf4lora.train.plot.plot_loss", lambda *arguments: False)
        base = str(Path(folder) / "base")
        llama = tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=blocks)
        llama.to(torch.bfloat16).save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        with parts.counting:
            train(*options(base, data_file(Path(folder)), Path(folder) / "out", "--device", "cuda", "--dtype",
                           "bfloat16", "--max_steps", str(STEPS), "--gradient_accumulation_steps", str(ACCUMULATED),
                           "--per_device_train_batch_size", "1", "--optim", "adamw", "--logging_steps", str(logging),
                           *ROWS[rows], *more))  # fmt: skip
    return [
        (number, is_batch, c.synchronisations, c.mallocs, c.launches - c.captured, c.captured, c.replays)
        for number, is_batch, c in parts.all
    ]


@pytest.mark.parametrize(
    ("rows", "more", "logging"),
    [
        ("padded", ("--gradient_checkpointing", "true"), 1),
        ("packed", ("--gradient_checkpointing", "false", "--lora_dropout", "0.1"), 3),
    ],
)
def test_the_numbers_of_a_step_are_waited_for_once_and_its_batches_never(card, rows, more, logging):
    parts = card.ask(run, rows=rows, more=more, logging=logging)
    batches = [part for part in parts if part[1]]
    assert [step for step, *_ in batches] == [step for step in range(1, STEPS + 1) for _ in range(ACCUMULATED)]
    assert all(waits == 0 and launches > 100 for _, _, waits, _, launches, *_ in batches)
    waits = [sum(part[2] for part in parts if part[0] == step) for step in range(1, STEPS)]  # the last one is saved
    # The first step is always logged. Between two logs the numbers of a step are read in the next one.
    assert waits == {1: [1, 1, 1, 1], 3: [1, 0, 2, 0]}[logging]
    assert sum(mallocs for step, _, _, mallocs, *_ in parts if 2 < step < STEPS) == 0


GRAPHS = ("--gradient_checkpointing", "false", "--cuda_graphs")


@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_blocks_are_captured_once_and_replayed_from_then_on(card, dropout):
    launches = {}
    for blocks in (1, 3):
        parts = card.ask(run, rows="packed", more=(*GRAPHS, "--lora_dropout", dropout), logging=3, blocks=blocks)
        first, second, *others = [part for part in parts if part[1]]
        *_, first_launches, captured, replays = first
        assert (captured, replays) == (0, 0)
        assert second[5] > 50 * blocks  # captured
        assert all(part[2:4] == [0, 0] and part[5:] == [0, 2 * blocks] for part in others)  # waits and mallocs
        launches[blocks] = {part[4] for part in others}
        assert max(launches[blocks]) < first_launches - 50 * blocks
    # What is launched is of embedding, mask, head and loss. Of a block it is the zeros for the sums of its gradients,
    # in the first batch of a step, and with dropout two numbers that tell a graph where its random ones begin.
    of_a_block = 0 if dropout == "0" else 2
    assert min(launches[3]) == min(launches[1]) + 2 * of_a_block
    assert max(launches[3]) == max(launches[1]) + 2 * (of_a_block + 1)
