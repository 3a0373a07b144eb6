"""What can end a run before its time, and what is left then: signals, readers that go away, full disks and memories."""
# ruff: noqa: F811  (a package may be missing; fixtures are imported)

import contextlib
import errno
import fcntl
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("trl")

import torch
from safetensors import SafetensorError

from nf4lora.cli import main, streams
from nf4lora.cli import train as running
from nf4lora.cli.interrupt import ONE_EVENT, Interrupt
from nf4lora.train.arguments.parse import parse_arguments
from nf4lora.train.errors import RunError
from nf4lora.train.run_folder import output
from nf4lora.train.trainer import Trainer

from support.train_runs import base, data, logged, options, quick, train  # noqa: F401


def test_second_interrupt_ends_at_once(base, data, tmp_path, monkeypatch, capsys):
    def twice(self, *args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(ONE_EVENT + 0.05)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "training_step", twice)
    assert main.main(["train", *options(base, data, tmp_path / "out")]) == 130
    assert "interrupted at once" in capsys.readouterr().err


def test_signals_of_one_event_are_one_request(base, data, tmp_path, monkeypatch, capfd):
    def all_at_once():  # `timeout` signals its child and then the group; a job manager every process of a job
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)

    stopped_by(monkeypatch, all_at_once)
    code, said = train(*options(base, data, tmp_path / "out"))
    assert code == 130
    assert "checkpoint-2 is saved" in said
    assert capfd.readouterr().err.count("once more to stop at once") == 1


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


def stopped_by(monkeypatch, action, at=3):
    """Let `action` happen in a batch: by default the first of step 2."""
    step, batches = Trainer.training_step, itertools.count(1)

    def acts(self, *args, **kwargs):
        if next(batches) == at:
            action()
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", acts)


def test_hangups_save_a_checkpoint_however_many_come(base, data, tmp_path, monkeypatch):
    def hang_up():  # the kernel tells the shell, the shell tells its jobs, and then asks them to end
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            signal.raise_signal(number)

    stopped_by(monkeypatch, hang_up)
    code, said = train(*options(base, data, tmp_path / "out"))
    assert code == 130
    assert "checkpoint-2 is saved" in said
    assert output.checkpoints(tmp_path / "out")[-1].name == "checkpoint-2"


def test_nohup_goes_on_to_the_end(base, data, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stopped_by(monkeypatch, lambda: signal.raise_signal(signal.SIGHUP))
        code, _ = train(*options(base, data, tmp_path / "out", "--max_steps", "2"))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert code == 0


@pytest.mark.parametrize("moment", ["before the first step", "between steps", "after the last step"])
def test_an_evaluation_is_broken_off_and_no_step_is_lost(base, data, tmp_path, monkeypatch, moment):
    predict, calls = Trainer.prediction_step, itertools.count(1)
    wanted = {"before the first step": 1, "between steps": 5, "after the last step": 9}[moment]

    def acts(self, *args, **kwargs):
        call = next(calls)
        if call == wanted:
            signal.raise_signal(signal.SIGINT)
        assert call <= wanted
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "prediction_step", acts)
    out = tmp_path / "out"
    code, said = train(*options(base, data, out, "--val_size", "8", "--eval_steps", "1", "--max_steps", "2"))
    if moment == "before the first step":
        assert code == 130
        assert "stopped before the first step; nothing was saved" in said
    elif moment == "between steps":
        assert code == 130
        assert "stopped after step 1 of 2" in said
        assert output.checkpoints(out)[-1].name == "checkpoint-1"
    else:
        assert code == 0
        assert (out / "adapter_model.safetensors").exists()


