"""Going on from a checkpoint: the same to the bit, or refused, or told."""
# ruff: noqa: F811  (a package may be missing; fixtures are imported)

import itertools
import json
import shutil
import signal
from pathlib import Path

import pytest

pytest.importorskip("trl")
import torch

from nf4lora.train import device as loading
from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.run_folder import output
from nf4lora.train.trainer import Trainer

from support.models import tiny_llama, tiny_tokenizer
from support.train_runs import adapter, base, data, data_file, equal, logged, losses, options, quick, train  # noqa: F401

# 24 rows, 4 held out, 4 a step: an epoch ends with step 5, where the checkpoint is written before the evaluation.
WHOLE = ("--lora_dropout", "0.2", "--val_size", "4", "--eval_strategy", "epoch", "--save_steps", "1",
         "--save_total_limit", "9", "--logging_steps", "2", "--max_steps", "7")  # fmt: skip


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run that nothing interrupted: its folder, and its data."""
    data = data_file(tmp_path_factory.mktemp("data"))
    folder = tmp_path_factory.mktemp("whole") / "out"
    train(*options(base, data, folder, *WHOLE))
    return folder, data


@pytest.mark.parametrize("step", [3, 5], ids=["within an epoch", "at the end of an epoch"])
def test_resumed_run_is_the_same_to_the_bit(base, whole, tmp_path, step):
    whole, data = whole
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    (parts / "adapter_model.safetensors").unlink()
    checkpoint = parts / f"checkpoint-{step}"
    code, said = train(*options(base, data, parts, *WHOLE, "--resume_from_checkpoint", str(checkpoint)))
    assert code == 0
    assert f"going on from {checkpoint}" in said
    assert "another run" not in said
    assert equal(adapter(whole), adapter(parts))
    keys = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "mean_token_accuracy")
    assert losses(whole, *keys) == losses(parts, *keys)
    assert logged(whole, "step", "eval_loss")[-1] == logged(parts, "step", "eval_loss")[-1]
    assert torch.equal(
        *(torch.load(f / "checkpoint-7/rng_state.pth", weights_only=False)["cpu"] for f in (whole, parts))
    )


def test_interrupt_saves_a_checkpoint_and_resumes_to_the_same_weights(base, whole, tmp_path, monkeypatch):
    whole, data = whole
    parts = tmp_path / "parts"
    step, batches = Trainer.training_step, itertools.count(1)
    before = signal.getsignal(signal.SIGINT)

    def interrupted(self, *args, **kwargs):
        if next(batches) == 3:  # the first batch of step 2
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        code, said = train(*options(base, data, parts, *WHOLE, "--save_steps", "500"))
    assert code == 130
    assert "stopped after step 2 of 7" in said
    assert f"nf4lora train {parts / 'config.yaml'} --resume_from_checkpoint" in said
    assert not (parts / "adapter_model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is before
    code, _ = train(str(parts / "config.yaml"), "--resume_from_checkpoint")
    assert code == 0
    assert equal(adapter(whole), adapter(parts))


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing of ours sees it."""


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [2, 3], ids=["in the evaluation of step 2", "of step 4"])
@pytest.mark.parametrize(
    "more", [("--eval_steps", "2", "--save_steps", "2"), ("--eval_steps", "2", "--save_steps", "1"),
             ("--eval_strategy", "epoch", "--save_strategy", "epoch", "--data_rows", "8")], ids=lambda more: more[0]
)  # fmt: skip
def test_a_run_that_is_killed_while_it_evaluates_loses_no_step(base, tmp_path, monkeypatch, more, kill_at):
    data = data_file(tmp_path)
    if "--data_rows" in more:  # two steps an epoch
        lines = Path(data).read_text().splitlines(keepends=True)
        Path(data).write_text("".join(lines[:12]))
        more = more[:-2]
    common = ("--max_steps", "6", "--val_size", "4", "--lora_dropout", "0.1", *more)
    train(*options(base, data, tmp_path / "whole", *common))
    evaluate, calls = Trainer.evaluation_loop, itertools.count(1)

    def killed(self, *args, **kwargs):
        result = evaluate(self, *args, **kwargs)
        if next(calls) == kill_at:  # the first is before step 1
            raise Killed
        return result

    out, step = tmp_path / "out", 2 * (kill_at - 1)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluation_loop", killed)
        with pytest.raises(Killed):
            train(*options(base, data, out, *common))
    assert output.checkpoints(out)[-1].name == f"checkpoint-{step}"
    code, said = train(*options(base, data, out, *common, "--resume_from_checkpoint"))
    assert code == 0
    assert f"going on from {out / f'checkpoint-{step}'}" in said
    assert "another run" not in said
    assert equal(adapter(tmp_path / "whole"), adapter(out))
    names = ("step", "loss", "eval_loss", "grad_norm")
    assert logged(out, *names) == logged(tmp_path / "whole", *names)
    states = [json.loads((f / "trainer_state.json").read_text())["log_history"] for f in (out, tmp_path / "whole")]
    evaluated = [[(e["step"], e["eval_loss"]) for e in state if "eval_loss" in e] for state in states]
    assert evaluated[0] == evaluated[1]
    assert [step for step, _ in evaluated[0]] == [0, 2, 4, 6]


