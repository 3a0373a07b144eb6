"""prepare is all or nothing: what is refused changes nothing, and what is interrupted can be taken up again."""

import contextlib
import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from nf4lora import NF4Config, NF4Linear, prepare, report
from nf4lora.adapters.files import base_hash
from nf4lora.nn.model_tree import evaluating
from nf4lora.preparation.plan import plan_preparation
from nf4lora.quantization import bitsandbytes_format

from support.adapted import IDS, layers, step
from support.bits import assert_same_bits
from support.families import tiny
from support.models import tiny_llama


def llama(**options):
    return tiny_llama(**{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **options})


def loaded(folder, **options):
    llama(**options).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config())


def picture(model):
    """All that must not change: classes, tensors (the very same ones, with the same numbers), who is trained, modes."""
    state = {name: (id(tensor), tensor.clone()) for name, tensor in model.named_parameters()}
    return (
        {name: (type(module), module.training, set(module._forward_hooks)) for name, module in model.named_modules()},
        {name: (address, model.get_parameter(name).requires_grad) for name, (address, _) in state.items()},
        {name: value for name, (_, value) in state.items()},
        set(vars(model)),
    )


def assert_same(before, after):
    assert before[0] == after[0]
    assert before[1] == after[1]
    assert [name for name in before[2] if not torch.equal(before[2][name], after[2][name])] == []
    assert before[3] == after[3]


# --- refused ---------------------------------------------------------------------------------------------------------


REFUSED = {
    "full training of a packed layer": (
        "NF4",
        {"modules_to_save": ["o_proj"]},
        "modules_to_save must name layers in 16",
    ),
    "an embedding trained twice": (
        "16-bit",
        {"modules_to_save": ["embed_tokens"], "trainable_token_indices": {"embed_tokens": [1]}},
        "already marked to be trained fully",
    ),
    "a parameter of a packed layer": (
        "16-bit",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]},
        "must name floating-point parameters",
    ),
    "a module that no adapter fits on": ("16-bit", {"target_modules": ["self_attn"]}, "PEFT cannot put an adapter on"),
    "a rank that is none": (
        "16-bit",
        {"rank_pattern": {"q_proj": -1}},
        "positive integer value but the value passed is -1",
    ),
}


@pytest.mark.parametrize(("kind", "options", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_leaves_the_model_as_it_was(kind, options, match, tmp_path):
    model = loaded(tmp_path) if kind == "NF4" else llama()
    model.model.layers[0].eval()
    before = picture(model.train())
    with pytest.raises((ValueError, TypeError), match=f"(?s)^prepare: .*{match}"):
        prepare(model, **options)
    assert_same(before, picture(model))
    assert len(layers(prepare(model, r=2))) == 14


def test_what_peft_forbids_for_a_family_is_refused_where_it_is_named():
    model = tiny("MambaForCausalLM")
    before = picture(model)
    with pytest.raises(ValueError, match="Module 'out_proj' is incompatible with Mamba-based models"):
        prepare(model, target_modules=["in_proj", "out_proj"])
    assert_same(before, picture(model))
    assert len(layers(prepare(model, r=2))) == 1


def test_a_plan_changes_nothing_and_draws_no_random_numbers():
    model = llama(tied=True)
    before, state = picture(model), torch.get_rng_state()
    plan = plan_preparation(model, LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"]))
    assert len(plan.packing.blocksizes) == 14
    assert_same(before, picture(model))
    assert_same_bits(torch.get_rng_state(), state)


def test_a_layer_of_a_16_bit_model_that_is_trained_in_full_is_not_packed(tmp_path):
    model = prepare(llama(), r=2, modules_to_save=["o_proj"])
    trained = model.get_base_model().model.layers[0].self_attn.o_proj.modules_to_save["default"]
    assert type(trained) is nn.Linear
    assert trained.weight.requires_grad
    step(model)
    assert trained.weight.grad.norm() > 0
    assert {row.reason for row in report(model).kept if "o_proj" in row.name} == {"named in modules_to_save"}
    model.get_base_model().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert base_hash(again) == base_hash(model)
    assert type(again.model.layers[0].self_attn.o_proj) is nn.Linear


# --- interrupted -----------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """As KeyboardInterrupt, which pytest takes for itself."""


def stopping(monkeypatch, owner, name, after):
    """Have a function stop at its last but first call of `after`; gives back how to let it run again."""
    original, calls = getattr(owner, name), []

    def stop(*args, **kwargs):
        calls.append(name)
        if len(calls) > after:
            raise Stop
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, stop)
    return monkeypatch.undo


@pytest.mark.parametrize("config", [None, NF4Config(blocksize=32, double_quant=False)])
@pytest.mark.parametrize("plain", [False, True])
def test_an_interrupted_prepare_called_again_finishes(plain, config, monkeypatch):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(14))) if plain else llama()

    def prepared(model, **options):
        torch.manual_seed(1)
        return prepare(model, r=2, **options)

    expected, model = prepared(make(), quantization_config=config), make()
    resume = stopping(monkeypatch, NF4Linear, "pack", after=5)
    with pytest.raises(Stop):
        prepare(model, r=2, quantization_config=config)
    resume()
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 5
    again = prepared(model)  # without the config: it goes on as it began
    assert base_hash(again) == base_hash(expected)
    assert len(layers(again)) == 14
    x = torch.ones(1, 64) if plain else IDS
    assert torch.equal(*(m(x) if plain else m(x).logits for m in (again, expected)))
    if not plain:
        assert again.get_base_model().config.quantization_config == expected.get_base_model().config.quantization_config


