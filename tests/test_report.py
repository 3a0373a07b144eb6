"""report: every byte once, every reason, every adapter; the numbers are derived afresh from the model's shapes."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from nf4lora import NF4Config, NF4Linear, prepare, report

from support.adapted import adapted, packed_llama, trainable
from support.models import tiny_llama

HIDDEN, INNER, VOCABULARY, KEY = 64, 128, 259, 32  # of packed_llama: one layer, two key heads of 16
WEIGHTS = HIDDEN * HIDDEN * 2 + HIDDEN * KEY * 2 + HIDDEN * INNER * 3


def size(about, kind):
    return sum(row.bytes for row in about.tensors if row.kind == kind)


def reasons(about):
    return {row.name: row.reason for row in about.kept}


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_bytes_of_a_packed_model_by_kind():
    about = report(packed_llama())
    assert size(about, "packed codes") == WEIGHTS // 2
    assert size(about, "absmax") == WEIGHTS // 64
    assert size(about, "nested absmax") == 4 * 7 * 2  # fewer than 256 blocks a layer: one scale, one offset
    assert size(about, "embeddings") == size(about, "output head") == 4 * VOCABULARY * HIDDEN
    assert size(about, "norms") == 4 * 3 * HIDDEN
    assert size(about, "linear, not packed") == size(about, "biases") == size(about, "adapters") == 0
    assert about.packed_layers == about.linear_layers == 7
    assert about.bits_per_weight == 8 * (WEIGHTS // 2 + WEIGHTS // 64 + 56) / WEIGHTS
    assert about.parameters == WEIGHTS + 2 * VOCABULARY * HIDDEN + 3 * HIDDEN


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"attention_bias": True}, {"dtype": torch.bfloat16}])
def test_the_total_is_what_the_tensors_take(options):
    for model in (packed_llama(**options), adapted(packed_llama(**options), modules_to_save=["lm_head"])):
        tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
        assert report(model).bytes == sum(tensors.values())


def test_a_tied_tensor_counts_once():
    about = report(packed_llama(tied=True))
    assert size(about, "embeddings") == 4 * VOCABULARY * HIDDEN
    assert size(about, "output head") == 0
    assert about.parameters == WEIGHTS + VOCABULARY * HIDDEN + 3 * HIDDEN
    assert [(row.bytes, row.reason) for row in about.kept if row.name == "lm_head"] == [
        (0, "output head, tied to the embedding")
    ]
    first, second = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
    second.weight.data = first.weight.data  # two parameters, one memory
    assert report(nn.Sequential(first, second)).bytes == 4 * 32 * 32


def test_kinds_are_split_by_dtype():
    model = packed_llama(dtype=torch.bfloat16, attention_bias=True)
    model.model.norm.float()
    about = report(model)
    assert {(row.dtype, row.bytes) for row in about.tensors if row.kind == "norms"} == {
        ("bfloat16", 2 * 2 * HIDDEN),
        ("float32", 4 * HIDDEN),
    }
    assert size(about, "biases") == 2 * (2 * HIDDEN + 2 * KEY)


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4 + 8 / 64 + 32 * (64 + 1) / (256 * 4096)), (False, 4.5)])
def test_bits_per_weight_are_those_of_the_paper(double_quant, bits):
    """QLoRA, section 3: 0.127 bits for the scales with double quantisation, 0.5 without (and one offset a layer)."""
    layer = NF4Linear.from_linear(nn.Linear(256, 4096, bias=False), double_quant=double_quant)
    assert report(layer).bits_per_weight == bits


# --- reasons ---------------------------------------------------------------------------------------------------------


def test_what_is_not_packed_says_why(tmp_path):
    assert reasons(report(packed_llama())) == {
        "model.embed_tokens": "an embedding is looked up, not multiplied",
        "lm_head": "output head",
    }
    model = tiny_llama(hidden_size=64, intermediate_size=100, num_hidden_layers=1)
    about = report(prepare(model, quantization_config=NF4Config(modules_to_not_convert=["v_proj"])))
    said = {name.rpartition(".")[2]: reason for name, reason in reasons(about).items()}
    assert said["v_proj"] == "named in modules_to_not_convert"
    assert said["down_proj"] == "in_features 100 is no multiple of 32"
    assert "up_proj" not in said
    plain = reasons(report(tiny_llama(num_hidden_layers=1)))
    assert plain["model.layers.0.mlp.up_proj"] == "the model is not quantised"
    assert report(tiny_llama()).bits_per_weight is None


def test_layers_of_another_kind_are_named_by_their_class():
    class Odd(nn.Linear):
        pass

    model = nn.ModuleDict(
        {"odd": Odd(64, 64), "conv": nn.Conv1d(4, 4, 3), "packed": NF4Linear.from_linear(nn.Linear(64, 8))}
    )
    assert reasons(report(model)) == {
        "odd": "Odd is not torch.nn.Linear itself",
        "conv": "Conv1d is not a linear layer",
    }


def test_layers_that_bitsandbytes_packed_are_told_apart():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")
    about = report(model)
    assert reasons(about) == {"0": "packed as Linear4bit; nf4lora.prepare adopts it"}
    assert about.parameters == 64 * 32 + 32
    assert size(about, "packed codes") == 64 * 32 // 2


# --- adapters --------------------------------------------------------------------------------------------------------


def test_adapters_are_counted_by_name_of_their_layer():
    model = adapted(
        packed_llama(num_hidden_layers=3), target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2]
    )
    about = report(model)
    assert {(row.name, row.count, row.of, row.packed) for row in about.adapters} == {
        ("q_proj", 2, 3, 2),
        ("down_proj", 2, 3, 2),
    }
    assert (about.adapted_layers, about.linear_layers) == (4, 21)
    assert about.trainable == sum(parameter.numel() for parameter in trainable(model).values())
    assert size(about, "adapters") == 4 * about.trainable
    assert "adapters on 4 of 21 linear layers (19.0%): q_proj 2/3, down_proj 2/3" in str(about)


def test_an_adapter_over_a_layer_that_is_not_packed_is_said():
    about = report(adapted(packed_llama(), target_modules=["q_proj", "lm_head"]))
    assert {(row.name, row.count, row.of, row.packed) for row in about.adapters} == {
        ("q_proj", 1, 1, 1),
        ("lm_head", 1, 0, 0),
    }
    assert "adapters on 1 of 7 linear layers (14.3%) and 1 other modules: q_proj 1/1, lm_head 1" in str(about)
    assert "1 of them over a layer that is not packed" in str(about)


def test_layers_trained_in_full_are_named_and_their_copies_are_adapters():
    model = adapted(packed_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    about = report(model)
    assert about.trained_in_full == ("lm_head",)
    assert size(about, "adapters") == 4 * (4 * HIDDEN * 2 + VOCABULARY * HIDDEN)
    assert size(about, "output head") == 4 * VOCABULARY * HIDDEN
    assert "trained in full: lm_head" in str(about)


def test_the_base_counts_the_same_with_and_without_adapters():
    bare, prepared = report(packed_llama()), report(adapted(packed_llama()))
    assert [row for row in prepared.tensors if row.kind != "adapters"] == list(bare.tensors)
    assert prepared.kept == bare.kept
    assert prepared.bits_per_weight == bare.bits_per_weight


# --- the object ------------------------------------------------------------------------------------------------------


def test_it_prints_a_table_that_adds_up_with_one_line_for_all_layers_alike():
    text = str(report(tiny_llama(num_hidden_layers=3)))
    assert text.splitlines()[0].split() == ["kind", "dtype", "tensors", "MiB", "share"]
    assert "not packed: model.layers.*.mlp.up_proj x3 (float32, 0.38 MiB): the model is not quantised" in text
    assert "trainable: " in text
    assert "(100.00%)" in text


def test_to_dict_is_plain_and_goes_through_json():
    about = report(adapted(packed_llama()))
    values = about.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["bytes"] == sum(row["bytes"] for row in values["tensors"])
    assert values["adapters"][0] == {"name": "q_proj", "count": 1, "of": 1, "packed": 1}


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        report(packed_llama()).trainable = 1


@pytest.mark.slow
def test_it_does_not_import_peft_for_a_model_without_it():
    program = """
import sys, torch, nf4lora
str(nf4lora.report(torch.nn.Linear(64, 64)))
assert "peft" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_what_is_no_model_is_a_type_error():
    with pytest.raises(TypeError, match=r"report: model must be an nn\.Module, got dict"):
        report({})
