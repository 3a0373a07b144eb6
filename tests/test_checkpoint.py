"""A damaged checkpoint is an error that names the tensor, before or instead of a model; nothing loads in silence."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nf4lora.adapters.new_weights import new_parameters
from nf4lora.nn.linear import NF4Linear
from nf4lora.quantization.checkpoint import check_files
from nf4lora.quantization.config import NF4Config

from support.models import tiny_llama

LAYER = "model.layers.0.self_attn.q_proj."
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model three times: in 16 bits, packed with double quantisation, packed without."""
    root = tmp_path_factory.mktemp("checkpoints")
    tiny_llama(num_hidden_layers=1, dtype=torch.bfloat16).save_pretrained(root / "16-bit")
    for name, double_quant in (("packed", True), ("single", False)):
        config = NF4Config(double_quant)
        model = AutoModelForCausalLM.from_pretrained(root / "16-bit", quantization_config=config)
        model.save_pretrained(root / name)
    return root


@pytest.fixture
def damaged(folders, tmp_path):
    """A function that copies a checkpoint, changes tensors by name (None: removes them), and tries to load it."""

    def attempt(kind, changes=None, cut=None, edit_config=None, **kwargs):
        folder = tmp_path / kind
        shutil.copytree(folders / kind, folder)
        file = folder / "model.safetensors"
        if changes:
            tensors = load_file(file)
            for key, change in changes.items():
                tensor = tensors.pop(key)
                if change is not None:
                    tensors[key] = change(tensor.clone()).contiguous()
            save_file(tensors, file, metadata={"format": "pt"})
        if cut is not None:
            os.truncate(file, cut(file.stat().st_size))
        if edit_config:
            config = json.loads((folder / "config.json").read_text())
            edit_config(config)
            (folder / "config.json").write_text(json.dumps(config))
        if kind == "16-bit" or kwargs.pop("with_config", False):
            kwargs["quantization_config"] = NF4Config()
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs)

    return attempt