def test_the_checkpoint_of_a_step_holds_the_result_of_its_evaluation(base, data, tmp_path):
    out = tmp_path / "out"
    train(*options(base, data, out, "--max_steps", "2", "--val_size", "4", "--eval_steps", "1", "--save_steps", "1"))
    for checkpoint in output.checkpoints(out):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry][-1] == state["global_step"]
        assert not [each for each in checkpoint.iterdir() if each.name.startswith(".")]


def test_broken_off_checkpoint_is_not_resumed_from(base, data, tmp_path):
    out = tmp_path / "out"
    train(*options(base, data, out, "--max_steps", "2", "--save_steps", "1"))
    (out / "checkpoint-2" / "trainer_state.json").unlink()
    assert output.checkpoints(out) == [out / "checkpoint-1"]


def test_resuming_without_a_checkpoint_starts_from_the_beginning(base, data, tmp_path):
    code, said = train(*options(base, data, tmp_path / "out", "--resume_from_checkpoint", "--max_steps", "1"))
    assert code == 0
    assert "no checkpoint yet" in said


def test_checkpoint_of_other_layers_is_refused(base, data, tmp_path):
    out = tmp_path / "out"
    train(*options(base, data, out, "--max_steps", "2", "--save_steps", "1"))
    with pytest.raises(
        RunError, match=r"4 tensors of its adapter are not those of the model.*k_proj.*lora_target_modules"
    ):
        train(*options(base, data, out, "--resume_from_checkpoint", "--lora_target_modules",
                       "q_proj,o_proj,up_proj,gate_proj,down_proj"))  # fmt: skip


def test_finished_run_can_be_resumed_and_has_nothing_left_to_do(base, data, tmp_path):
    out = tmp_path / "out"
    train(*options(base, data, out, "--max_steps", "2", "--val_size", "4"))
    before = adapter(out)
    (out / "adapter_model.safetensors").unlink()
    code, said = train(*options(base, data, out, "--max_steps", "2", "--val_size", "4", "--resume_from_checkpoint"))
    assert code == 0
    assert equal(before, adapter(out))
    assert "nothing is left to train" in said


def test_resuming_into_another_folder_leaves_the_first_alone(base, data, tmp_path):
    train(*options(base, data, tmp_path / "a", "--max_steps", "2", "--save_steps", "1"))
    train(*options(base, data, tmp_path / "b", "--max_steps", "2",
                   "--resume_from_checkpoint", str(tmp_path / "a" / "checkpoint-1")))  # fmt: skip
    assert equal(adapter(tmp_path / "a"), adapter(tmp_path / "b"))
    with pytest.raises(UsageError, match="holds a run"):
        train(*options(base, data, tmp_path / "b", "--resume_from_checkpoint", str(tmp_path / "a" / "checkpoint-1")))


