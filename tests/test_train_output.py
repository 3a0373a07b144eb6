"""The output folder: what may be written there, what is removed, who may use it."""

# ruff: noqa: F811  (a package may be missing; fixtures are imported)
import itertools
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack

import pytest

pytest.importorskip("trl")

import torch
from safetensors.torch import save_file

from nf4lora.train.arguments.parse import parse_arguments
from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.progress import trim_metrics
from nf4lora.train.run_folder import checkpoints, files, output
from nf4lora.train.run_folder import config_file as configuration
from nf4lora.train.trainer import Trainer

from support.train_runs import adapter, base, data, data_file, equal, logged, losses, options, quick, train, user  # noqa: F401


def test_folder_that_holds_a_run_is_kept_unless_told(base, data, tmp_path):
    out = tmp_path / "out"
    train(*options(base, data, out, "--max_steps", "1", "--save_steps", "1"))
    before = adapter(out)
    with pytest.raises(UsageError, match="holds a run; go on with --resume_from_checkpoint"):
        train(*options(base, data, out))
    with pytest.raises(UsageError, match="contradict each other"):
        train(*options(base, data, out, "--overwrite_output_dir", "--resume_from_checkpoint"))
    with pytest.raises(UsageError, match=r"lora_r 8 cannot go on from .*checkpoint-1, which has 4"):
        train(*options(base, data, out, "--resume_from_checkpoint", "--lora_r", "8"))
    with pytest.raises(UsageError, match="not a whole checkpoint"):
        train(*options(base, data, out, "--resume_from_checkpoint", str(out / "checkpoint-9")))
    assert equal(before, adapter(out))
    (out / "notes.txt").write_text("mine")
    code, _ = train(*options(base, data, out, "--overwrite_output_dir", "--max_steps", "2", "--seed", "7"))
    assert code == 0
    assert (out / "notes.txt").exists()
    assert not (out / "checkpoint-1").exists()
    assert not equal(before, adapter(out))


