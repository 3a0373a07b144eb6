"""prepare: every kind of model in, the same model in NF4 with the fused op out; and what is refused, untouched."""

import copy
import gc
import inspect
import re
import warnings
import weakref

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from nf4lora import NF4Config, NF4Linear, prepare, report
from nf4lora.adapters.files import base_hash

from support.adapted import IDS, adapted, config, dequantised, layers, packed_llama, relative, step, trainable
from support.bits import assert_same_bits
from support.models import tiny_llama, tiny_tokenizer


def llama(**options):
    return tiny_llama(**{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, **options})


def loaded(folder, **options):
    """The tiny Llama, saved and read back in NF4."""
    llama(**options).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config())


def perturbed(model):
    """B is zero at the start; here every adapter does something."""
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.05)
    return model


# --- what comes in ---------------------------------------------------------------------------------------------------


def test_a_16_bit_model_is_packed_in_place_as_it_would_have_been_while_loading(tmp_path):
    expected = base_hash(loaded(tmp_path))
    model = llama()
    prepared = prepare(model)
    assert prepared.get_base_model() is model
    assert base_hash(model) == expected
    assert len(layers(prepared)) == 7


@pytest.mark.slow
def test_each_16_bit_weight_is_freed_before_the_next_layer_is_packed(monkeypatch):
    model = llama()
    weights = [weakref.ref(m.weight) for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    alive = []
    original = NF4Linear.from_linear.__func__

    def counting(cls, *args, **kwargs):
        gc.collect()
        alive.append(sum(weight() is not None for weight in weights))
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(NF4Linear, "from_linear", classmethod(counting))
    prepare(model)
    assert alive == [7, 6, 5, 4, 3, 2, 1]
    gc.collect()
    assert not any(weight() is not None for weight in weights)


def test_nothing_but_the_packed_layers_changes():
    model = llama(tied=True, dtype=torch.bfloat16)
    kept = {n: p for n, p in model.named_parameters() if "proj" not in n}
    before = {name: parameter.clone() for name, parameter in kept.items()}
    base = prepare(model, r=4).get_base_model()
    after = dict(base.named_parameters())
    assert base.lm_head.weight is base.model.embed_tokens.weight
    for name, parameter in kept.items():
        assert after[name] is parameter
        assert_same_bits(parameter, before[name])
        assert not parameter.requires_grad
    assert {parameter.dtype for parameter in trainable(base).values()} == {torch.float32}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", ["16-bit", "NF4", "bitsandbytes"])
def test_every_kind_of_model_with_or_without_peft_gives_the_same(kind, wrapped, tmp_path):
    if kind == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path)
    bnb = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    how = {"16-bit": None, "NF4": NF4Config(), "bitsandbytes": bnb}[kind]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=how)
    addresses = {name: p.data_ptr() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    if wrapped:
        torch.manual_seed(1)
        model = get_peft_model(model, config())
        expected = {name: parameter.clone() for name, parameter in trainable(model).items()}
        prepared = prepare(model)
        assert prepared is model
        assert all(torch.equal(parameter, expected[name]) for name, parameter in trainable(model).items())
    else:
        torch.manual_seed(1)
        prepared = prepare(
            model, **{k: v for k, v in config().__dict__.items() if k in ("r", "lora_alpha", "init_lora_weights")}
        )
    assert isinstance(prepared, PeftModel)
    assert len(layers(prepared)) == 7
    base = prepared.get_base_model()
    if kind == "bitsandbytes":
        packed = {name.replace(".base_layer", ""): p.data_ptr() for name, p in base.named_parameters()}
        assert all(packed[name] == address for name, address in addresses.items() if name in packed)
        assert not hasattr(base, "is_loaded_in_4bit")
    ours, theirs = step(prepared), step(adapted(dequantised(packed_llama())))
    # bitsandbytes' own 8-bit scales may differ from ours in up to 0.5 % of the blocks.
    tolerance = 1e-2 if kind == "bitsandbytes" else 1e-5
    assert relative(ours[0], theirs[0]) < tolerance
    assert ours[1].keys() == theirs[1].keys()
    assert all(relative(ours[1][name], theirs[1][name]) < 2 * tolerance for name in ours[1])


def test_gradients_are_those_of_peft_on_the_dequantised_model():
    ours = perturbed(prepare(llama(num_hidden_layers=2), r=8))
    theirs = get_peft_model(
        dequantised(copy.deepcopy(ours).unload()),
        LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    theirs.load_state_dict({n: p for n, p in ours.state_dict().items() if "lora_" in n}, strict=False)
    (logits, grads), (expected, expected_grads) = step(ours), step(theirs)
    assert relative(logits, expected) < 1e-5
    assert grads.keys() == expected_grads.keys()
    assert all(relative(grads[name], expected_grads[name]) < 1e-5 for name in grads)


def test_a_plain_module_of_linear_layers_is_prepared_too():
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 5))
    prepared = prepare(model, r=2)
    assert [layer.base_layer.blocksize for layer in layers(prepared)] == [64, 32]
    prepared(torch.randn(3, 64)).sum().backward()
    assert layers(prepared)[1].lora_B["default"].weight.grad.norm() > 0