def test_changed_options_are_named_when_resuming(base, data, tmp_path):
    out = tmp_path / "out"
    train(*options(base, data, out, "--max_steps", "2", "--save_steps", "1"))
    _, said = train(
        *options(base, data, out, "--max_steps", "3", "--resume_from_checkpoint", "--learning_rate", "1e-3")
    )
    assert "this is another run from here on: max_steps 3 (was 2), learning_rate 0.001 (was 0.01)" in said


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_a_paged_optimizer_trains_and_goes_on_bit_for_bit(base, data, tmp_path, name):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    more = ["--optim", name, "--save_steps", "3"]
    code, said = train(*options(base, data, whole, *more))
    assert code == 0
    assert f", {name}" in said
    bits = 8 if "8bit" in name else 32
    assert f"state    PagedAdamW, {bits} bits: " in said
    assert "0 gradients skipped" in said
    train(*options(base, data, halves, *more))
    shutil.rmtree(halves / "checkpoint-6")
    (halves / "adapter_model.safetensors").unlink()
    code, said = train(*options(base, data, halves, *more, "--resume_from_checkpoint"))
    assert code == 0
    assert "another run" not in said
    assert equal(adapter(whole), adapter(halves))
    saved = torch.load(whole / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"]
    kinds = {state["exp_avg"].dtype for state in saved.values()}
    assert kinds == {torch.uint8 if bits == 8 else torch.float32}


def test_a_change_of_optimizer_is_told_or_refused(base, data, tmp_path):
    out = tmp_path / "out"
    train(*options(base, data, out, "--save_steps", "3", "--optim", "paged_adamw_8bit"))
    shutil.rmtree(out / "checkpoint-6")
    again = [*options(base, data, out, "--save_steps", "3"), "--resume_from_checkpoint"]
    with pytest.raises(RunError, match="optim adamw cannot go on from .*checkpoint-3, whose optimizer has 8-bit"):
        train(*again, "--optim", "adamw")
    code, said = train(*again, "--optim", "paged_adamw_32bit")
    assert code == 0
    assert "optim paged_adamw_32bit (was paged_adamw_8bit)" in said


def halves(base, data, out, *more):
    """A run of four steps with a checkpoint after each two; -> the arguments to go on from the second."""
    common = ("--save_steps", "2", "--max_steps", "4")
    train(*options(base, data, out, *common))
    shutil.rmtree(out / "checkpoint-4")
    return options(base, data, out, *common, "--resume_from_checkpoint", *more)


def test_learning_rate_weight_decay_and_schedule_that_are_announced_are_used(base, data, tmp_path, monkeypatch):
    seen = []
    step = Trainer.training_step

    def spy(self, *args, **kwargs):
        seen.append([(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups])
        return step(self, *args, **kwargs)

    again = halves(base, data, tmp_path / "out")
    monkeypatch.setattr(Trainer, "training_step", spy)
    changed = ("--learning_rate", "1e-3", "--weight_decay", "0.5", "--lr_scheduler_type", "constant")
    code, said = train(*again, *changed)
    assert code == 0
    assert all(f"{name[2:]} {value}" in said for name, value in zip(changed[::2], ("0.001", "0.5", "constant")))
    assert all(groups == [(1e-3, 0.5), (1e-3, 0.0)] for groups in seen)
    assert [rate for (rate,) in losses(tmp_path / "out", "learning_rate")][2:] == [1e-3, 1e-3]


def test_another_number_of_steps_stretches_the_schedule_from_where_it_stands(base, data, tmp_path):
    train(*halves(base, data, tmp_path / "out"), "--max_steps", "8")
    train(*options(base, data, tmp_path / "whole", "--max_steps", "8"))
    resumed, whole = (losses(tmp_path / name, "learning_rate") for name in ("out", "whole"))
    assert resumed[2:] == whole[2:]


def test_intervals_asked_for_on_resuming_are_used(base, data, tmp_path):
    again = halves(base, data, tmp_path / "out")
    train(*again, "--max_steps", "6", "--save_steps", "3", "--logging_steps", "5", "--save_total_limit", "0")
    assert [step for (step,) in losses(tmp_path / "out", "step")] == [1, 2, 3, 5, 6]  # logged at each checkpoint too
    assert [each.name for each in output.checkpoints(tmp_path / "out")] == [f"checkpoint-{i}" for i in (2, 3, 6)]


def test_going_back_keeps_later_work_apart_and_goes_on_from_its_own(base, data, tmp_path, monkeypatch):
    out = tmp_path / "a folder"
    everything = options(base, data, out, "--save_steps", "2", "--save_total_limit", "9")
    train(*everything)
    first = adapter(out)
    step, batches = Trainer.training_step, itertools.count(1)

    def interrupted(self, *args, **kwargs):
        if next(batches) == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        code, said = train(
            *everything, "--resume_from_checkpoint", str(out / "checkpoint-2"), "--learning_rate", "1e-3"
        )
    assert code == 130
    assert "stopped after step 3 of 6" in said
    assert f"{out / 'checkpoint-3'} is saved" in said
    assert f"nf4lora train '{out}/config.yaml' --resume_from_checkpoint" in said
    assert "checkpoint-4, checkpoint-6 and the results of the earlier course are kept in" in said
    assert [each.name for each in output.checkpoints(out)] == ["checkpoint-2", "checkpoint-3"]
    aside = out / "superseded-1"
    assert equal(adapter(aside), first)
    assert output.checkpoints(aside)[-1].name == "checkpoint-6"
    assert len(losses(aside, "step")) == 6
    assert len(losses(out, "step")) == 3
    code, said = train(str(out / "config.yaml"), "--resume_from_checkpoint")
    assert code == 0
    assert f"going on from {out / 'checkpoint-3'}" in said
    assert not equal(adapter(out), first)


def test_changed_data_under_the_same_name_is_refused(base, data, tmp_path):
    again = halves(base, data, tmp_path / "out")
    lines = open(data).read().splitlines()
    for text, words in (
        (lines[1:], "24 rows then, 23 now"),
        ([lines[1], lines[0], *lines[2:]], "other tokens"),
        ([lines[0].replace('"one"', '"two"'), *lines[1:]], "other tokens"),
    ):
        with open(data, "w") as file:
            file.write("\n".join(text))
        for more in ((), ("--max_steps", "2")):  # of a finished run too
            with pytest.raises(RunError, match=f"the training data is not what .*checkpoint-2 was trained on.*{words}"):
                train(*again, *more)
    with open(data, "w") as file:
        file.write("\n".join(lines))
    with pytest.raises(RunError, match=r"other tokens; max_length 44 \(was 512\)"):
        train(*again, "--max_length", "44")
    assert train(*again)[0] == 0


def test_the_same_rows_elsewhere_are_the_same_data(base, data, tmp_path):
    again = halves(base, data, tmp_path / "out")
    shutil.move(data, tmp_path / "moved.jsonl")
    code, said = train(*again, "--data", str(tmp_path / "moved.jsonl"))
    assert code == 0
    assert "another run" not in said


def test_another_batch_size_neither_skips_nor_repeats_rows(base, data, tmp_path):
    again = halves(base, data, tmp_path / "out")
    sizes = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps")
    with pytest.raises(UsageError, match=r"4 x gradient_accumulation_steps 2 = 8 rows a step .* 2 x 2 = 4"):
        train(*again, *sizes, "2")
    code, said = train(*again, *sizes, "1")
    assert code == 0
    assert "per_device_train_batch_size 4 (was 2), gradient_accumulation_steps 1 (was 2)" in said
    train(*options(base, data, tmp_path / "whole", "--max_steps", "4"))
    resumed, whole = (losses(tmp_path / name, "loss", "num_tokens") for name in ("out", "whole"))
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5)  # float32 sums in another order
        assert ours[1] == theirs[1]


def test_a_type_that_was_left_open_is_written_down(base, data, tmp_path, monkeypatch):
    choose = loading.choose_dtype
    given = iter([torch.float32, torch.bfloat16, torch.bfloat16])
    monkeypatch.setattr(loading, "choose_dtype", lambda w, d: next(given) if w == "auto" else choose(w, d))
    out = tmp_path / "out"
    arguments = options(base, data, out, "--dtype", "auto", "--max_steps", "2", "--save_steps", "1")
    train(*arguments)
    shutil.rmtree(out / "checkpoint-2")
    with pytest.raises(RunError, match=r"another base than .*; dtype bfloat16 \(was float32\)"):
        train(*arguments, "--resume_from_checkpoint")
    assert train(str(out / "config.yaml"), "--resume_from_checkpoint")[0] == 0


def test_another_seed_is_refused(base, data, tmp_path):
    with pytest.raises(UsageError, match=r"seed 7 cannot go on from .*checkpoint-2, which has 42"):
        train(*halves(base, data, tmp_path / "out"), "--seed", "7")


def test_a_checkpoint_over_another_base_is_refused(base, data, tmp_path):
    again = halves(base, data, tmp_path / "out")
    with pytest.raises(RunError, match=r"another base than .*; bnb_4bit_use_double_quant False \(was True\)"):
        train(*again, "--double_quant", "false")
    other = tmp_path / "other"
    tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1, seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    with pytest.raises(RunError, match=rf"another base than {other}; model_name_or_path {other}"):
        train(str(tmp_path / "out" / "config.yaml"), "--model", str(other), "--resume_from_checkpoint")
    moved = tmp_path / "moved base"
    shutil.copytree(base, moved)
    code, said = train(*again[2:], "--model", str(moved))
    assert code == 0
    assert "another run" not in said


def emptied(path):
    path.write_bytes(b"")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-7])


