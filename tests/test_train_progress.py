"""What a run says while something takes long, also where there is no terminal to rewrite a line on."""

import ast
import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from nf4lora.train import banner, fit, progress


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
    trainer = SimpleNamespace(tokens_seen=0, step_loss=1.5)
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


def test_brackets_in_what_is_told_are_no_instructions():
    terminal = Console(file=io.StringIO(), width=200, force_terminal=True)
    with banner.working(terminal, "loading [bold]model") as status:
        assert status.status.plain == "loading [bold]model"
        banner.count(terminal, status)("tokenising [bold]rows.jsonl")
    assert "tokenising [bold]rows.jsonl" in terminal.file.getvalue()


def test_the_command_to_go_on_with_keeps_the_brackets_of_a_path(console):
    state, saved = SimpleNamespace(global_step=2, max_steps=9), "outputs/[exp]/checkpoint-2"
    setup = SimpleNamespace(console=console, output=SimpleNamespace(folder=Path("outputs/[exp]")))
    fit.report_stop(setup, SimpleNamespace(state=state, saved=saved))
    assert lines(console) == [
        f"stopped after step 2 of 9; {saved} is saved. Go on with:",
        "    nf4lora train 'outputs/[exp]/config.yaml' --resume_from_checkpoint",
    ]


def test_no_text_of_a_run_is_read_as_markup():
    """rich reads a plain str as markup; a Text is printed as it is."""
    folder = Path(banner.__file__).parent
    for path in folder.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            name = getattr(getattr(call, "func", None), "attr", "")
            if isinstance(call, ast.Call) and name in ("print", "status") and "console" in ast.unparse(call.func):
                assert ast.unparse(call.args[0]).startswith(("Text(", "text")), f"{path.name}: {ast.unparse(call)}"
