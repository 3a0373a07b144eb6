"""What bitsandbytes packed, read and adopted: the same bytes, the same weights, no copy, no guess where it differs."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from nf4lora.nn.linear import NF4Linear
from nf4lora.ops import reference
from nf4lora.quantization import bitsandbytes_format as ours
from nf4lora.quantization.config import NF4Config

from support.bits import assert_same_bits
from support.models import tiny_llama

bnb = pytest.importorskip("bitsandbytes")

IDS = torch.arange(24).reshape(2, 12)
LAYER = "model.layers.0.mlp.up_proj"


def bnb_config(**options):
    defaults = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    return BitsAndBytesConfig(load_in_4bit=True, **defaults | options)


@pytest.fixture
def load_with_bnb(tmp_path):
    """A function that loads a tiny Llama through bitsandbytes, in train mode: eval mode repacks the weights."""

    def load(dtype=torch.bfloat16, sizes=None, **options):
        sizes = {"num_hidden_layers": 1, "dtype": dtype} | (sizes or {})
        tiny_llama(**sizes).save_pretrained(tmp_path / "16-bit")
        config = bnb_config(**options)
        device = {"": "cpu"}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "16-bit", quantization_config=config, device_map=device)
        return model.train()

    return load


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def foreign_layers(model):
    return {name: module for name, module in model.named_modules() if ours.is_linear4bit(module)}


def dequantized_by_bnb(layer):
    """Its own dequantize_4bit, told of one long row: with several, its CPU kernel begins a new block at each."""
    state = copy.copy(layer.weight.quant_state)
    state.shape = torch.Size((1, layer.weight.quant_state.shape.numel()))
    return bnb.functional.dequantize_4bit(layer.weight.data, state).view(layer.weight.quant_state.shape)


def read_as_nf4(folder, blocksize=64):
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = NF4Config.from_bnb(config.quantization_config, blocksize).to_dict()
    return AutoModelForCausalLM.from_pretrained(folder, config=config)


def weight_of(layer, dtype):
    return layer.dequantize(dtype) if isinstance(layer, NF4Linear) else layer.weight


# ---- the same format ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 1024])
def test_packed_bytes_and_scales_equal_bitsandbytes(dtype, blocksize):
    weight = torch.randn(24, 2048).to(dtype)
    theirs, state = bnb.functional.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
    packed = NF4Linear.pack(weight, blocksize, double_quant=False)
    assert_same_bits(packed["weight"].view(-1), theirs.view(-1))
    assert_same_bits(packed["weight_absmax"].view(torch.float32).view(-1), state.absmax)


# ---- checkpoints ----


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("dtype", "storage"), [(torch.float32, "uint8"), (torch.bfloat16, "uint8"), (torch.bfloat16, "bfloat16")]
)
def test_a_checkpoint_is_read_without_requantising(load_with_bnb, tmp_path, double_quant, dtype, storage):
    options = {"bnb_4bit_use_double_quant": double_quant, "bnb_4bit_quant_storage": storage}
    theirs = load_with_bnb(dtype, **options, bnb_4bit_compute_dtype=dtype)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "bnb")
    model = read_as_nf4(tmp_path / "bnb")
    for name, layer in foreign_layers(theirs).items():
        adopted = model.get_submodule(name)
        assert isinstance(adopted, NF4Linear)
        assert_same_bits(adopted.weight.view(-1), layer.weight.data.view(torch.uint8).view(-1))
        assert_same_bits(adopted.dequantize(dtype), dequantized_by_bnb(layer))
        assert adopted.compute_dtype == dtype
    assert model.dtype == dtype
    # the same weights through other kernels: the order of additions, and in bfloat16 a rounding or two of a logit
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(logits(model), expected, rtol=tolerance, atol=tolerance)


def test_a_checkpoint_read_is_saved_in_the_native_layout(load_with_bnb, tmp_path):
    load_with_bnb().save_pretrained(tmp_path / "bnb")
    model = read_as_nf4(tmp_path / "bnb")
    model.save_pretrained(tmp_path / "native")
    assert not any("quant_state" in key for key in load_file(tmp_path / "native" / "model.safetensors"))
    config = json.loads((tmp_path / "native" / "config.json").read_text())["quantization_config"]
    assert config == NF4Config(compute_dtype="bfloat16").to_dict()
    assert_same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "native")), logits(model))


@pytest.mark.parametrize("double_quant", [True, False])
def test_blocks_that_straddle_rows_are_dequantised_and_named(load_with_bnb, tmp_path, double_quant):
    sizes = {"hidden_size": 96, "intermediate_size": 192}
    theirs = load_with_bnb(sizes=sizes, bnb_4bit_use_double_quant=double_quant)
    theirs.save_pretrained(tmp_path / "bnb")
    expected = {name: dequantized_by_bnb(layer) for name, layer in foreign_layers(theirs).items()}
    narrow = {name for name in expected if not name.endswith("down_proj")}
    read = read_as_nf4(tmp_path / "bnb")
    assert {name for name, why in read.nf4lora_skipped.items() if "straddle" in why} == narrow
    assert ours.adopt(theirs) == dict.fromkeys(narrow, ours.STRADDLES)
    assert set(theirs.nf4lora_skipped) == narrow
    for number, model in enumerate((read, theirs)):
        model.save_pretrained(tmp_path / str(number))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        for name, weight in expected.items():
            for loaded in (model, again):
                layer = loaded.get_submodule(name)
                assert isinstance(layer, NF4Linear) is (name not in narrow)
                assert_same_bits(weight_of(layer, torch.bfloat16), weight, name)


def test_a_packed_output_head_is_dequantised(load_with_bnb, tmp_path):
    theirs = load_with_bnb(llm_int8_skip_modules=["nothing"])
    assert ours.is_linear4bit(theirs.lm_head)
    expected = dequantized_by_bnb(theirs.lm_head)
    theirs.save_pretrained(tmp_path / "bnb")
    assert_same_bits(read_as_nf4(tmp_path / "bnb").lm_head.weight, expected)
    assert ours.adopt(theirs) == {"lm_head": ours.HEAD}
    assert_same_bits(theirs.lm_head.weight, expected)


@pytest.mark.parametrize(
    ("key", "change", "text"),
    [
        ("absmax", None, r"must come with weight\.absmax"),
        ("nested_absmax", None, r"must come with weight\.nested_absmax"),
        ("nested_quant_map", None, r"must come with weight\.nested_quant_map"),
        ("quant_state.bitsandbytes__nf4", None, "must come with one quant_state, got 0"),
        ("absmax", lambda t: t[:-1], r"must have absmax of 512 torch\.uint8, got 511"),
        ("absmax", lambda t: t.float(), r"must have absmax of 512 torch\.uint8, got 512 torch\.float32"),
        ("nested_absmax", lambda t: t[:-1], "must have nested_absmax of 2"),
        ("quant_map", lambda t: t * 0.9, "must have the quant_map of NF4, got another"),
        ("nested_quant_map", lambda t: t * 0.9, "must have the nested_quant_map of NF4, got another"),
        ("quant_state.bitsandbytes__nf4", lambda t: t[:-5], "must have a quant_state that is JSON"),
    ],
)
def test_a_damaged_checkpoint_names_the_layer(load_with_bnb, tmp_path, key, change, text):
    load_with_bnb().save_pretrained(tmp_path / "bnb")
    file = tmp_path / "bnb" / "model.safetensors"
    tensors = load_file(file)
    tensor = tensors.pop(f"{LAYER}.weight.{key}")
    if change is not None:
        tensors[f"{LAYER}.weight.{key}"] = change(tensor).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{LAYER}.weight {text}"):
        read_as_nf4(tmp_path / "bnb")


def test_a_layer_left_in_16_bits_is_not_packed_in_silence(load_with_bnb, tmp_path):
    load_with_bnb(llm_int8_skip_modules=["lm_head", "up_proj"]).save_pretrained(tmp_path / "bnb")
    model = read_as_nf4(tmp_path / "bnb")
    assert type(model.get_submodule(LAYER)) is nn.Linear
    config = json.loads((tmp_path / "bnb" / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head"]
    (tmp_path / "bnb" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{LAYER}.weight must be packed by bitsandbytes, got bfloat16"):
        read_as_nf4(tmp_path / "bnb")


def test_another_blocksize_than_the_checkpoints_is_refused_with_the_right_one(load_with_bnb, tmp_path):
    load_with_bnb().save_pretrained(tmp_path / "bnb")
    with pytest.raises(ValueError, match="from_bnb takes blocksize=64"):
        read_as_nf4(tmp_path / "bnb", blocksize=32)


@pytest.mark.parametrize(
    ("meta", "text"),
    [
        ([1], "must have a quant_state that is a JSON object, got list"),
        ({"dtype": "bfloat61"}, "must have a dtype that torch knows, got 'bfloat61'"),
        ({"dtype": 7}, "must have a text as dtype in its quant_state, got 7"),
        ({"shape": 7}, "must have a list as shape"),
        ({"shape": ["a", "b"]}, "must have a shape of whole numbers"),
        ({"blocksize": "64"}, "must have a whole number as blocksize"),
        ({"nested_offset": None}, "must have a number as nested_offset"),
        ({"quant_type": 4}, "must have a text as quant_type"),
    ],
)
def test_a_quant_state_of_another_shape_names_the_layer(load_with_bnb, tmp_path, meta, text):
    load_with_bnb().save_pretrained(tmp_path / "bnb")
    file = tmp_path / "bnb" / "model.safetensors"
    tensors, key = load_file(file), f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
    before = json.loads(bytes(tensors[key].tolist()))
    content = json.dumps(before | meta if isinstance(meta, dict) else meta).encode()
    tensors[key] = torch.tensor(list(content), dtype=torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{LAYER}.weight {text}"):
        read_as_nf4(tmp_path / "bnb")


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_checkpoint_is_read_with_nothing_but_an_nf4_config(load_with_bnb, tmp_path, double_quant):
    load_with_bnb(bnb_4bit_use_double_quant=double_quant).save_pretrained(tmp_path / "bnb")
    expected = read_as_nf4(tmp_path / "bnb")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bnb", quantization_config=NF4Config())
    assert model.config.quantization_config == expected.config.quantization_config
    assert_same_bits(logits(model), logits(expected))
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "bnb", quantization_config=NF4Config(compute_dtype=torch.float32)
    )
    assert {m.compute_dtype for m in again.modules() if isinstance(m, NF4Linear)} == {torch.float32}
    with pytest.raises(ValueError, match=f"double_quant must be what the checkpoint is packed with, {double_quant}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bnb", quantization_config=NF4Config(not double_quant))


# ---- live models ----


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adopting_copies_no_weight_and_changes_no_logit(load_with_bnb, double_quant, dtype):
    model = load_with_bnb(dtype, bnb_4bit_use_double_quant=double_quant, bnb_4bit_compute_dtype=dtype)
    before = logits(model)
    layers = foreign_layers(model)
    memory = {n: (m.weight.data_ptr(), m.weight.quant_state.absmax.data_ptr()) for n, m in layers.items()}
    weights = {name: dequantized_by_bnb(layer) for name, layer in layers.items()}
    assert ours.adopt(model) == {}
    assert not foreign_layers(model)
    for name, layer in ((name, model.get_submodule(name)) for name in layers):
        assert isinstance(layer, NF4Linear)
        assert (layer.weight.data_ptr(), layer.weight_absmax.data_ptr()) == memory[name]
        assert type(layer._parameters["weight"]) is nn.Parameter
        assert_same_bits(layer.dequantize(dtype), weights[name])
        assert layer.training
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(logits(model), before, rtol=tolerance, atol=tolerance)


def test_an_adopted_model_is_ours_for_transformers_too(load_with_bnb, tmp_path):
    model = load_with_bnb()
    ours.adopt(model)
    assert not hasattr(model, "is_loaded_in_4bit")
    assert model.quantization_method == "nf4lora"
    assert model.config.quantization_config == NF4Config(compute_dtype="bfloat16")
    model.save_pretrained(tmp_path / "native")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert_same_bits(logits(again), logits(model))
    assert_same_bits(
        model.dequantize().get_submodule(LAYER).weight, again.get_submodule(LAYER).dequantize(torch.bfloat16)
    )


def test_a_model_that_bitsandbytes_read_packed_can_be_saved_once_adopted(load_with_bnb, tmp_path):
    load_with_bnb().save_pretrained(tmp_path / "bnb")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bnb", device_map={"": "cpu"})
    ours.adopt(model)
    model.save_pretrained(tmp_path / "native")  # bitsandbytes' own way back is not implemented
    assert_same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "native")), logits(model))


def test_adopting_works_under_peft(load_with_bnb):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load_with_bnb(), peft.LoraConfig(target_modules="all-linear", lora_dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    before, names = logits(model), list(foreign_layers(model))
    assert names[0] == "base_model.model.model.layers.0.self_attn.q_proj.base_layer"
    keys = [key for key in peft.get_peft_model_state_dict(model)]
    assert ours.adopt(model) == {}
    assert all(isinstance(model.get_submodule(name), NF4Linear) for name in names)
    assert list(peft.get_peft_model_state_dict(model)) == keys
    torch.testing.assert_close(logits(model), before, rtol=2**-6, atol=2**-6)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    assert not hasattr(model.get_base_model(), "is_loaded_in_4bit")


def linear4bit(quant_type="nf4", K=128, N=32, **options):
    layer = bnb.nn.Linear4bit(K, N, bias=True, quant_type=quant_type, compute_dtype=torch.float32, **options)
    return layer


def test_adopting_a_plain_module_keeps_its_bias():
    model = nn.Sequential(linear4bit().to("cpu"))
    bias = model[0].bias
    ours.adopt(model)
    assert isinstance(model[0], NF4Linear)
    assert model[0].bias is bias
    assert model[0].compute_dtype == torch.float32


def test_a_model_without_4_bit_layers_is_left_alone():
    model = tiny_llama(num_hidden_layers=1)
    before = {name: id(module) for name, module in model.named_modules()}
    assert ours.adopt(model) == {}
    assert {name: id(module) for name, module in model.named_modules()} == before


def foreign_map(layer):
    layer.weight.quant_state.state2.code = layer.weight.quant_state.state2.code * 0.5


def foreign_code(layer):
    layer.weight.quant_state.code = layer.weight.quant_state.code.flip(0)


def no_state(layer):
    layer.weight.quant_state = layer.quant_state = None


def repacked(layer):
    layer.weight.quant_state.packing_format_for_cpu = True


def cut_off(layer):
    layer.weight.quant_state.absmax = layer.weight.quant_state.absmax[:-1]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (foreign_map, "must have the nested_quant_map of NF4, got another one"),
        (foreign_code, "must have the quant_map of NF4, got another one"),
        (no_state, "must have a quant_state, got none; move the layer to its device"),
        (repacked, "must have the packing that it was loaded with, got .* call prepare before running it"),
        (cut_off, r"must have absmax of 64 torch\.uint8, got 63"),
    ],
)
def test_a_layer_that_cannot_be_adopted_is_named_and_nothing_is_changed(damage, text):
    model = nn.Sequential(*(linear4bit().to("cpu") for _ in range(3)))
    damage(model[1])
    layers = list(model)
    with pytest.raises(ValueError, match=f"nf4lora.bitsandbytes: 1 {text}"):
        ours.adopt(model)
    assert all(a is b for a, b in zip(model, layers))


def test_fp4_and_8_bits_are_refused_by_name():
    with pytest.raises(ValueError, match="0 must be packed in nf4, got fp4"):
        ours.adopt(nn.Sequential(linear4bit("fp4").to("cpu")))
    with pytest.raises(ValueError, match="0 must be packed in nf4, got 8 bits"):
        ours.adopt(nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)))


@pytest.mark.parametrize("shape", [(96, 96), (40, 200), (31, 33), (3, 64)])
@pytest.mark.parametrize("nested", [True, False])
def test_dequantize_follows_the_blocks_through_the_flattened_weight(shape, nested):
    weight = torch.randn(shape)
    layer = linear4bit(K=shape[1], N=shape[0], compress_statistics=nested)
    layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=nested, requires_grad=False).to(
        "cpu"
    )
    packed = ours.from_layer("layer", layer)
    assert packed.straddles is (shape[1] % 64 != 0)
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64))
    qweight, absmax = reference.nf4_quantize(flat)
    if nested:
        state = layer.weight.quant_state
        scales = torch.cat([state.state2.absmax, state.offset.view(1)])
        absmax = reference.absmax_dequantize(state.absmax, scales)
    expected = reference.nf4_dequantize(qweight, absmax, 64, torch.float32)[: weight.numel()].view(shape)
    assert_same_bits(packed.dequantize(torch.float32), expected)


def test_a_layer_at_several_places_is_adopted_once_and_at_all_of_them():
    shared, straddling = linear4bit().to("cpu"), linear4bit(K=96, N=96).to("cpu")
    block = nn.Sequential(shared, straddling)
    model = nn.ModuleDict({"a": block, "b": nn.ModuleDict({"c": shared, "d": block}), "e": straddling})
    assert ours.adopt(model) == {"a.1": ours.STRADDLES}
    assert isinstance(model["a"][0], NF4Linear)
    assert type(model["e"]) is nn.Linear
    assert model["a"][0] is model["b"]["c"] is model["b"]["d"][0]
    assert model["e"] is model["a"][1]
    assert not foreign_layers(model)