def a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [emptied, truncated, a_folder])
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "optimizer.pt", "adapter_model.safetensors", "scheduler.pt", "rng_state.pth",
             "adapter_config.json", "nf4lora_resume.json"]
)  # fmt: skip
def test_a_checkpoint_with_a_damaged_file_is_not_whole(whole, tmp_path, name, damage):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    damage(out / "checkpoint-7" / name)
    assert output.checkpoints(out)[-1].name == "checkpoint-6"
    assert output.broken(out / "checkpoint-7").startswith(f"{name} is ")


def test_a_damaged_checkpoint_is_passed_over_and_told(base, data, tmp_path):
    out = tmp_path / "out"
    again = halves(base, data, out)
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-3")
    truncated(out / "checkpoint-3" / "optimizer.pt")
    (out / "adapter_model.safetensors").unlink()
    with pytest.raises(
        UsageError, match=r"checkpoint-3 is not a whole checkpoint \(optimizer.pt is truncated or broken"
    ):
        train(*again, str(out / "checkpoint-3"))
    code, said = train(*again)
    assert code == 0
    assert "checkpoint-3 is passed over: optimizer.pt is truncated or broken" in said


def test_a_record_of_another_shape_is_said_to_be_none(base, data, tmp_path):
    again = halves(base, data, tmp_path / "out")
    (tmp_path / "out" / "checkpoint-2" / "nf4lora_resume.json").write_text('{"options": [], "data": 3}')
    with pytest.raises(UsageError, match=r"nf4lora_resume.json is not what nf4lora train writes"):
        train(*again)


def test_a_checkpoint_that_another_program_wrote_is_gone_on_from_with_a_warning(base, data, tmp_path):
    again = halves(base, data, tmp_path / "out")
    (tmp_path / "out" / "checkpoint-2" / "nf4lora_resume.json").unlink()
    code, said = train(*again)
    assert code == 0
    assert "its data and its base cannot be compared" in said


def test_a_folder_that_was_moved_goes_on_where_it_is(base, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    halves(base, data, Path("out"))
    Path("out").rename("elsewhere")
    code, said = train("elsewhere/config.yaml", "--resume_from_checkpoint")
    assert code == 0
    assert "going on from elsewhere/checkpoint-2" in said
    assert not Path("out").exists()
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    code, said = train("../elsewhere/config.yaml", "--resume_from_checkpoint")
    assert code == 0
    assert "nothing is left to train" in said
    written = (tmp_path / "elsewhere" / "config.yaml").read_text()
    (tmp_path / "elsewhere" / "config.yaml").write_text(written.replace("output_dir: ../elsewhere", "output_dir: new"))
    assert train("../elsewhere/config.yaml", "--max_steps", "1")[0] == 0
    assert Path("new/adapter_model.safetensors").is_file()  # it was edited, and that counts