def test_a_layer_that_stands_in_two_places_stays_one_layer():
    shared = nn.Linear(64, 64)
    prepared = prepare(nn.Sequential(shared, nn.ReLU(), shared), r=2)
    first, last = prepared.get_base_model()[0], prepared.get_base_model()[2]
    assert first.base_layer is last  # PEFT wraps the first place only
    assert isinstance(last, NF4Linear)


def test_how_to_pack_is_said_by_a_config_ours_or_bitsandbytes():
    model = prepare(
        llama(), quantization_config=NF4Config(blocksize=32, double_quant=False, compute_dtype=torch.bfloat16)
    )
    layer = layers(model)[0].base_layer
    assert (layer.blocksize, layer.double_quant, layer.compute_dtype) == (32, False, torch.bfloat16)
    bnb = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["o_proj"]
    )
    model = prepare(llama(), target_modules=["q_proj", "o_proj"], quantization_config=bnb)
    assert layers(model)[0].base_layer.double_quant
    assert type(model.get_base_model().model.layers[0].self_attn.o_proj.base_layer) is nn.Linear
    assert len(layers(model)) == 1


def test_layers_that_cannot_be_packed_keep_their_16_bits_and_carry_adapters():
    model = prepare(llama(intermediate_size=100), r=4)
    down = model.get_base_model().model.layers[0].mlp.down_proj
    assert type(down.base_layer) is nn.Linear
    about = report(model)
    assert about.adapted_layers == 7
    assert [(row.count, row.packed) for row in about.adapters if row.name == "down_proj"] == [(1, 0)]
    assert ("model.layers.0.mlp.down_proj", "in_features 100 is no multiple of 32") in [
        (row.name, row.reason) for row in about.kept
    ]
    _, grads = step(perturbed(model))
    assert all(grad.norm() > 0 for grad in grads.values())


# --- options ---------------------------------------------------------------------------------------------------------


