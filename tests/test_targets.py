"""Which modules carry adapters: the text part of a multimodal model, no router, nothing that PEFT cannot take."""

import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import nn

from nf4lora import NF4Config, NF4Linear, load_adapter, prepare, report, save_adapter
from nf4lora.adapters.files import base_name
from nf4lora.preparation.targets import find_targets, is_linear
from nf4lora.preparation.task import text_part

from support.adapted import layers, trainable
from support.families import answer, inputs, tiny
from support.models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:prepare. .* of the weights beyond embeddings:UserWarning")

MULTIMODAL = {
    "LlavaForConditionalGeneration": "model.language_model",
    "Gemma3ForConditionalGeneration": "model.language_model",
    "Gemma4ForConditionalGeneration": "model.language_model",
    "Mistral3ForConditionalGeneration": "model.language_model",
    "Qwen2AudioForConditionalGeneration": "model.language_model",
}


def adapted_names(model):
    return {base_name(name.removesuffix(".lora_A.default.weight")) for name in trainable(model) if "lora_A" in name}


# --- multimodal models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MULTIMODAL)
@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "v_proj"]])
def test_text_reaches_every_adapter_of_a_multimodal_model(name, target, capsys):
    model = prepare(tiny(name), r=2, target_modules=target)
    part = MULTIMODAL[name]
    assert all(found.startswith(f"{part}.") for found in adapted_names(model))
    assert f"adapters on {part} alone" in capsys.readouterr().out
    tower = [module for n, module in model.named_modules() if "tower" in n and n.endswith("q_proj")]
    packed = [module for outer in tower for module in outer.modules() if isinstance(module, NF4Linear)]
    assert packed, "the towers are packed, without adapters"
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.05)
    answer(model, inputs(model.get_base_model())).square().sum().backward()
    assert [n for n, parameter in trainable(model).items() if parameter.grad is None] == []


def test_a_tower_is_adapted_where_its_layers_are_named(tmp_path):
    name, tower = "LlavaForConditionalGeneration", "model.vision_tower"
    everywhere = prepare(tiny(name), r=2, target_modules=r".*\.(q_proj|v_proj)")
    assert {found.startswith(tower) for found in adapted_names(everywhere)} == {True, False}
    tiny(name).save_pretrained(tmp_path / "base")
    load = getattr(transformers, name).from_pretrained
    one = "vision_tower.encoder.layers.0.self_attn.v_proj"
    model = prepare(load(tmp_path / "base", quantization_config=NF4Config()), r=2, target_modules=["q_proj", one])
    found = adapted_names(model)
    assert {each for each in found if each.startswith(tower)} == {f"model.{one}"}
    assert {each for each in found if not each.startswith(tower)} == {"model.language_model.layers.0.self_attn.q_proj"}
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load(tmp_path / "base", quantization_config=NF4Config()), tmp_path / "adapter")
    assert adapted_names(again) == found


def test_what_is_one_model_has_no_text_part():
    for name in ("LlamaForCausalLM", "T5ForConditionalGeneration", "WhisperForConditionalGeneration", "CLIPModel"):
        assert text_part(tiny(name)) is None, name
    assert len(adapted_names(prepare(tiny("CLIPModel"), r=2))) == 14


def test_a_wrapper_that_peft_cannot_take_is_left_out(capsys):
    """Gemma 4's towers hold their linear layers in Gemma4ClippableLinear, under the names of the text's."""
    model = tiny("Gemma4ForConditionalGeneration")
    with pytest.raises(ValueError, match="is not supported. Currently"):
        get_peft_model(tiny("Gemma4ForConditionalGeneration"), LoraConfig(target_modules=["q_proj"]))
    everywhere = prepare(model, r=2, target_modules=r".*\.(q_proj|v_proj)")
    assert adapted_names(everywhere) == {f"model.language_model.layers.0.self_attn.{n}_proj" for n in "qv"}
    assert "PEFT cannot put an adapter on Gemma4ClippableLinear" in capsys.readouterr().out


def test_exclude_modules_is_passed_through_and_joined():
    model = prepare(tiny_llama(), r=2, exclude_modules=["q_proj"])
    assert not [name for name in adapted_names(model) if "q_proj" in name]
    assert len(layers(model)) == 12
    pattern = prepare(tiny_llama(), r=2, exclude_modules=r".*\.1\..*")
    assert {name.split(".")[2] for name in adapted_names(pattern)} == {"0"}
    for given in (["v_proj"], r".*v_proj"):
        joined = prepare(
            tiny("LlavaForConditionalGeneration"), r=2, target_modules=["q_proj", "v_proj"], exclude_modules=given
        )
        assert adapted_names(joined) == {"model.language_model.layers.0.self_attn.q_proj"}


# --- layers that are no plain linear layer ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama4ForCausalLM", "PhimoeForCausalLM"])
def test_a_router_stays_as_it_is_and_carries_no_adapter(name, capsys):
    model = tiny(name)
    routers = {n: module for n, module in model.named_modules() if "Router" in type(module).__name__}
    prepared = prepare(model, r=2)
    assert all(model.get_submodule(n) is module for n, module in routers.items())
    assert routers
    assert not adapted_names(prepared) & routers.keys()
    assert "no adapter on 1 layers called router" in capsys.readouterr().out
    answer(prepared, inputs(model))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("MambaForCausalLM", {"in_proj"}),
        ("Mamba2ForCausalLM", {"in_proj"}),
        (
            "FalconH1ForCausalLM",
            {"in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
    ],
)
def test_all_linear_leaves_out_what_peft_forbids_for_the_family(name, kept, capsys):
    model = prepare(tiny(name), r=2)
    assert {found.rpartition(".")[2] for found in adapted_names(model)} == kept
    assert re.search(r"no adapter on .*out_proj.* \(PEFT allows no adapter on out_proj of", capsys.readouterr().out)


