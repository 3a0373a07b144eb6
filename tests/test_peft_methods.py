"""PEFT's other methods over packed layers: right or refused by name, and merging none of them touches a packed byte."""

import copy
from dataclasses import fields

import peft
import pytest
import torch
from peft import get_peft_model

from nf4lora import prepare
from nf4lora.adapters import lora_layer
from nf4lora.nn.linear import NF4Linear

from support.adapted import IDS, dequantised, packed_llama
from support.models import tiny_llama

# Options that a method needs for layers of 64 to 128 features.
RIGHT = {
    "AdaLoraConfig": {"total_step": 10},
    "BeftConfig": {},
    "BOFTConfig": {"boft_block_size": 4},
    "C3AConfig": {"block_size": 16},
    "FourierFTConfig": {"n_frequency": 64},
    "GraloraConfig": {},
    "IA3Config": {"feedforward_modules": ["up_proj"]},
    "LilyConfig": {},
    "MissConfig": {"r": 8},
    "OFTConfig": {"oft_block_size": 4},
    "PveraConfig": {},
    "RandLoraConfig": {},
    "RoadConfig": {"group_size": 16},
    "VBLoRAConfig": {"vector_length": 16, "num_vectors": 8},
    "VeraConfig": {},
    "WaveFTConfig": {"n_frequency": 64},
}
REFUSED = {
    "DeftConfig": {},
    "DeloraConfig": {},
    "HiraConfig": {},
    "HRAConfig": {},
    "LNTuningConfig": {},
    "LoHaConfig": {},
    "LoKrConfig": {},
    "OSFConfig": {},
    "ShiraConfig": {"r": 4},
    "TinyLoraConfig": {},
}
TARGETS = ["q_proj", "v_proj", "up_proj"]


def config_of(name, options):
    if not hasattr(peft, name):
        pytest.skip(f"peft {peft.__version__} has no {name}")
    return getattr(peft, name)(task_type="CAUSAL_LM", target_modules=list(TARGETS), **options)


def on(base, config):
    """The adapter on a model, away from its start, where many methods change nothing."""
    torch.manual_seed(0)
    model = get_peft_model(base, copy.deepcopy(config))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape)
    return model.eval()


def packed_bytes(model):
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    return {f"{name}.{key}": t.clone() for name, layer in layers.items() for key, t in layer.state_dict().items()}