def test_options_and_a_lora_config_give_the_same():
    given = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    before = copy.deepcopy(given)
    torch.manual_seed(1)
    one = prepare(llama(), given)
    torch.manual_seed(1)
    other = prepare(llama(), r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    assert given == before, "the caller's configuration is not written into"
    assert type(one) is type(other) is peft.PeftModelForCausalLM
    ours, theirs = trainable(one), trainable(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_defaults_are_those_of_the_documentation():
    adapter = prepare(llama()).active_peft_config
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.task_type) == (16, 32, 0.0, "CAUSAL_LM")
    text = inspect.getdoc(prepare)
    assert all(
        said in text for said in ("16 where left out", "32 where left out", "0.0", '"all-linear" where left out')
    )


def test_every_option_of_peft_is_taken_by_its_name():
    model = prepare(llama(), r=4, use_rslora=True, modules_to_save=["lm_head"], rank_pattern={"q_proj": 2})
    q_proj = model.get_base_model().model.layers[0].self_attn.q_proj
    assert q_proj.scaling["default"] == 32 / 2**0.5
    assert model.get_base_model().lm_head.modules_to_save["default"].weight.requires_grad
    assert report(model).trained_in_full == ("lm_head",)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("rank", "r"), ("alpha", "lora_alpha"), ("use_rs_lora", "use_rslora"), ("blocksize", "NF4Config(blocksize=...)")],
)
def test_an_unknown_option_says_what_was_meant(name, meant):
    model = llama()
    with pytest.raises(TypeError) as error:
        prepare(model, **{name: 4})
    assert f"option {name!r} is unknown; did you mean" in str(error.value)
    assert meant in str(error.value)
    assert not report(model).packed_layers


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": 4.0}, TypeError, "r must be an int, got 4.0"),
        ({"lora_alpha": -1}, ValueError, "lora_alpha must be positive, got -1"),
        ({"lora_alpha": "8"}, TypeError, "lora_alpha must be a number, got '8'"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout must be in \[0, 1\), got 1.0"),
        (
            {"target_modules": ["nope"]},
            ValueError,
            r"target_modules must match a module, got \['nope'\].*are called down_proj",
        ),
        ({"target_modules": "nope.*"}, ValueError, "target_modules must match a module, got 'nope"),
        (
            {"target_modules": "(q_proj"},
            ValueError,
            r"target_modules must be a regular expression if .*'\(q_proj' \(mi",
        ),
        (
            {"exclude_modules": "*q_proj"},
            ValueError,
            r"exclude_modules must be a regular expression .*nothing to repeat",
        ),
        ({"target_modules": 3}, TypeError, "target_modules must be a regular expression or a list of names, got 3"),
        ({"target_modules": ["q_proj", None]}, TypeError, "target_modules must be .* a list of names, got {"),
        # letter by letter, it would match half of the model
        ({"modules_to_save": "lm_head"}, TypeError, r"modules_to_save must be a list of names.* write \['lm_head'\]"),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            ValueError,
            "must not name the output head, got 'lm_head'.*modules_to_save",
        ),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights must be .* got 'pissa'"),
        ({"quantization_config": 4}, TypeError, "quantization_config must be an NF4Config"),
        ({"quantization_config": {"load_in_8bit": True}}, ValueError, "must be packed in nf4"),
        ({"lora_config": 16}, TypeError, r"lora_config must be a peft.LoraConfig, got int; single options go by name"),
        (
            {"lora_config": LoraConfig(), "r": 8},
            TypeError,
            "options must be .* in the LoraConfig or by name.*, got a LoraConfig and r",
        ),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_packed(options, kind, match):
    model = llama()
    with pytest.raises(kind, match=f"^(prepare|NF4Config.from_bnb): .*{match}"):
        prepare(model, **options)
    assert not report(model).packed_layers
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_target_that_matches_nothing_beside_one_that_does_is_warned_of():
    with pytest.warns(UserWarning, match="nothing is called c_attn, which target_modules names"):
        prepare(llama(), target_modules=["q_proj", "c_attn"])


# --- twice -----------------------------------------------------------------------------------------------------------


def test_twice_with_the_same_options_returns_the_model(capsys):
    model = prepare(llama(), r=8, lora_dropout=0.1)
    assert capsys.readouterr().out.count("\n") == 1
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert prepare(model, r=8, lora_dropout=0.1) is model
    assert prepare(model, r=8, lora_dropout=0.1, quantization_config=NF4Config()) is model
    assert capsys.readouterr().out == ""
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    targets = prepare(llama(), target_modules=["q_proj", "v_proj"])
    assert prepare(targets, target_modules=["v_proj", "q_proj"]) is targets


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "r must be that of the adapter which the model carries, 8, got 16"),
        ({"r": 4}, "r must be .* 8, got 4"),
        ({"r": 8, "lora_alpha": 16}, "lora_alpha must be .* 32, got 16"),
        ({"r": 8, "target_modules": ["q_proj"]}, r"target_modules must be .* 'all-linear', got \['q_proj'\]"),
        ({"r": 8, "use_rslora": True}, "use_rslora must be .* False, got True"),
        (
            {"r": 8, "quantization_config": NF4Config(blocksize=32)},
            "blocksize must be what the model is packed with, 64 in .*, got 32",
        ),
        (
            {"r": 8, "quantization_config": NF4Config(double_quant=False)},
            "double_quant must be .* True in .*, got False",
        ),
    ],
)
def test_twice_with_other_options_names_the_option_and_both_values(options, match):
    with pytest.raises(ValueError, match=match):
        prepare(prepare(llama(), r=8), **options)