def test_an_interrupted_adoption_called_again_finishes(monkeypatch, tmp_path):
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path / "16")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "16", dtype=torch.float32, quantization_config=how)
        for _ in range(2)
    )
    resume = stopping(monkeypatch, bitsandbytes_format, "_packed_layer", after=5)
    with pytest.raises(Stop):
        prepare(model)
    resume()
    again = prepare(model, r=2)
    assert base_hash(again) == base_hash(prepare(other, r=2))
    again.get_base_model().save_pretrained(tmp_path / "4")
    assert base_hash(AutoModelForCausalLM.from_pretrained(tmp_path / "4")) == base_hash(again)


@pytest.mark.parametrize("where", ["chunk_loss", "report"])
def test_what_stops_after_the_adapters_are_on_takes_them_off(where, monkeypatch, tmp_path):
    model = loaded(tmp_path)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    before = picture(model)

    def stop(*arguments):
        raise Stop

    monkeypatch.setitem(prepare.__globals__, where, stop)
    with pytest.raises(Stop):
        prepare(model, r=2, modules_to_save=["lm_head"])
    monkeypatch.undo()
    assert_same(before, picture(model))
    assert len(layers(prepare(model, r=2))) == 14


def test_a_foreign_adapter_survives_what_is_refused():
    from peft import get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = picture(model)
    with pytest.raises(ValueError, match="r must be that of the adapter"):
        prepare(model, r=8)
    assert_same(before, picture(model))
    assert len(layers(prepare(model))) == 14


# --- layers that stand at several places -----------------------------------------------------------------------------


def test_a_block_that_is_applied_twice_is_packed_and_adapted_as_one():
    block = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    model = nn.Sequential(block, nn.ReLU(), block)
    one = prepare(copy.deepcopy(model), r=2)
    base = one.get_base_model()
    assert base[0] is base[2]
    assert len(layers(one)) == 2
    assert all(isinstance(layer.base_layer, NF4Linear) for layer in layers(one))
    one(torch.randn(3, 64)).sum().backward()
    assert layers(one)[0].lora_B["default"].weight.grad.norm() > 0


def test_a_layer_of_two_parents_is_replaced_in_both():
    shared = nn.Linear(64, 64)
    model = nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared, nn.Linear(64, 64))])
    base = prepare(model, r=2, target_modules=["1.1"]).get_base_model()
    assert isinstance(base[0][0], NF4Linear)
    assert base[0][0] is base[1][0]


class Twice(LlamaForCausalLM):
    """A Llama that applies one block of weights in both of its layers."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].mlp = self.model.layers[0].mlp


def test_hooks_on_a_layer_that_is_packed_go_over_to_the_packed_one_and_back():
    model, seen = tiny_llama(num_hidden_layers=2), []
    layer = model.model.layers[1].self_attn.q_proj
    kinds = ["forward_pre", "forward_pre kwargs", "forward", "forward kwargs", "full_backward", "full_backward_pre"]
    handles = [
        layer.register_forward_pre_hook(lambda *_: seen.append(kinds[0])),
        layer.register_forward_pre_hook(lambda module, inputs, kwargs: seen.append(kinds[1]), with_kwargs=True),
        layer.register_forward_hook(lambda *_: seen.append(kinds[2])),
        layer.register_forward_hook(
            lambda module, inputs, kwargs, output: seen.append(kinds[3]), with_kwargs=True, always_call=True
        ),
        layer.register_full_backward_hook(lambda *_: seen.append(kinds[4])),
        layer.register_full_backward_pre_hook(lambda *_: seen.append(kinds[5])),
    ]

    def called(model):
        seen.clear()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return sorted(seen)

    model = prepare(model, r=2)
    assert called(model) == sorted(kinds)
    model.get_base_model().dequantize()
    assert called(model) == sorted(kinds)
    for handle in handles:
        handle.remove()
    assert called(model) == []


@pytest.mark.parametrize(
    "norm", [nn.utils.weight_norm, nn.utils.spectral_norm, lambda layer: prune.identity(layer, "weight")]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_hook_that_makes_the_weight_stays_behind(norm):
    model, seen = tiny_llama(num_hidden_layers=1), []
    layer = model.model.layers[0].self_attn.q_proj
    norm(layer).register_forward_hook(lambda *_: seen.append(1))
    model(input_ids=IDS)
    expected = layer.weight.detach().clone()
    prepared = prepare(model, r=2)
    seen.clear()
    prepared(input_ids=IDS, labels=IDS).loss.backward()
    packed = prepared.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert len(seen) == 1
    assert not packed._forward_pre_hooks
    assert (packed.dequantize() - expected).abs().max() < 0.2 * expected.abs().max()


def test_a_shared_layer_stays_shared_through_dequantize():
    model = prepare(Twice(llama().config).eval(), r=2).unload().dequantize()
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert model.model.layers[0].mlp.up_proj is model.model.layers[1].mlp.up_proj


def test_a_shared_layer_is_loaded_as_one(tmp_path):
    apart = llama()
    apart.model.layers[1].mlp.load_state_dict(apart.model.layers[0].mlp.state_dict())
    apart.save_pretrained(tmp_path)
    model = Twice.from_pretrained(tmp_path, quantization_config=NF4Config())
    assert isinstance(model.model.layers[0].mlp.up_proj, NF4Linear)
    assert model.model.layers[0].mlp.up_proj is model.model.layers[1].mlp.up_proj
    assert_same_bits(model(IDS).logits, prepare(apart, r=2)(IDS).logits)


# --- modes -----------------------------------------------------------------------------------------------------------


def test_a_look_in_eval_mode_gives_each_module_its_own_mode_back():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(4, 4))).train()
    model[1].eval()  # a frozen tower
    modes = [module.training for module in model.modules()]
    for stops in (False, True):
        with contextlib.suppress(Stop), evaluating(model):
            assert not any(module.training for module in model.modules())
            if stops:
                raise Stop
        assert [module.training for module in model.modules()] == modes