def test_an_evaluation_that_begins_a_resumed_run_is_broken_off(base, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = options(base, data, out, "--val_size", "8", "--eval_steps", "1", "--max_steps", "2")
    predict, calls = Trainer.prediction_step, itertools.count(1)

    def acts(self, *args, **kwargs):
        if next(calls) in (5, 6):  # in the evaluation of step 1, and where the next run takes it up again
            signal.raise_signal(signal.SIGINT)
        return predict(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "prediction_step", acts)
        assert train(*arguments)[0] == 130
        calls = itertools.count(5)
        code, said = train(str(out / "config.yaml"), "--resume_from_checkpoint")
    assert code == 130
    assert f"stopped after step 1 of 2; {out / 'checkpoint-1'} is saved" in said
    assert train(str(out / "config.yaml"), "--resume_from_checkpoint")[0] == 0
    assert [step for step, loss in logged(out, "step", "eval_loss") if loss is not None] == [0, 1, 2]


def test_a_signal_while_results_are_saved_does_not_lose_them(base, data, tmp_path, monkeypatch):
    write = output.write_json
    monkeypatch.setattr(output, "write_json", lambda *a: (signal.raise_signal(signal.SIGTERM), write(*a)))
    out = tmp_path / "out"
    assert train(*options(base, data, out, "--max_steps", "1", "--save_strategy", "no"))[0] == 0
    assert (out / "adapter_model.safetensors").exists()


# ---- readers ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pipe(monkeypatch):
    """stdout as one end of a pipe, as a shell gives it; -> the other end."""
    reading, writing = os.pipe()
    with monkeypatch.context() as patch, open(writing, "w", encoding="utf-8") as stream:
        patch.setattr(sys, "stdout", stream)  # not in a fixture: pytest sets it anew before the test
        yield reading
    with contextlib.suppress(OSError):
        os.close(reading)


def test_a_reader_that_goes_away_ends_nothing(base, data, tmp_path, monkeypatch):
    step = Trainer.training_step

    def talks(self, *args, **kwargs):
        print("the libraries print too", flush=True)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", talks)
    with pipe(monkeypatch) as reading:
        os.close(reading)
        assert running.train(parse_arguments(options(base, data, tmp_path / "out", "--max_steps", "2"))) == 0
        print("even after the run", flush=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_signal_gets_past_a_pipe_that_nobody_empties(monkeypatch):
    with pipe(monkeypatch) as reading:
        with Interrupt() as interrupt, streams.enduring_output(lambda: interrupt.requested):
            timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM))
            timer.start()
            print("nobody reads this" * 100_000)
            timer.join()
        assert interrupt.requested
        assert os.read(reading, 6) == b"nobody"


def test_what_is_read_slowly_arrives_whole(monkeypatch):
    text, read = "".join(map(str, range(9000))), []
    with pipe(monkeypatch) as reading:
        fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, 4096)
        thread = threading.Thread(target=lambda: read.extend(iter(lambda: os.read(reading, 700), b"\n")))
        thread.start()
        with streams.enduring_output(lambda: False):
            sys.stdout.write(text)
            time.sleep(0.2)
            sys.stdout.write("\n")
        thread.join(timeout=20)
    assert b"".join(read).decode() == text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_text_that_the_terminal_has_no_letters_for_is_shown_in_escapes(base, tmp_path, monkeypatch, encoding):
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "Gr\u00fc\u00df \u4f60", "completion": "\u597d"}) + "\n")
    with open(tmp_path / "said", "w", encoding=encoding) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert running.train(parse_arguments(options(base, str(data), tmp_path / "out", "--dry_run"))) == 0
        print("caf\xe9", flush=True) if encoding != "ascii" else None
    said = (tmp_path / "said").read_text(encoding=encoding)
    assert {
        "ascii": "Gr\\xfc\\xdf \\u4f60[[\\u597d",
        "latin-1": "Gr\xfc\xdf \\u4f60[[\\u597d",
        "utf-8": "Gr\xfc\xdf \u4f60[[\u597d",
    }[encoding] in said


