"""What can end a run before its time, and what is left then: signals, readers that go away, full disks and memories."""
# ruff: noqa: F811  (a package may be missing; fixtures are imported)

import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("trl")

from nf4lora import cli
from nf4lora.train import output
from nf4lora.train.trainer import Trainer

from train_runs import base, data, options, quick, train  # noqa: F401


def test_second_interrupt_ends_at_once(base, data, tmp_path, monkeypatch, capsys):
    def twice(self, *args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "training_step", twice)
    assert cli.main(["train", *options(base, data, tmp_path / "out")]) == 130
    assert "interrupted at once" in capsys.readouterr().err


@pytest.mark.slow
def test_process_stops_on_sigterm_with_130(base, data, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "nf4lora",
        "train",
        *options(base, data, out, "--max_steps", "5000", "--logging_steps", "1"),
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("step 2/"):
                process.send_signal(signal.SIGTERM)
                break
        said += process.stdout.read()
        assert process.wait() == 130, said
    assert "once more to stop at once" in said
    assert "Go on with" in said
    assert len(output.checkpoints(out)) == 1
