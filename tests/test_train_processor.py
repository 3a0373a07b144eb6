"""Checkpoints whose chat template is their processor's: it is used as it is, and ChatML never takes its place."""
# ruff: noqa: F811  (a package may be missing; fixtures are imported)

import json
import shutil

import pytest

pytest.importorskip("trl")

from transformers import AutoTokenizer

from nf4lora.train.data import PARTS
from nf4lora.train.errors import RunError

from support.train_runs import base, data, options, quick, train  # noqa: F401

HEAD = "{% for m in messages %}{{ '<|im_start|>MINE ' + m.role + '\n' }}"
FOOT = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>MINE assistant\n' }}{% endif %}"
TEXTS = HEAD + "{{ m.content }}" + FOOT
DROPS = HEAD + "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}" + FOOT
RAISES = HEAD + "{% if m.content is string %}{{ raise_exception('parts') }}{% endif %}{{ m.content[0].text }}" + FOOT
BOTH = HEAD + "{{ m.content if m.content is string else m.content[0].text }}" + FOOT


def checkpoint(base, folder, **files):
    """A copy of the base whose tokenizer has no chat template, with further files."""
    copy = folder / "copy"
    shutil.copytree(base, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = None
    for file in copy.glob("*.jinja"):
        file.unlink()
    tokenizer.save_pretrained(copy)
    for name, content in files.items():
        (copy / f"{name}.json").write_text(content)
    return str(copy)


def template(text):
    return json.dumps({"chat_template": text})


@pytest.mark.parametrize("file", ["chat_template", "processor_config"])
@pytest.mark.parametrize(
    ("text", "parts"),
    [(TEXTS, False), (BOTH, False), (DROPS, True), (RAISES, True), ({"default": TEXTS, "other": DROPS}, False)],
)
def test_the_template_of_the_processor_is_used(base, data, tmp_path, file, text, parts):
    model = checkpoint(base, tmp_path, **{file: template(text)})
    code, said = train(*options(model, data, tmp_path / "out", "--dry_run"))
    assert code == 0
    assert "MINE assistant" in said
    assert "ChatML" not in said
    assert "Say one" in said
    assert f"the chat template is that of the processor ({file}.json)" in said
    assert (PARTS in said) is parts


def test_the_adapter_folder_has_the_template(base, data, tmp_path):
    model = checkpoint(base, tmp_path, chat_template=template(RAISES))
    assert train(*options(model, data, tmp_path / "out", "--max_steps", "1"))[0] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == RAISES


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"chat_template": 3}', '{"chat_template": {"other": "x"}}'])
def test_a_template_that_cannot_be_read_is_not_replaced_by_another(base, data, tmp_path, content):
    asked = options(checkpoint(base, tmp_path, chat_template=content), data, tmp_path / "out", "--dry_run")
    with pytest.raises(RunError, match=r"stands in chat_template.json, which cannot be used .*--chat_template chatml"):
        train(*asked)
    assert "ChatML" in train(*asked, "--chat_template", "chatml")[1]


def test_a_template_that_refuses_texts_in_both_forms_is_not_replaced(base, data, tmp_path):
    model = checkpoint(base, tmp_path, chat_template=template("{{ raise_exception('images only') }}"))
    with pytest.raises(RunError, match=r"the chat template refuses this conversation \(images only\)"):
        train(*options(model, data, tmp_path / "out", "--dry_run"))


def test_chatml_is_for_checkpoints_without_any_template(base, data, tmp_path):
    model = checkpoint(base, tmp_path, processor_config="{}")
    assert "ChatML was installed" in train(*options(model, data, tmp_path / "out", "--dry_run"))[1]