def test_on_a_foreign_adapter_only_what_was_given_is_compared():
    model = adapted(packed_llama(), r=4)
    assert prepare(model) is model
    assert prepare(model, r=4, lora_alpha=8, target_modules="all-linear") is model
    with pytest.raises(ValueError, match=r"r must be .* 4, got 16"):
        prepare(model, r=16)
    with pytest.raises(ValueError, match="target_modules must be"):
        prepare(model, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"lora_alpha must be .* 8, got 4"):
        prepare(model, config(lora_alpha=4))
    assert prepare(model, config()) is model


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_no_model_is_a_type_error():
    with pytest.raises(TypeError, match=r"must be an nn.Module, got str; load it with AutoModelForCausalLM"):
        prepare("some/model")


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match=r"must have torch.nn.Linear layers to pack, got Embedding with none"):
        prepare(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match=r"whose width is a multiple of 32, got Sequential without one"):
        prepare(nn.Sequential(nn.Linear(10, 10)))


def test_a_merged_model_is_refused():
    model = adapted(dequantised(packed_llama()))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"must not be merged.*unmerge_adapter\(\)"):
        prepare(model)
    model.unmerge_adapter()
    assert len(layers(prepare(model))) == 7


def test_the_model_inside_a_peft_model_is_refused():
    model = prepare(llama())
    with pytest.raises(ValueError, match=r"must come as its PeftModel, got the LlamaForCausalLM inside"):
        prepare(model.get_base_model())


def test_an_adapter_that_is_not_lora_is_refused():
    with pytest.raises(ValueError, match="the adapter must be LoRA, got IA3"):
        prepare(get_peft_model(llama(), peft.IA3Config(task_type="CAUSAL_LM")))


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match="must not be compiled yet"):
        prepare(torch.compile(llama()))


def test_weights_that_are_not_in_memory_are_refused():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=9))
    with pytest.raises(ValueError, match="must be in memory, got meta tensors"):
        prepare(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_packed(value):
    model = llama()
    model.model.layers[0].mlp.down_proj.weight.data[3, 5] = value
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj must be finite, got NaN or Inf"):
        prepare(model)
    assert not report(model).packed_layers


@pytest.mark.parametrize(
    ("method", "way_out"),
    [
        ("mxfp4", r"Mxfp4Config\(dequantize=True\)"),
        ("fp8", r"FineGrainedFP8Config\(dequantize=True\)"),
        ("compressed-tensors", r"CompressedTensorsConfig\(dequantize=True\)"),
        ("gptq", "load the 16-bit checkpoint that it was made from"),
    ],
)
def test_another_quantisation_is_named_with_the_way_out(method, way_out):
    model = llama()
    model.hf_quantizer = type(
        "Quantizer", (), {"quantization_config": type("Config", (), {"quant_method": method})()}
    )()
    with pytest.raises(ValueError, match=f"in bitsandbytes' nf4, got one quantised with {method}; .*{way_out}"):
        prepare(model)
    if "Config" in way_out:  # transformers has it, with this option
        name, option = re.match(r".*?(\w+)\\\((\w+)", way_out).groups()
        assert option in inspect.signature(getattr(transformers, name)).parameters


# --- what comes out --------------------------------------------------------------------------------------------------


def test_a_model_that_was_unloaded_is_prepared_anew():
    model = prepare(prepare(llama(), r=8).unload(), r=4)
    assert model.active_peft_config.r == 4
    assert len(layers(model)) == 7


@pytest.mark.parametrize("tied", [False, True])
def test_the_base_of_a_prepared_model_saves_and_loads_as_one_loaded_in_nf4(tied, tmp_path):
    model = perturbed(prepare(llama(tied=tied), r=4))
    with model.disable_adapter():
        expected = model(IDS).logits
    model.get_base_model().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again.model.layers[0].mlp.up_proj, NF4Linear)
    assert_same_bits(again(IDS).logits, expected)
    assert base_hash(again) == base_hash(model)