@pytest.mark.slow
def test_process_goes_on_when_its_pipe_is_closed(base, data, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "nf4lora", "train", *options(base, data, out, "--max_steps", "3")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait() == 0
    assert len(logged(out, "step")) >= 3
    assert (out / "adapter_model.safetensors").exists()


# ---- full disks and memories -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def file_size_limit(size):
    """As on a full disk: what is written beyond is refused, and Python gets an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_sentence_and_leaves_no_half_checkpoint(base, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    whole, save = [], Trainer.save_checkpoint

    def fills_up(self, *args, **kwargs):
        if not whole:
            whole.append(True)
            return save(self, *args, **kwargs)
        with file_size_limit(6000):
            return save(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", fills_up)
    assert main.main(["train", *options(base, data, out, "--save_steps", "2")]) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    last = said.err.strip().splitlines()[-1]
    assert f"{out / 'checkpoint-4'} could not be written to: " in last
    assert f"the last whole checkpoint is {out / 'checkpoint-2'}" in last
    assert f"nf4lora train {out / 'config.yaml'} --resume_from_checkpoint" in said.out
    assert [each.name for each in out.glob("*checkpoint*")] == ["checkpoint-2"]
    assert not (out / ".writing").exists()


SAVES = {
    "nf4lora.adapters.files.save_adapter": SafetensorError("I/O error: No space left on device (os error 28)"),
    "torch.save": RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    "transformers.PreTrainedTokenizerBase.save_pretrained": Exception("No space left on device (os error 28)"),
    "transformers.TrainerState.save_to_json": OSError(errno.ENOSPC, "No space left on device"),
}


@pytest.mark.parametrize("who", SAVES)
def test_whoever_meets_the_full_disk_the_sentence_is_the_same(base, data, tmp_path, monkeypatch, who):
    monkeypatch.setattr(who, lambda *a, **k: (_ for _ in ()).throw(SAVES[who]))
    with pytest.raises(RunError, match=r"could not be written to: .*checkpoint") as raised:
        train(*options(base, data, tmp_path / "out", "--max_steps", "1"))
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_log_that_cannot_be_written_is_told_once_and_ends_nothing(base, data, tmp_path, monkeypatch):
    open_ = Path.open

    def full(self, mode="r", *args, **kwargs):
        if self.name == "metrics.jsonl" and "a" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    code, said = train(*options(base, data, tmp_path / "out", "--max_steps", "3"))
    assert code == 0
    assert said.count("metrics.jsonl cannot be written (No space left on device)") == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["CUDA", "CPU", "Python"],
)
def test_out_of_memory_is_one_sentence_and_the_steps_before_are_saved(base, data, tmp_path, monkeypatch, error):
    def fails():
        raise error

    out = tmp_path / "out"
    arguments = options(base, data, out, "--max_steps", "3")
    with monkeypatch.context() as patch:
        stopped_by(patch, fails, at=6)  # the second batch of step 3
        with pytest.raises(RunError, match=r"^out of memory in step 3.*smaller per_device_train_batch_size") as raised:
            train(*arguments)
    assert len(str(raised.value).splitlines()) == 1
    assert [each.name for each in output.checkpoints(out)] == ["checkpoint-2"]
    code, said = train(str(out / "config.yaml"), "--resume_from_checkpoint")
    assert code == 0
    assert "going on from" in said


def test_an_error_within_the_optimizers_step_saves_nothing_of_it(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(RunError, match="out of memory in step 1"):
        train(*options(base, data, tmp_path / "out"))
    assert output.checkpoints(tmp_path / "out") == []


# ---- where it was ----------------------------------------------------------------------------------------------------


def test_traceback_shows_where_an_error_was_raised(base, data, tmp_path, monkeypatch, capsys):
    def mistaken(*args, **kwargs):
        raise KeyError("lora")

    monkeypatch.setattr("peft.LoraConfig", mistaken)
    arguments = ["train", *options(base, data, tmp_path / "out")]
    assert main.main(arguments) == 1
    said = capsys.readouterr().err
    assert "cannot put adapters on the model: KeyError: 'lora' (--traceback shows where)" in said
    assert "Traceback" not in said
    assert main.main([*arguments, "--traceback"]) == 1
    assert "in mistaken" in capsys.readouterr().err
