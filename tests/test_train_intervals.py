"""When a run evaluates: where it was asked to, and nowhere else."""
# ruff: noqa: F811  (a package may be missing; fixtures are imported)

import json

import pytest

pytest.importorskip("trl")

from nf4lora.train.arguments.parse import parse_arguments
from nf4lora.train.run_folder import checkpoints

from support.train_runs import base, data, logged, options, quick, train  # noqa: F401


@pytest.mark.parametrize("asked", ["eval_strategy: 'no'", "evals_per_epoch: 0"])
def test_held_out_rows_are_not_evaluated_where_none_is_asked_for(base, data, tmp_path, asked):
    file, out = tmp_path / "options.yaml", tmp_path / "out"
    file.write_text(asked)
    common = options(base, data, out, "--val_size", "4", "--max_steps", "2", "--save_steps", "1")
    for more in ((), ("--resume_from_checkpoint",)):
        code, said = train(str(file), *common, *more)
        assert code == 0
        assert "the held-out rows are not evaluated: eval_strategy no" in said
        assert all(loss is None for (loss,) in logged(out, "eval_loss"))
        assert not (out / "eval_results.json").exists()
        assert "held-out loss" not in said
    assert parse_arguments([str(out / "config.yaml")]).eval_strategy == "no"


def test_a_run_without_held_out_rows_forbids_no_later_evaluation(base, data, tmp_path):
    out = tmp_path / "out"
    train(*options(base, data, out, "--max_steps", "1"))
    train(str(out / "config.yaml"), "--val_size", "4", "--output_dir", str(tmp_path / "again"))
    assert [step for step, loss in logged(tmp_path / "again", "step", "eval_loss") if loss is not None] == [0, 1]


@pytest.mark.parametrize(
    ("share", "every", "step", "lacks"),
    [(0.25, 5, 5, True), (0.25, 5, 4, False), (0.1, 3, 3, True), (1 / 12, 9, 100, False), (1 / 16, 7, 14, True),
     (4, 4, 8, True)],
)  # fmt: skip
def test_a_share_of_all_steps_decides_whether_a_checkpoint_lacks_its_evaluation(tmp_path, share, every, step, lacks):
    state = {"global_step": step, "log_history": [], "epoch": 0.3, "eval_steps": every}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    config = parse_arguments(["--model", "m", "--data", "d", "--eval_steps", str(share)])
    assert checkpoints.lacks_evaluation(config, tmp_path) is lacks