def test_a_linear_layer_is_known_by_what_it_computes():
    class Plain(nn.Linear):
        pass

    class Written(nn.Linear):
        def forward(self, input):
            hidden = input @ self.weight.T
            return hidden if self.bias is None else hidden + self.bias

    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * F.linear(input, self.weight, self.bias)

    class Routing(nn.Linear):
        def forward(self, input):
            logits = super().forward(input)
            return logits.softmax(-1), logits

    class Asking(nn.Linear):
        def forward(self, input, experts):
            return super().forward(input) * experts

    for cls, linear in ((Plain, True), (Written, True), (Scaled, False), (Routing, False), (Asking, False)):
        for bias in (False, True):
            layer = cls(64, 32, bias=bias).train()
            weight = layer.weight
            assert is_linear(layer) == linear
            assert layer.weight is weight
            assert layer.training
            assert is_linear(cls(64, 32, bias=bias, device="meta")) == linear
    assert is_linear(tiny("LlamaForCausalLM").model.layers[0].mlp.up_proj)


def test_a_forward_of_a_layers_own_is_not_that_of_its_class():
    class Plain(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias)

    layer = Plain(64, 32)
    assert is_linear(layer)
    layer.forward = lambda x: Plain.forward(layer, x).relu()
    assert not is_linear(layer)
    hooked = Plain(64, 32)
    add_hook_to_module(hooked, ModelHook())  # accelerate's, whose forward calls that of the class
    assert is_linear(hooked)


def test_the_names_that_peft_gets_say_the_same_to_whoever_loads_the_adapter():
    for name in ("Llama4ForCausalLM", "MambaForCausalLM", "LlavaForConditionalGeneration", "LlamaForCausalLM"):
        model = tiny(name)
        asked = LoraConfig(r=2, target_modules="all-linear")
        targets = find_targets(model, asked)
        alone = get_peft_model(
            tiny(name),
            LoraConfig(r=2, target_modules=targets.target_modules, exclude_modules=targets.exclude_modules),
        )
        assert adapted_names(alone) == targets.names


def test_where_nothing_can_carry_an_adapter_it_says_why():
    with pytest.raises(
        ValueError, match=r"must match a module that can carry an adapter, got \['self_attn'\].*PEFT can"
    ):
        prepare(tiny_llama(), target_modules=["self_attn"])


def test_a_head_that_is_trained_in_full_carries_no_adapter_and_is_not_called_missing(recwarn):
    model = prepare(tiny("ViTForImageClassification"), r=2, target_modules=["q_proj", "classifier"])
    assert {name.rpartition(".")[2] for name in adapted_names(model)} == {"q_proj"}
    assert not [warning for warning in recwarn if "nothing is called" in str(warning.message)]
    with pytest.raises(ValueError, match=r"got \['classifier'\]; classifier is trained in full already"):
        prepare(tiny("ViTForImageClassification"), target_modules=["classifier"])


def test_a_name_to_train_in_full_that_is_nobodys_is_warned_of():
    with pytest.warns(UserWarning, match="nothing is called nope, which modules_to_save names"):
        prepare(tiny_llama(), r=2, modules_to_save=["nope"])


# --- what stays in 16 bits is said -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
def test_a_model_that_mostly_stays_in_16_bits_is_warned_of():
    with pytest.warns(
        UserWarning, match=r"80% of the weights beyond .* several experts in one tensor .* a dense model"
    ):
        model = prepare(tiny("MixtralForCausalLM"), r=2, target_modules=["q_proj"])
    experts = sum(p.numel() for n, p in model.named_parameters() if "experts" in n or "mlp.gate" in n)
    packed = sum(layer.in_features * layer.out_features for layer in model.modules() if isinstance(layer, NF4Linear))
    assert f"{experts / (experts + packed):.0%}" in report(model).mostly_unpacked()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForSequenceClassification", "T5EncoderModel"])
def test_embeddings_heads_and_what_the_user_kept_are_no_surprise(name):
    model = prepare(tiny(name), r=2, quantization_config=NF4Config(modules_to_not_convert=["wo", "down_proj"]))
    assert report(model).mostly_unpacked() is None


# --- leftovers of another recipe -------------------------------------------------------------------------------------


def test_prepare_model_for_kbit_training_is_told_to_be_left_out(tmp_path):
    from peft import prepare_model_for_kbit_training

    tiny("LlamaForCausalLM").to(torch.bfloat16).save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    for options in ({}, {"quantization_config": NF4Config()}):
        model = load(tmp_path, dtype=torch.bfloat16, **options)
        with pytest.warns(
            UserWarning, match=r"loaded in bfloat16.*prepare_model_for_kbit_training.*Leave that call out"
        ):
            prepare(prepare_model_for_kbit_training(model), r=2)


def test_a_model_in_float32_by_wish_is_not_warned_of(recwarn, tmp_path):
    tiny("LlamaForCausalLM").save_pretrained(tmp_path)
    prepare(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), r=2)
    prepare(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), r=2)
    assert not [warning for warning in recwarn if "prepare:" in str(warning.message)]
