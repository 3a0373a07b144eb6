"""What a run says while something takes long, also where there is no terminal to rewrite a line on."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from nf4lora.train import banner, progress


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def lines(console):
    return console.file.getvalue().splitlines()


def test_long_steps_and_evaluations_are_told_between_the_logs(console, clock, tmp_path):
    trainer = SimpleNamespace(_total_train_tokens=0, step_loss=1.5)
    shown = progress.Progress(trainer, console, tmp_path / "metrics.jsonl", "cpu")
    state = SimpleNamespace(global_step=0, max_steps=9, log_history=[])
    scheduler = SimpleNamespace(get_last_lr=lambda: [1e-3])
    shown.on_train_begin(None, state, None)
    for state.global_step in range(1, 5):
        shown.on_step_begin(None, state, None, lr_scheduler=scheduler)
        clock.seconds += 0.4 * progress.PAUSE
        shown.on_step_end(None, state, None)
    assert [line.split(" |")[0] for line in lines(console)] == ["step 3/9 33%"]  # of 0.4, 0.8, 1.2 and 1.6 pauses
    clock.seconds += 4.0
    shown.on_prediction_step(None, state, None, eval_dataloader=range(3))
    assert lines(console)[1].startswith("step 4/9 44%")
    assert lines(console)[1].endswith("| evaluating 1/3")


def test_what_takes_a_while_is_said_without_a_terminal(console):
    with banner.working(console, "loading the model"):
        assert lines(console) == ["now      loading the model"]
    assert len(lines(console)) == 1
