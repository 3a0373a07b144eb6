"""Which checkpoints are kept: the last ones, the best one, and whatever a run that goes on passes over."""
# ruff: noqa: F811  (a package may be missing; fixtures are imported)

import pytest

pytest.importorskip("trl")

from nf4lora.train import output
from nf4lora.train.trainer import Trainer

from train_runs import adapter, base, data, equal, options, quick, train  # noqa: F401


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
    assert code == 0 and f"going on from {out / 'checkpoint-3'}" in said


def test_rotation_looks_at_no_later_checkpoint(base, data, tmp_path):
    out, save = tmp_path / "out", Trainer._save_checkpoint
    arguments = options(base, data, out, "--save_steps", "1", "--save_total_limit", "1", "--max_steps", "2")

    def beside_a_later_one(self, *args, **kwargs):
        later = out / "checkpoint-9"
        later.mkdir(exist_ok=True)
        (later / "nf4lora_resume.json").write_text("{}")
        save(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", beside_a_later_one)
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
    assert code == 0 and "no checkpoint yet" in said
    assert f"checkpoint-2 is passed over: scheduler.pt is missing; it is kept in {aside}" in said
    assert names(aside) == ["checkpoint-1", "checkpoint-2"]
    assert all(equal(adapter(aside / name), weights) for name, weights in trained.items())
