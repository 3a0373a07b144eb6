"""NF4Config: what it accepts, what it answers to other tools' words, and what it writes into config.json."""

import copy
import json

import pytest
import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers import AutoQuantizationConfig

from nf4lora.quantization.config import NF4Config

BNB = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_config_json_holds_every_option_and_the_format_version():
    config = NF4Config(False, 128, ["lm_head"], torch.bfloat16)
    assert json.loads(json.dumps(config.to_dict())) == {
        "quant_method": "nf4lora",
        "format_version": 1,
        "double_quant": False,
        "blocksize": 128,
        "modules_to_not_convert": ["lm_head"],
        "compute_dtype": "bfloat16",
    }


@pytest.mark.parametrize(
    "config",
    [NF4Config(), NF4Config(False, 32), NF4Config(True, 4096, ["a", "b.*"], "float16"), NF4Config.from_bnb(BNB)],
)
def test_config_comes_back_from_its_dict_as_transformers_reads_it(config):
    again = AutoQuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert type(again) is NF4Config
    assert vars(again) == vars(config)
    assert again == config


def test_configs_that_differ_are_unequal():
    assert NF4Config() == NF4Config(blocksize=64)
    assert NF4Config() != NF4Config(blocksize=32)
    assert NF4Config() != NF4Config(double_quant=False)
    assert NF4Config() != NF4Config.from_bnb(BNB | {"bnb_4bit_use_double_quant": True})  # another layout on disk


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("bnb_4bit_use_double_quant", "use double_quant"),
        ("bnb_4bit_compute_dtype", "use compute_dtype"),
        ("llm_int8_skip_modules", "use modules_to_not_convert"),
        ("load_in_4bit", "leave it out"),
        ("bnb_4bit_quant_type", "leave it out"),
        ("bnb_4bit_quant_storage", "leave it out"),
        ("group_size", "use blocksize"),
        ("double_qant", r"did you mean double_quant\?"),
        ("modules_not_to_convert", r"did you mean modules_to_not_convert\?"),
        ("colour", "there are double_quant, blocksize, modules_to_not_convert, compute_dtype"),
    ],
)
def test_an_unknown_keyword_is_answered_with_the_one_that_was_meant(name, advice):
    with pytest.raises(TypeError, match=f"NF4Config: keyword '{name}' is unknown: {advice}"):
        NF4Config(**{name: True})
    with pytest.raises(TypeError, match=advice):
        NF4Config.from_dict(NF4Config().to_dict() | {name: True})


@pytest.mark.parametrize(
    ("kwargs", "kind", "text"),
    [
        ({"blocksize": 48}, ValueError, "blocksize must be a power of two between 32 and 4096, got 48"),
        ({"blocksize": "64"}, TypeError, "blocksize must be an int, got str"),
        ({"double_quant": 1}, TypeError, "double_quant must be a bool, got int"),
        ({"modules_to_not_convert": "lm_head"}, TypeError, "must be a list of names, got 'lm_head'"),
        ({"modules_to_not_convert": [1]}, TypeError, "must be a list of names"),
        ({"compute_dtype": "int8"}, ValueError, "compute_dtype must be float32, bfloat16 or float16, got int8"),
        ({"compute_dtype": torch.float64}, ValueError, "got torch.float64"),
        ({"compute_dtype": 16}, TypeError, "compute_dtype must be a torch.dtype, got int"),
    ],
)
def test_a_bad_value_is_refused_by_name(kwargs, kind, text):
    with pytest.raises(kind, match=text):
        NF4Config(**kwargs)


def test_a_newer_format_is_refused_by_name():
    with pytest.raises(ValueError, match=r"format_version must be at most 1, got 2; .* newer nf4lora: pip install"):
        NF4Config.from_dict({"quant_method": "nf4lora", "format_version": 2, "blocksize": 64})


@pytest.mark.parametrize("values", [{"quant_method": "gptq"}, {"layout": "gguf"}, {"format_version": "1"}])
def test_a_config_of_something_else_is_refused(values):
    with pytest.raises(ValueError, match=f"NF4Config: {next(iter(values))} must be"):
        NF4Config.from_dict(values)


def test_from_bnb_carries_every_option_over():
    bnb = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "score"],
    )
    for given in (bnb, bnb.to_dict(), json.loads(json.dumps(bnb.to_dict()))):
        config = NF4Config.from_bnb(given)
        assert config.double_quant is True
        assert config.compute_dtype is torch.bfloat16
        assert config.modules_to_not_convert == ["lm_head", "score"]
        assert (config.blocksize, config.layout) == (64, "bitsandbytes")


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"load_in_4bit": True}, "fp4"),  # what bitsandbytes takes where nothing is said
        ({"load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}, "load_in_8bit"),
        ({"quant_method": "gptq", "bits": 4}, "fp4"),
    ],
)
def test_from_bnb_refuses_what_is_not_nf4(values, got):
    with pytest.raises(ValueError, match=f"must be packed in nf4 with load_in_4bit, got .*{got}"):
        NF4Config.from_bnb(values)


def test_what_was_given_is_known_and_compared_with_nothing():
    assert NF4Config().given == frozenset()
    assert NF4Config(blocksize=64).given == {"blocksize"}
    assert NF4Config(True, compute_dtype="bfloat16").given == {"double_quant", "compute_dtype"}
    assert copy.deepcopy(NF4Config(blocksize=64)).given == {"blocksize"}
    assert NF4Config(True, 64) == NF4Config()
    assert (NF4Config().double_quant, NF4Config().blocksize) == (True, 64)