def with_first(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


def scale_bits(change):
    return lambda tensor: change(tensor.view(torch.float32)).view(torch.int32)


def test_the_undamaged_checkpoints_load(damaged):
    assert all(
        sum(isinstance(module, NF4Linear) for module in damaged(kind).modules()) == 7
        for kind in ("16-bit", "packed", "single")
    )


@pytest.mark.parametrize("kind", ["16-bit", "packed"])
@pytest.mark.parametrize("name", [LAYER + "weight", NORM, "model.embed_tokens.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(damaged, kind, name):
    with pytest.raises(
        ValueError, match=f"NF4Config: {name} must be in the checkpoint as its config says, got nothing"
    ):
        damaged(kind, {name: None})


def test_a_missing_weight_of_a_16_bit_file_may_be_a_new_layer_and_says_what_to_do(damaged):
    with pytest.raises(ValueError, match=f"name {LAYER[:-1]} in modules_to_not_convert if it is meant to be new"):
        damaged("16-bit", {LAYER + "weight": None})


@pytest.mark.parametrize("key", ["weight_absmax", "weight_nested"])
def test_a_missing_companion_is_named(damaged, key):
    with pytest.raises(
        ValueError, match=f"NF4Config: {LAYER}{key} must be in the checkpoint .* got nothing; it is damaged"
    ):
        damaged("packed", {LAYER + key: None})


@pytest.mark.parametrize(
    ("kind", "key", "change", "got"),
    [
        ("packed", "weight", lambda t: t.to(torch.int8), r"int8 \[128, 64\] for uint8"),
        ("packed", "weight_absmax", lambda t: t.int(), r"int32 \[128, 2\] for uint8 \[128, 2\]"),
        ("packed", "weight_absmax", lambda t: t[:, :1], r"uint8 \[128, 1\] for uint8 \[128, 2\]"),
        ("packed", "weight_nested", lambda t: t[:1], r"int32 \[1\] for int32 \[2\]"),
        ("packed", "weight_nested", scale_bits(with_first(float("nan"))), "NaN or Inf"),
        ("single", "weight_absmax", scale_bits(with_first(float("inf"))), "NaN or Inf"),
    ],
)
def test_a_packed_tensor_of_another_kind_is_named(damaged, kind, key, change, got):
    with pytest.raises(ValueError, match=f"NF4Config: {LAYER}{key} must be in the checkpoint .* got {got}"):
        damaged(kind, {LAYER + key: change})


@pytest.mark.parametrize(
    ("kind", "key", "change"),
    [
        ("packed", "weight", lambda t: t.float()),
        ("packed", "weight", lambda t: torch.randn(128, 128).bfloat16()),
        ("packed", "weight_absmax", lambda t: t.half()),
        ("packed", "weight_nested", lambda t: t.view(torch.float32)),
        ("single", "weight_absmax", lambda t: t.view(torch.float32)),
    ],
)
def test_a_packed_tensor_that_a_cast_would_ruin_is_named(damaged, kind, key, change):
    with pytest.raises(ValueError, match=rf"NF4Config: {LAYER}{key} must hold integers .* got B?F\d\d in "):
        damaged(kind, {LAYER + key: change})


@pytest.mark.parametrize("kind", ["16-bit", "packed"])
def test_a_16_bit_tensor_of_another_shape_is_an_error(damaged, kind):
    with pytest.raises((ValueError, RuntimeError), match=f"{NORM} must be in the checkpoint|ignore_mismatched_sizes"):
        damaged(kind, {NORM: lambda t: t[:3]})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(damaged, bad):
    with pytest.raises(ValueError, match=f"NF4Config: {LAYER}weight cannot be packed: .*must be finite"):
        damaged("16-bit", {LAYER + "weight": with_first(bad)})


def test_a_16_bit_weight_of_another_shape_is_named(damaged):
    with pytest.raises(ValueError, match=rf"{LAYER}weight must be .* \[128, 128\], got bfloat16 \[128, 64\]"):
        damaged("16-bit", {LAYER + "weight": lambda t: t[:, :64]})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_file_that_was_quantised_by_another_is_not_taken_for_16_bits(damaged, dtype):
    with pytest.raises(ValueError, match=f"NF4Config: {LAYER}weight must be in 16 or 32 bits, got"):
        damaged("16-bit", {LAYER + "weight": lambda t: t.to(dtype)})


def test_a_packed_file_whose_config_is_lost_is_not_taken_for_16_bits(damaged):
    with pytest.raises(ValueError, match=r"must be in 16 or 32 bits, got U8 .* config\.json does not say how"):
        damaged("packed", edit_config=lambda config: config.pop("quantization_config"), with_config=True)


@pytest.mark.parametrize("kind", ["16-bit", "packed"])
def test_a_file_that_is_cut_off_names_the_tensors_it_lost(damaged, kind):
    with pytest.raises(
        ValueError, match=r"model\.safetensors must hold model\.\S+weight.*, got a file cut off at \d+ bytes"
    ):
        damaged(kind, cut=lambda size: size - 1000)


@pytest.mark.parametrize("size", [0, 5, 100])
def test_a_file_without_a_header_is_named(damaged, size):
    with pytest.raises(ValueError, match=rf"model\.safetensors must be a safetensors file, got {size} bytes"):
        damaged("packed", cut=lambda _: size)


def test_a_checkpoint_of_a_newer_format_is_refused(damaged):
    with pytest.raises(ValueError, match="format_version must be at most 1, got 2"):
        damaged("packed", edit_config=lambda config: config["quantization_config"].update(format_version=2))


def test_a_checkpoint_read_with_another_blocksize_is_refused(damaged):
    with pytest.raises(ValueError, match=r"weight_absmax must be .* got uint8 \[128, 2\] for uint8 \[128, 4\]"):
        damaged("packed", edit_config=lambda config: config["quantization_config"].update(blocksize=32))


def test_after_the_first_failure_no_other_weight_is_packed(damaged, monkeypatch):
    packed, pack = [], NF4Linear.pack
    monkeypatch.setattr(NF4Linear, "pack", lambda *args: packed.append(1) or pack(*args))
    first = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=first):
        damaged("16-bit", {first: with_first(float("nan"))})
    assert len(packed) == 1


def test_a_failure_leaves_no_loading_report_of_drawn_weights(damaged, caplog):
    with pytest.raises(ValueError, match="cannot be packed"):
        damaged("16-bit", {LAYER + "weight": with_first(float("nan"))})
    assert "MISSING" not in caplog.text


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"null",
        b'"text"',
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": "04"}}',
        b'{"a": {"dtype": 1, "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_header_that_is_json_of_another_shape_is_named(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ValueError, match=r"model\.safetensors must have a safetensors header, .* got other JSON"):
        check_files([str(file)], packed_file=False)


def test_a_header_that_is_nested_too_deeply_is_no_header(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    with pytest.raises(ValueError, match="must be a safetensors file"):
        check_files([str(file)], packed_file=False)


@pytest.mark.parametrize(
    "failure",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no more"), RuntimeError("kernel"), KeyError(1)],
)
def test_whatever_fails_while_quantising_is_raised_as_itself(damaged, monkeypatch, failure, caplog):
    packed = []

    def fails(*args):
        packed.append(1)
        raise failure

    monkeypatch.setattr(NF4Linear, "pack", fails)
    with pytest.raises(type(failure)) as raised:
        damaged("16-bit")
    assert raised.value is failure
    assert len(packed) == 1
    assert "LOAD REPORT" not in caplog.text


def test_ctrl_c_while_quantising_ends_the_load_at_once(damaged, monkeypatch):
    packed = []

    def interrupted(*args):
        packed.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(NF4Linear, "pack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        damaged("16-bit")
    assert len(packed) == 1


def test_new_parameters_are_those_that_no_file_held(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "16-bit", quantization_config=NF4Config())
    assert not new_parameters(model)
    model.lm_head = torch.nn.Linear(128, 259)
    assert new_parameters(model) == {"lm_head.weight", "lm_head.bias"}
    assert not new_parameters(tiny_llama())  # made without a checkpoint: nothing is known