@pytest.mark.parametrize("name", RIGHT)
def test_a_method_computes_what_it_does_over_the_dequantised_model(name):
    lora_layer.install()
    config, base = config_of(name, RIGHT[name]), packed_llama()
    results = []
    for model in (on(copy.deepcopy(base), config), on(dequantised(base), config)):
        logits = model(input_ids=IDS).logits
        logits.std().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((logits.detach(), grads))
    (logits, grads), (expected, expected_grads) = results
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # float32 sums in another order
    assert grads.keys() == expected_grads.keys()
    assert grads
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("name", RIGHT)
def test_merging_is_refused_and_changes_no_byte(name, merge):
    lora_layer.install()
    model = on(packed_llama(), config_of(name, RIGHT[name]))
    before = packed_bytes(model)
    # Some methods refuse by themselves; for the others the weight says what it is and what to do.
    with pytest.raises((ValueError, NotImplementedError), match="NF4Linear.*dequantize|no bias|not supported for Lily"):
        getattr(model, merge)()
    after = packed_bytes(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_computes_with_the_weight_is_refused_by_name_and_the_model_is_as_before(name):
    lora_layer.install()
    config, base = config_of(name, REFUSED[name]), packed_llama()
    before = {key: type(module) for key, module in base.named_modules()}
    method = config.peft_type.value
    with pytest.raises(
        ValueError, match=rf"^{method}: target modules must be in 16 or 32 bits, got .*proj in NF4.*LoRA"
    ):
        get_peft_model(base, config)
    assert {key: type(module) for key, module in base.named_modules()} == before


def test_a_method_that_computes_with_weights_may_have_layers_in_16_bits():
    lora_layer.install()
    model = get_peft_model(packed_llama(), peft.LoHaConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    model(input_ids=IDS, labels=IDS).loss.backward()


# ---- variants of LoRA ------------------------------------------------------------------------------------------------

VARIANTS = {
    "use_dora": lambda: True,
    "alora_invocation_tokens": lambda: [5, 6],
    "monteclora_config": lambda: config_class("MontecloraConfig")(),
}
FLOAT_VARIANTS = {
    "velora_config": lambda: config_class("VeloraConfig")(num_groups=4),
    "use_bdlora": lambda: config_class("BdLoraConfig")(target_modules_bd_a=["q_proj"], nblocks=2, match_strict=False),
    "kasa_config": lambda: config_class("KasaConfig")(),
}


def config_class(name):
    if not hasattr(peft.tuners.lora.config, name):
        pytest.skip(f"peft {peft.__version__} has no {name}")
    return getattr(peft.tuners.lora.config, name)


def test_every_variant_is_compared_or_refused():
    known = {f.name for f in fields(peft.LoraConfig) if f.metadata.get("is_lora_variant")}
    assert known <= VARIANTS.keys() | FLOAT_VARIANTS.keys() | {"arrow_config"}
    assert VARIANTS.keys() | {"arrow_config"} == lora_layer.VARIANTS


def assert_equal_steps(ours, theirs, ids):
    results = []
    for model in (ours, theirs):
        torch.manual_seed(2)
        logits = model(input_ids=ids).logits
        logits.std().backward()
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (logits, grads), (expected, expected_grads) = results
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert grads.keys() == expected_grads.keys()
    assert grads
    assert all(grad.norm() > 0 for name, grad in grads.items() if "lora_A" in name)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_computes_what_it_does_over_the_dequantised_model(variant):
    lora_layer.install()
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=list(TARGETS), **{variant: VARIANTS[variant]()})
    base, ids = packed_llama(), IDS.clone()
    ids[:, 3:5] = torch.tensor([5, 6])  # where aLoRA's adapter begins
    assert_equal_steps(on(copy.deepcopy(base), config).train(), on(dequantised(base), config).train(), ids)


def test_arrow_routes_as_over_the_dequantised_model(tmp_path):
    lora_layer.install()
    base = packed_llama()
    for i in range(3):
        torch.manual_seed(i)
        one = get_peft_model(copy.deepcopy(base), config_of("LoraConfig", {"r": 4, "init_lora_weights": False}))
        one.save_pretrained(tmp_path / str(i))
    results = []
    for each in (copy.deepcopy(base), dequantised(base)):
        paths = [str(tmp_path / str(i)) for i in range(3)]
        torch.manual_seed(3)  # which the prototypes of the adapters are found with
        model = peft.tuners.lora.arrow.create_arrow_model(each, paths, config_class("ArrowConfig")(top_k=2))
        with torch.no_grad():
            results.append(model.eval()(input_ids=IDS).logits)
        with torch.no_grad(), model.disable_adapter():
            assert not torch.allclose(model(input_ids=IDS).logits, results[-1], atol=1e-3)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", FLOAT_VARIANTS)
def test_a_variant_that_needs_a_float_base_is_refused_by_name_before_anything_is_packed(variant):
    lora_layer.install()
    options = {variant: FLOAT_VARIANTS[variant]()}
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=list(TARGETS), r=4, **options)
    with pytest.raises(ValueError, match=f"^NF4LoraLinear: {variant} must be left out"):
        get_peft_model(packed_llama(), config)
    model = tiny_llama()
    with pytest.raises(ValueError, match=f"^prepare: {variant} must be left out"):
        prepare(model, config)
    theirs = get_peft_model(model, config)
    with pytest.raises(ValueError, match=f"^prepare: {variant} must be left out"):
        prepare(theirs)
    assert not any(isinstance(module, NF4Linear) for module in model.modules())
