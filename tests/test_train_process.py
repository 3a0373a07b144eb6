"""A run changes nothing in the process that it is called in: what runs, sets or logs there later is as it was."""
# ruff: noqa: F811  (a package may be missing; fixtures are imported)

import ast
import csv
import io
import locale
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("trl")

import datasets
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled
from rich.console import Console

import nf4lora
from nf4lora.cli.main import main
from nf4lora.train.arguments.parse import parse_arguments
from nf4lora.train.errors import RunError
from nf4lora.train.run import train
from nf4lora.train.stop import StopRequest
from nf4lora.train.trainer import Trainer

from support.train_runs import base, data, options, quick  # noqa: F401

LOGGERS = ("", "nf4lora", "transformers", "datasets", "trl", "peft", "accelerate", "bitsandbytes", "huggingface_hub")


def logger_state(name):
    logger = logging.getLogger(name)
    return logger.level, logger.disabled, logger.propagate, list(logger.handlers), list(logger.filters)


def process():
    """What a process has one of, and could be changed for everybody."""
    return {
        "warnings": list(warnings.filters),
        "how a warning is shown": warnings.showwarning,
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "locale": locale.setlocale(locale.LC_ALL),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "hooks": (sys.excepthook, sys.displayhook, sys.settrace and sys.gettrace()),
        "csv": csv.field_size_limit(),
        "loggers": {name: logger_state(name) for name in LOGGERS},
        "logging": logging.root.manager.disable,
        "verbosity of transformers": transformers.utils.logging.get_verbosity(),
        "bars of transformers": transformers.utils.logging.is_progress_bar_enabled(),
        "verbosity of datasets": datasets.logging.get_verbosity(),
        "bars of datasets": datasets.are_progress_bars_disabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
    }


def run(base, data, folder, *more):
    return train(parse_arguments(options(base, data, folder, "--max_steps", "2", *more)), Console(file=io.StringIO()))


