"""Chat templates that print today's date: a run keeps the date that it began with."""
# ruff: noqa: F811  (a package may be missing; fixtures are imported)

import json
import shutil
from datetime import datetime, timedelta

import pytest

pytest.importorskip("trl")

from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from nf4lora.train.chat import clock
from nf4lora.train.errors import UsageError

from support.train_runs import adapter, base, data, equal, options, quick, train  # noqa: F401

DATED = "{{ '<|im_start|>system\\nToday is ' + strftime_now('%d %b %Y, %H:%M:%S.%f') + '<|im_end|>\\n' }}"


@pytest.fixture
def dated(base, tmp_path):
    """The base with a template that prints the time."""
    folder = tmp_path / "dated"
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = DATED + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return str(folder)


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + timedelta(days=1)


def tomorrow(patch):
    patch.setattr(clock, "datetime", Tomorrow)
    patch.setattr(chat_template_utils, "datetime", Tomorrow)


@pytest.mark.slow
def test_a_run_goes_on_another_day_with_the_date_it_began_with(dated, data, tmp_path, monkeypatch):
    out, common = tmp_path / "out", ("--max_steps", "3", "--save_steps", "1", "--save_total_limit", "0")
    code, said = train(*options(dated, data, out, *common))
    today = f"{datetime.now():%Y-%m-%d}"
    assert code == 0
    assert f"the chat template prints today's date, {today}" in said
    whole = adapter(out)
    for step in (2, 1):  # the second time from what a run that went on has written
        (out / "adapter_model.safetensors").unlink()
        shutil.rmtree(out / f"checkpoint-{step + 1}")
        with monkeypatch.context() as patch:
            tomorrow(patch)
            code, said = train(str(out / "config.yaml"), "--resume_from_checkpoint", str(out / f"checkpoint-{step}"))
        assert code == 0
        assert f"that of the run's beginning is used, {today}" in said
        assert equal(adapter(out), whole)
    assert chat_template_utils.datetime is datetime


def test_a_new_run_prints_its_own_day(dated, data, tmp_path, monkeypatch):
    tomorrow(monkeypatch)
    code, said = train(*options(dated, data, tmp_path / "out", "--dry_run"))
    day = Tomorrow.now()
    assert code == 0
    assert f"today's date, {day:%Y-%m-%d}" in said
    assert f"Today is {day:%d %b %Y}" in said


def test_a_template_without_a_date_is_not_told_of(base, data, tmp_path):
    assert "template prints" not in train(*options(base, data, tmp_path / "out", "--dry_run"))[1]


@pytest.mark.parametrize("noted", ["the day before", 3])
def test_a_damaged_date_is_named(base, data, tmp_path, noted):
    out = tmp_path / "out"
    train(*options(base, data, out, "--max_steps", "1"))
    path = out / "checkpoint-1" / "nf4lora_resume.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "date": noted}))
    with pytest.raises(UsageError, match=r"nf4lora_resume.json holds no date as `date`"):
        train(*options(base, data, out, "--max_steps", "2", "--resume_from_checkpoint"))