def test_dry_run_writes_nothing_and_shows_a_sample(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("nf4lora.train.model.load_model", lambda *a: pytest.fail("a dry run loads no model"))
    out = tmp_path / "out"
    code, said = train(*options(base, data, out, "--dry_run"))
    assert code == 0
    assert not out.exists()
    assert "[[one<|im_end|>]]" in said
    assert "24 rows (prompt_completion)" in said


def test_a_run_that_was_killed_before_its_first_checkpoint_is_started_again(base, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    killed = options(base, data, out, "--max_steps", "2", "--save_steps", "2")
    step, batches = Trainer.training_step, itertools.count(1)

    def dies(self, *args, **kwargs):
        if next(batches) == 3:  # the first batch of step 2
            raise SystemExit
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", dies)
        with pytest.raises(SystemExit):
            train(*killed)
    assert (out / "config.yaml").exists()
    assert logged(out, "step") == [(1,)]
    with pytest.raises(UsageError, match=r"metrics.jsonl of a run that was broken off"):
        train(*killed)
    code, said = train(*killed, "--resume_from_checkpoint")
    assert code == 0
    assert "no checkpoint yet: starting from the beginning" in said
    assert logged(out, "step") == [(1,), (2,)]


def test_a_run_that_was_killed_before_its_first_step_is_in_nobodys_way(base, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", lambda *a, **k: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            train(*options(base, data, tmp_path / "out"))
    assert train(*options(base, data, tmp_path / "out", "--max_steps", "1"))[0] == 0


def test_a_restart_loop_gets_past_a_checkpoint_that_is_broken(base, data, tmp_path):
    out = tmp_path / "out"
    arguments = options(base, data, out, "--max_steps", "2", "--save_steps", "1", "--save_total_limit", "1")
    train(*arguments)
    (out / "adapter_model.safetensors").unlink()
    (out / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    code, said = train(*arguments, "--resume_from_checkpoint")
    assert code == 0
    assert "no checkpoint yet" in said
    assert "checkpoint-2 is passed over: optimizer.pt is empty" in said


def test_nothing_is_written_before_training_begins(base, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    train(*options(base, data, out, "--max_steps", "1"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = options(base, data, out, "--overwrite_output_dir")
    for name, error in (("load_model", RunError("no")), ("add_adapters", MemoryError("no"))):
        with monkeypatch.context() as patch:
            patch.setattr(f"nf4lora.train.model.{name}", lambda *a, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(type(error)):
                train(*again)
    with monkeypatch.context() as patch:
        patch.setattr("nf4lora.train.reach.refuse_unreached", lambda *a: (_ for _ in ()).throw(RunError("no")))
        with pytest.raises(RunError):
            train(*again)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_folder_in_use_is_refused_and_free_again_when_the_other_process_is_gone(base, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    program = (
        "import sys, pathlib; from nf4lora.train.run_folder import files\nwith files.lock(pathlib.Path(sys.argv[1])):\n"
    )
    program += "    print('locked', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match="is in use by another nf4lora train"):
            train(*options(base, data, out))
        process.kill()
    assert train(*options(base, data, out, "--max_steps", "1"))[0] == 0


def test_a_folder_that_another_run_took_meanwhile_is_refused(base, data, tmp_path):
    out = tmp_path / "out"
    config = parse_arguments(options(base, data, out))
    with ExitStack() as first, ExitStack() as second:
        late = output.Output(config, second)
        output.Output(config, first).begin(config)
        with pytest.raises(UsageError, match="is in use by another"):
            late.begin(config)
        (out / "checkpoint-3").mkdir()
        first.close()
        with pytest.raises(UsageError, match=r"holds a run; .*found checkpoint-3"):
            late.begin(config)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "learning_rate: 1  # written by hand\n"),
        ("adapter_config.json", "{}"),
        ("adapter_model.safetensors", "another adapter"),
        ("tokenizer.json", "{}"),
        ("checkpoint-5/trainer_state.json", "{}"),
    ],
)
def test_what_no_run_wrote_is_never_replaced(base, data, tmp_path, name, content):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text(content)
    for more in ((), ("--overwrite_output_dir",)):
        with pytest.raises(UsageError, match=rf"output_dir .* holds .*{name.partition('/')[0]}"):
            train(*options(base, data, out, *more))
    assert [path for path in out.rglob("*") if path.is_file()] == [out / name]
    assert (out / name).read_text() == content


def test_overwriting_removes_what_the_run_wrote_and_nothing_else(base, data, tmp_path):
    out = tmp_path / "out"
    train(*options(base, data, out, "--max_steps", "2", "--save_steps", "1"))
    kept = {out / "notes.txt": "mine", out / "checkpoint-best" / "a": "mine", out / "data" / "train.csv": "mine"}
    for path, text in kept.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    linked = tmp_path / "linked"
    (out / "checkpoint-1").rename(linked)
    (out / "checkpoint-1").symlink_to(linked)
    files.clear(out)
    assert {path for path in out.rglob("*") if path.is_file()} == kept.keys()
    assert (linked / "trainer_state.json").exists()


def test_places_that_cannot_be_an_output_folder_are_refused(base, data, tmp_path, monkeypatch):
    rows = tmp_path / "rows"
    rows.mkdir()
    shutil.copy(data, rows / "train.jsonl")
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "link").symlink_to(base)
    for place, words in (
        (base, "must not be the folder of model_name_or_path"),
        (tmp_path / "link", "must not be the folder of model_name_or_path"),
        (rows, "must not be the folder of data"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "out", "is a file, so that"),
        (tmp_path / "nowhere", "is a link to nothing"),
    ):
        with pytest.raises(UsageError, match=f"output_dir.*{words}"):
            train(*options(base, str(rows), place, "--overwrite_output_dir"))
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UsageError, match="output_dir: .* cannot be written to"):
        train(*options(base, data, tmp_path / "out"))


@pytest.mark.parametrize("value", ["null", "0", "none", "-1"])
def test_no_limit_keeps_all_checkpoints_and_still_does_when_the_run_goes_on(base, data, tmp_path, value):
    out, file = tmp_path / "out", tmp_path / "options.yaml"
    file.write_text(f"save_total_limit: {value}\n")
    config = parse_arguments([str(file), *options(base, data, out)])
    configuration.write(config, tmp_path / "config.yaml")
    assert config.save_total_limit == parse_arguments([str(tmp_path / "config.yaml")]).save_total_limit == 0
    if value == "null":
        train(str(file), *options(base, data, out, "--max_steps", "4", "--save_steps", "1"))
        assert len(output.checkpoints(out)) == 4


def test_home_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "model").mkdir()
    names = ("output_dir", "page_to", "resume_from_checkpoint", "eval_file", "train_file")
    config = parse_arguments(["--model=~/model", *(f"--{name}=~/rows.jsonl" for name in names)])
    assert {getattr(config, name) for name in names} == {str(tmp_path / "rows.jsonl")}
    assert config.model_name_or_path == str(tmp_path / "model")
    assert parse_arguments(["--model", "m", "--data", "~/x"]).data == str(tmp_path / "x")
    with pytest.raises(UsageError, match=r"model_name_or_path: .*/rows.jsonl is not a folder \(it is a file\)"):
        parse_arguments(["--model", "~/rows.jsonl", "--data", "x"])
    with pytest.raises(UsageError, match="--output_dir must be a path; there is no user 'nobody-of-that-name'"):
        parse_arguments(["--model", "m", "--data", "x", "--output_dir", "~nobody-of-that-name/x"])


def test_a_folder_of_an_earlier_version_is_gone_on_from_and_never_cleared(base, data, tmp_path):
    """It kept no record: neither of its files nor in its checkpoints."""
    out = tmp_path / "out"
    arguments = options(base, data, out, "--max_steps", "2", "--save_steps", "1")
    train(*arguments)
    (out / "nf4lora_run.json").unlink()
    for checkpoint in out.glob("checkpoint-*"):
        (checkpoint / "nf4lora_resume.json").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(
        UsageError, match="of an earlier version of nf4lora train, .*; go on from its checkpoint with --res"
    ):
        train(*arguments, "--overwrite_output_dir")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    with pytest.MonkeyPatch.context() as patch:  # ended between its checkpoint and its results
        patch.setattr(output.Output, "save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(*arguments, "--max_steps", "3", "--resume_from_checkpoint")
    code, said = train(*arguments, "--max_steps", "4", "--resume_from_checkpoint")
    assert code == 0
    assert f"going on from {out / 'checkpoint-3'}" in said
    assert {each.name for each in out.glob("checkpoint-*")} == {f"checkpoint-{i}" for i in (1, 2, 3, 4)}


def test_a_config_that_somebody_wrote_is_no_run_of_an_earlier_version(base, data, tmp_path):
    out = tmp_path / "out"
    arguments = options(base, data, out, "--max_steps", "1")
    train(*arguments)
    (out / "nf4lora_run.json").unlink()
    (out / "config.yaml").write_text("# my own notes\n")
    with pytest.raises(UsageError, match="which no run of nf4lora train wrote there and this one would replace; move"):
        train(*arguments, "--resume_from_checkpoint")


@pytest.mark.parametrize("more", [(), ("--load_in_4bit", "false")], ids=["4 bits", "16 bits"])
def test_files_have_the_permissions_that_new_files_have(base, data, tmp_path, more):
    out, umask = tmp_path / "out", os.umask
    mask = umask(0o027)
    try:
        with pytest.MonkeyPatch.context() as patch:
            # It is the process's: another thread that makes a file meanwhile would see what it is set to.
            patch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed to be read"))
            train(*options(base, data, out, "--max_steps", "1", *more))
    finally:
        umask(mask)
    modes = {str(path.relative_to(out)): path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(modes, 0o640)
    assert "adapter_model.safetensors" in modes
    assert "checkpoint-1/adapter_model.safetensors" in modes


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "elapsed_time": 2.5}\n3\n{"step": 2}\n{"st')
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            trim_metrics(path, 1)
    assert path.read_text().endswith('{"st')
    assert list(tmp_path.iterdir()) == [path]
    assert trim_metrics(path, 1) == 2.5
    assert path.read_text() == '{"step": 1, "elapsed_time": 2.5}\n'


CALLS = ("rename", "replace", "unlink", "rmdir", "mkdir", "open")  # of module os: between these a process may be killed


def killed_everywhere(folder, action):
    """Folders in which a process was killed in the middle of `action`: at its first call of the file system, at its
    second, and so on, until one was not killed."""
    for number in itertools.count():
        copy = folder.with_name(f"killed-{number}")
        shutil.copytree(folder, copy, copy_function=shutil.copy)
        child = os.fork()
        if not child:
            left = itertools.count(number, -1)
            for name in CALLS:
                call = getattr(os, name)
                dies = lambda *a, call=call, left=left, **k: os._exit(9) if next(left) == 0 else call(*a, **k)  # noqa: E731
                setattr(os, name, dies)
            try:
                action(copy)
            finally:
                os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        yield copy
        if not killed:
            assert number > 3
            return


@pytest.fixture
def folder(tmp_path):
    """A folder as a run leaves it, with small files in place of large ones."""
    out = tmp_path / "out"
    out.mkdir()
    for step in (2, 4, 6):
        place = out / f"checkpoint-{step}"
        place.mkdir()
        for name in (*checkpoints.WHOLE, files.CHECKPOINT_RECORD):
            if name.endswith(".pt"):
                torch.save(step, place / name)
            elif name.endswith(".json"):
                (place / name).write_text(json.dumps({"global_step": step, "log_history": []}))
            else:
                save_file({"step": torch.tensor([step])}, place / name)
    files.note_files(out, ["adapter_model.safetensors", "metrics.jsonl"])
    for name in ("adapter_model.safetensors", "metrics.jsonl", "mine"):
        (out / name).write_text(f"old {name}")
    return out


def whole_names(folder):
    """Names of checkpoints; each must be whole."""
    found = checkpoints.checkpoint_folders(folder).values()
    assert all(checkpoints.is_whole(each) and (each / files.CHECKPOINT_RECORD).exists() for each in found)
    return [each.name for each in found]


def test_killed_while_it_clears_the_folder(folder):
    for place in killed_everywhere(folder, files.clear):
        whole_names(place)
        files.clear(place)  # the next run
        files.sweep(place)
        assert [path.name for path in place.iterdir()] == ["mine"]


def test_killed_while_it_sets_later_work_aside(folder):
    for place in killed_everywhere(folder, lambda place: files.set_aside(place, 2)):
        aside = [name for each in place.glob("superseded-*") for name in whole_names(each)]
        assert sorted(whole_names(place) + aside) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
        files.set_aside(place, 2)  # the next run
        assert whole_names(place) == ["checkpoint-2"]
        found = [*place.glob("adapter_model.*"), *place.glob("superseded-*/adapter_model.*")]
        assert [path.read_text() for path in found] == ["old adapter_model.safetensors"]


def test_killed_while_it_publishes_results(folder):
    def publish(place):
        with files.staging(place) as new:
            for name in ("adapter_model.safetensors", "train_results.json"):
                (new / name).write_text("new")
            files.publish(new, place, ["train_results.json"])

    for place in killed_everywhere(folder, publish):
        adapter_now = (place / "adapter_model.safetensors").read_text()
        assert adapter_now in ("old adapter_model.safetensors", "new")
        assert not (place / "train_results.json").exists() or adapter_now == "new"
        publish(place)  # the next run
        files.sweep(place)
        assert (place / "train_results.json").read_text() == "new"
        assert "train_results.json" in files.own_files(place)
        assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_resuming_leaves_no_trace_of_what_was_being_written(base, data, tmp_path):
    out = tmp_path / "out"
    arguments = options(base, data, out, "--max_steps", "2", "--save_steps", "1")
    train(*arguments)
    half = out / files.STAGING / "checkpoint-3"
    half.mkdir(parents=True)
    (half / "optimizer.pt").write_text("half")
    (out / ".checkpoint-1.removed").mkdir()
    train(*arguments, "--max_steps", "3", "--resume_from_checkpoint")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