def test_a_run_is_silent_of_names_that_others_have_replaced(base, data, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run(base, data, tmp_path / "out") == 0
    assert [str(warning.message) for warning in caught if issubclass(warning.category, FutureWarning)] == []


def test_the_command_shows_the_bars_of_a_download(base, tmp_path, monkeypatch):
    shown = []

    def read_hub(*_):
        shown.append((not datasets.are_progress_bars_disabled(), not are_progress_bars_disabled()))
        raise RunError("no network")

    monkeypatch.setattr("nf4lora.train.data.read_hub", read_hub)
    assert main(["train", "--model", str(base), "--data", "someone/data", "--output_dir", str(tmp_path / "out")]) == 1
    assert shown == [(True, True)]
    assert datasets.are_progress_bars_disabled()  # for what follows in a process of the command's own


def test_the_command_refuses_several_processes_before_it_looks_for_a_card(base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", *options(base, data, tmp_path / "out"), "--device", "cuda"]) == 2
    assert "runs in one process for now" in capsys.readouterr().err


@pytest.fixture
def table(tmp_path):
    """Rows in a csv file, whose reader has a limit that is one for the whole process."""
    path = tmp_path / "train.csv"
    path.write_text("prompt,completion\n" + "Say one,one\n" * 24)
    return str(path)


@pytest.mark.parametrize("more", [(), ("--deterministic", "true"), ("--packing", "true", "--dtype", "bfloat16")])
def test_a_run_leaves_the_process_as_it_was_and_so_does_the_next(base, table, tmp_path, more):
    before = process()
    for name in ("first", "second"):
        assert run(base, table, tmp_path / name, "--val_size", "4", *more) == 0
        after = process()
        assert {what for what in before if after[what] != before[what]} == set()


def test_a_run_that_fails_leaves_the_process_as_it_was(base, table, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RunError("in the middle of it")

    monkeypatch.setattr(Trainer, "training_step", fails)
    before = process()
    with pytest.raises(RunError):
        run(base, table, tmp_path / "out", "--deterministic", "true")
    after = process()
    assert {what for what in before if after[what] != before[what]} == set()


def test_a_script_asks_for_the_end_of_a_run(base, data, tmp_path, monkeypatch):
    stop, step = StopRequest(), Trainer.training_step

    def asked(self, *args, **kwargs):
        stop.requested = True
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", asked)
    said = io.StringIO()
    assert train(parse_arguments(options(base, data, tmp_path / "out")), Console(file=said, width=200), stop) == 130
    assert "stopped after step 1 of 6" in said.getvalue()
    assert (tmp_path / "out/checkpoint-1").is_dir()


# ---- nothing but the command line changes it -------------------------------------------------------------------------

PACKAGE = Path(nf4lora.__file__).parent
CHANGES = {
    "signal.signal", "os.putenv", "os.unsetenv", "os.chdir", "os.umask", "os.nice", "csv.field_size_limit", "setlocale",
    "filterwarnings", "simplefilter", "resetwarnings", "captureWarnings",
    "setLevel", "addHandler", "removeHandler", "basicConfig", "logging.disable", "set_verbosity",
    "set_verbosity_error", "set_verbosity_warning", "set_verbosity_info", "disable_progress_bar",
    "disable_progress_bars", "enable_progress_bar", "enable_progress_bars", "disable_caching",
    "set_default_dtype", "set_default_device", "set_default_tensor_type", "set_num_threads", "set_num_interop_threads",
    "use_deterministic_algorithms", "set_float32_matmul_precision", "set_grad_enabled",
    "setrecursionlimit", "setrlimit",
}  # fmt: skip
WITHIN = ("warnings.catch_warnings",)  # contexts that undo what is done in them
ALLOWED = {  # files that put back what they found, and the one that gives our own logger a handler
    "train/process.py", "train/samples/rows.py", "memory/onednn.py", "preparation/prepare.py",
}  # fmt: skip


def changes(node):
    """Calls and assignments below a node that change the whole process, but for those in a context that undoes them."""
    if isinstance(node, ast.With) and any(ast.unparse(item.context_expr).startswith(WITHIN) for item in node.items):
        return
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if any(name == change or name.endswith(f".{change}") for change in CHANGES):
            yield name
        elif name in [f"os.environ.{verb}" for verb in ("update", "pop", "setdefault", "clear", "popitem")]:
            yield name
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    for target in targets if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete) else ():
        for part in target.elts if isinstance(target, ast.Tuple) else (target,):
            name = ast.unparse(part)
            if name.startswith(("os.environ[", "sys.std", "warnings.", "torch.backends.", "sys.excepthook")):
                yield name
    for child in ast.iter_child_nodes(node):
        yield from changes(child)


def test_nothing_outside_the_command_line_changes_the_process():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(("cli/", "bench/")) and (there := sorted(set(changes(ast.parse(path.read_text()))))):
            found[name] = there
    assert {name: there for name, there in found.items() if name not in ALLOWED} == {}
    assert ALLOWED <= set(found), "of these some change nothing any more"


@pytest.mark.parametrize(
    "code",
    [
        "os.environ['A'] = '1'", "del os.environ['A']", "os.environ.setdefault('A', '1')", "signal.signal(2, f)",
        "logging.getLogger('a').setLevel(10)", "warnings.filterwarnings('ignore')", "sys.stdout, a = b, c",
        "transformers.utils.logging.set_verbosity_error()", "torch.backends.cudnn.benchmark = True",
        "with open('a'):\n    csv.field_size_limit(1)",
    ],
)  # fmt: skip
def test_a_change_of_the_process_is_seen(code):
    assert list(changes(ast.parse(code)))


def test_a_change_that_is_undone_is_none():
    assert not list(changes(ast.parse("with warnings.catch_warnings():\n    warnings.simplefilter('ignore')")))
