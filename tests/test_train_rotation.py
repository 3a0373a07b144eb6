"""Which checkpoints are kept: the last ones, the best one, and whatever a run that goes on passes over."""
# ruff: noqa: F811  (a package may be missing; fixtures are imported)

import pytest

pytest.importorskip("trl")

from nf4lora.train.run_folder import output
from nf4lora.train.trainer import Trainer

from support.train_runs import adapter, base, data, equal, options, quick, train  # noqa: F401


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing of ours sees it."""


def killed_in_step(number, *arguments):
    step = Trainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == number - 1:
            raise Killed
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", dies)
        with pytest.raises(Killed):
            train(*arguments)


def names(folder):
    return sorted(each.name for each in folder.glob("checkpoint-*"))


@pytest.mark.parametrize("keep", ["1", "2"])
def test_a_damaged_later_checkpoint_costs_no_good_one_its_place(base, data, tmp_path, keep):
    out = tmp_path / "out"
    arguments = options(base, data, out, "--save_steps", "1", "--save_total_limit", keep)
    killed_in_step(6, *arguments, "--save_total_limit", "9")
    whole = out / "checkpoint-2"
    for each in ("checkpoint-3", "checkpoint-4", "checkpoint-5"):
        (out / each / "optimizer.pt").write_bytes(b"")
    killed_in_step(4, *arguments, "--resume_from_checkpoint", "--save_total_limit", keep)
    assert output.checkpoints(out)[-1].name == "checkpoint-3"
    assert names(out / "superseded-1") == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    assert whole.exists() == (keep == "2")
    code, said = train(*arguments, "--resume_from_checkpoint")
    assert code == 0
    assert f"going on from {out / 'checkpoint-3'}" in said


def test_rotation_looks_at_no_later_checkpoint(base, data, tmp_path):
    out, save = tmp_path / "out", Trainer.save_checkpoint
    arguments = options(base, data, out, "--save_steps", "1", "--save_total_limit", "1", "--max_steps", "2")

    def beside_a_later_one(self, *args, **kwargs):
        later = out / "checkpoint-9"
        later.mkdir(exist_ok=True)
        (later / "nf4lora_resume.json").write_text("{}")
        save(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", beside_a_later_one)
        train(*arguments)
    assert names(out) == ["checkpoint-2", "checkpoint-9"]


def test_checkpoints_of_which_none_is_whole_are_kept_aside(base, data, tmp_path):
    out = tmp_path / "out"
    arguments = options(base, data, out, "--save_steps", "1", "--max_steps", "3")
    killed_in_step(3, *arguments)
    trained = {each.name: adapter(each) for each in out.glob("checkpoint-*")}
    for each in trained:
        (out / each / "scheduler.pt").unlink()
    code, said = train(*arguments, "--resume_from_checkpoint")
    aside = out / "superseded-1"
    assert code == 0
    assert "no checkpoint yet" in said
    assert f"checkpoint-2 is passed over: scheduler.pt is missing; it is kept in {aside}" in said
    assert names(aside) == ["checkpoint-1", "checkpoint-2"]
    assert all(equal(adapter(aside / name), weights) for name, weights in trained.items())


@pytest.mark.parametrize("keep", ["1", "2"])
def test_the_checkpoint_with_the_lowest_held_out_loss_is_kept_and_named(base, data, tmp_path, monkeypatch, keep):
    out, loop = tmp_path / "out", Trainer.evaluation_loop
    losses = {0: 0.5, 1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 1.5}  # step 0 has no checkpoint
    seen = {}

    def as_given(self, *args, **kwargs):
        output = loop(self, *args, **kwargs)
        output.metrics["eval_loss"] = losses[self.state.global_step]
        seen[self.state.global_step] = names(out)
        return output

    monkeypatch.setattr(Trainer, "evaluation_loop", as_given)
    common = ("--save_steps", "1", "--eval_steps", "1", "--save_total_limit", keep, "--val_size", "4")
    arguments = options(base, data, out, *common, "--max_steps", "5")
    killed_in_step(4, *arguments)
    code, said = train(*arguments, "--resume_from_checkpoint")
    last = ["checkpoint-5"] if keep == "1" else ["checkpoint-4", "checkpoint-5"]
    assert code == 0
    assert names(out) == ["checkpoint-2", *last]
    assert f"best     of the checkpoints, {out / 'checkpoint-2'} has the lowest held-out loss, 1.0000\n" in said
    assert "checkpoint-1" not in seen[3]
    assert "checkpoint-2" in seen[3]


def test_a_best_checkpoint_that_is_the_last_one_leaves_none_beside_it(base, data, tmp_path):
    out = tmp_path / "out"
    common = (
        "--save_steps",
        "1",
        "--eval_steps",
        "1",
        "--save_total_limit",
        "1",
        "--val_size",
        "4",
        "--max_steps",
        "3",
    )
    code, said = train(*options(base, data, out, *common))
    assert code == 0
    assert names(out) == ["checkpoint-3"]
    assert "best  " not in said