def test_a_mixture_of_experts_keeps_its_experts_in_16_bits_and_saves_them(tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 259}
    experts = MixtralForCausalLM(
        MixtralConfig(**shape, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    )
    experts.save_pretrained(tmp_path / "16")
    model = prepare(AutoModelForCausalLM.from_pretrained(tmp_path / "16"), r=4, target_modules=["q_proj", "v_proj"])
    about = report(model)
    assert about.packed_layers == 4
    assert (
        "several experts in one tensor"
        in {row.name: row.reason for row in about.kept}["model.layers.0.mlp.experts.down_proj"]
    )
    expected = model(IDS).logits
    model.get_base_model().save_pretrained(tmp_path / "4")
    assert_same_bits(AutoModelForCausalLM.from_pretrained(tmp_path / "4")(IDS).logits, expected)


def test_a_prepared_model_dequantises_and_merges_in_16_bits():
    model = perturbed(prepare(llama(), r=4))
    expected = model(IDS).logits
    model.get_base_model().dequantize()
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    assert relative(merged(IDS).logits, expected) < 1e-5


def test_checkpointing_is_left_to_the_trainer_and_works_both_ways():
    model = prepare(llama(), r=4, lora_dropout=0.3).train()
    layers = model.get_base_model().model.layers
    assert not any(layer.gradient_checkpointing for layer in layers)
    expected = step(perturbed(model))
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        logits, grads = step(model)
        assert_same_bits(logits, expected[0])
        assert all(torch.equal(grads[name], expected[1][name]) for name in grads)


def test_a_model_that_checkpoints_already_gets_gradients(tmp_path):
    model = loaded(tmp_path)
    model._set_gradient_checkpointing(
        True, lambda f, *args: torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=True)
    )
    _, grads = step(prepare(model, r=4).train())
    assert all(grad.norm() > 0 for name, grad in grads.items() if "lora_B" in name)


def test_the_line_says_what_changed(capsys):
    prepare(llama(dtype=torch.bfloat16), r=4)
    line = capsys.readouterr().out
    assert line.startswith("nf4lora: 7 layers from bfloat16 to NF4 (4.14 bits per weight); ")  # 4.127 in large layers
    assert "float32 adapters of rank 4 on 7 layers; " in line
    assert line.count("\n") == 1


def test_the_model_is_walked_once_for_the_line(monkeypatch):
    calls = []
    monkeypatch.setitem(prepare.__globals__, "report", lambda model: calls.append(model) or report(model))
    model = prepare(llama(), r=4)
    assert calls == [model]
    prepare(model, r=4)
    assert calls == [model]


def rows():
    datasets = pytest.importorskip("datasets")
    text = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}
        for i in range(8)
    ]
    return datasets.Dataset.from_list(text)


@pytest.mark.parametrize("how", ["prepared", "peft_config on a model in NF4"])
def test_trl_trains_every_adapter(how, tmp_path):
    trl = pytest.importorskip("trl")
    if how == "prepared":
        model, options = prepare(loaded(tmp_path / "model"), r=4), {}
    else:
        model, options = loaded(tmp_path / "model"), {"peft_config": config(init_lora_weights=True)}
    arguments = trl.SFTConfig(
        str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
    )
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=rows(), processing_class=tiny_tokenizer(), **options)
    assert len(layers(trainer.model)) == 7
    before = {name: parameter.clone() for name, parameter in trainable(trainer.model).items()}
    frozen = base_hash(trainer.model)
    trainer.train()
    after = trainable(trainer.model)
    assert {parameter.dtype for parameter in after.values()} == {torch.float32}
    # Two steps: B leaves zero in the first, so that A moves in the second.
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert base_hash(trainer.model) == frozen


def test_preparing_warns_of_nothing_that_its_user_did_not_do():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(tiny_llama())
