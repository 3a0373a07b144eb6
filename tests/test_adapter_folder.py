"""Files of an adapter that are not as they have to be: one clear error each, and a model that is as it was."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nf4lora import load_adapter, save_adapter

from support.adapted import adapted, packed_llama


@pytest.fixture
def folder(tmp_path):
    save_adapter(adapted(packed_llama()), tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder, file, edit):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(edit(content) or content))


def refused(folder, match):
    model = packed_llama()
    with pytest.raises(ValueError, match=match):
        load_adapter(model, folder)
    assert not hasattr(model, "peft_config")


def set_(*keys, value):
    def edit(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda about: {"": 0}, r"nf4lora\.json must hold format_version, a number from 1, got None"),
        (lambda about: about.pop("format_version") and None, "must hold format_version, a number from 1, got None"),
        (set_("format_version", value="1"), "must hold format_version, a number from 1, got '1'"),
        (set_("format_version", value=True), "must hold format_version, a number from 1, got True"),
        (set_("format_version", value=0), "must hold format_version, a number from 1, got 0"),
        (set_("base_sha256", value=None), "must hold base_sha256, a text, got None"),
        (set_("base_sha256", value=7), "must hold base_sha256, a text, got 7"),
        (set_("base", value=[]), "base in .* must hold an object, got list"),
        (set_("base", value={}), "base in .* must hold packed as an object, got NoneType"),
        (set_("base", "packed", value=[1]), "must hold packed as an object, got list"),
        (set_("base", "packed", LAYER, value=None), rf"must hold shape of {LAYER} in packed, got None"),
        (set_("base", "packed", LAYER, "shape", value=[1]), rf"must hold shape of {LAYER} in packed, got \[1\]"),
        (set_("base", "packed", LAYER, "codes", value=1), rf"must hold codes of {LAYER} in packed, got 1"),
        (set_("base", "packed", LAYER, "scales", value=["a"] * 5), f"must hold scales of {LAYER} in packed"),
        (set_("base", "weights", "lm_head.weight", value={"shape": "a"}), r"must hold shape of lm_head\.weight"),
        (set_("with_base", value="score"), "with_base in .* must be a list of names, got 'score'"),
    ],
)
def test_what_nf4lora_json_lacks_or_holds_of_another_kind_is_named(folder, edit, match):
    change(folder, "nf4lora.json", edit)
    refused(folder, match)


def test_an_empty_nf4lora_json_does_not_switch_the_check_off(folder):
    (folder / "nf4lora.json").write_text("{}")
    refused(folder, "must hold format_version")
    (folder / "nf4lora.json").write_text("")
    refused(folder, "must be JSON")
    (folder / "nf4lora.json").write_bytes(b"\xff\xfe")
    refused(folder, "must be JSON")
    (folder / "nf4lora.json").write_text("[" * 100_000)
    refused(folder, "must be JSON")


@pytest.mark.parametrize(
    "header", [b"[]", b"{}", b"null", b"1", b'{"a": 1}', b'{"a": {}}', b'{"a": {"dtype": "F32", "shape": [1]}}', b"{"]
)
def test_a_header_of_another_shape_is_a_broken_file(folder, header):
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(folder, "must be a whole safetensors file|must hold every tensor")


@pytest.mark.parametrize("value", ["8", None, [8], {"r": 8}, -1, 0])
def test_a_rank_of_another_kind_is_refused(folder, value):
    change(folder, "adapter_config.json", set_("r", value=value))
    refused(folder, "load_adapter: ")


@pytest.mark.parametrize("other", ["a folder", "a dead link"])
def test_what_stands_in_the_place_of_nf4lora_json_does_not_switch_the_check_off(folder, other):
    (folder / "nf4lora.json").unlink()
    if other == "a folder":
        (folder / "nf4lora.json").mkdir()
    else:
        (folder / "nf4lora.json").symlink_to("nowhere")
    refused(folder, r"nf4lora\.json must be JSON, got .*(Is a directory|No such file)")


@pytest.mark.parametrize("change", [lambda t: t * float("nan"), lambda t: t / 0, lambda t: t.to(torch.int8)])
def test_tensors_that_hold_no_numbers_are_refused(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "adapter_model.safetensors")
    refused(folder, rf"{name} in .* must hold finite numbers, got (NaN or Inf|torch\.int8)")


def test_targets_that_are_no_regular_expression_are_refused(folder):
    change(folder, "adapter_config.json", set_("target_modules", value="(q_proj"))
    refused(folder, "the adapter in .* must fit the model: missing")


@pytest.mark.parametrize("value", [7, {"a": 1}, None])
def test_targets_of_another_kind_are_refused(folder, value):
    change(folder, "adapter_config.json", set_("target_modules", value=value))
    refused(folder, "load_adapter: ")
