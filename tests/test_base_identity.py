"""Which base an adapter belongs to: every weight that it depends on, with the tolerance that two encoders need."""

import copy
import json
import os
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import nf4lora
from nf4lora import NF4Config, load_adapter, save_adapter
from nf4lora.adapters import base_identity
from nf4lora.adapters.base_identity import close, sums
from nf4lora.nn.linear import NF4Linear

from support.adapted import IDS, adapted, config, packed_llama, trainable
from support.bits import assert_same_bits
from support.models import tiny_llama


@pytest.fixture
def checkpoint(tmp_path):
    tiny_llama(num_hidden_layers=1, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def classifier(checkpoint, seed=0, **options):
    """A language model's checkpoint under a new head, drawn from the seed."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, num_labels=3, **{"quantization_config": NF4Config()} | options
    )
    model.config.pad_token_id = 0
    return model


def put_adapter(model, **options):
    """LoRA with a B that is not zero, and no knowledge of heads."""
    return adapted(model, target_modules=["q_proj", "up_proj"], **{"task_type": None} | options)


def scores(model):
    with torch.no_grad():
        return model.eval()(IDS[:1]).logits


# ---- a head that no checkpoint held ----


def test_a_new_head_that_is_not_trained_is_saved_with_the_adapter_and_said(checkpoint, tmp_path):
    model = put_adapter(classifier(checkpoint))
    with pytest.warns(UserWarning, match=r"score\.weight was in no checkpoint.*modules_to_save=\['score'\]"):
        save_adapter(model, tmp_path / "adapter")
    assert "base_model.model.score.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not torch.equal(classifier(checkpoint, seed=1).score.weight, model.get_base_model().score.weight)
    loaded = load_adapter(classifier(checkpoint, seed=1), tmp_path / "adapter")
    assert_same_bits(scores(loaded), scores(model))
    # and once more: what came from the file goes into the next one
    save_adapter(loaded, tmp_path / "again")
    assert_same_bits(scores(load_adapter(classifier(checkpoint, seed=2), tmp_path / "again")), scores(model))


def test_a_new_head_reaches_a_prepared_model_too(checkpoint, tmp_path):
    model = put_adapter(classifier(checkpoint))
    with pytest.warns(UserWarning, match="was in no checkpoint"):
        save_adapter(model, tmp_path / "adapter")
    other = put_adapter(classifier(checkpoint, seed=1))
    assert_same_bits(scores(load_adapter(other, tmp_path / "adapter")), scores(model))


def test_a_head_that_is_trained_in_full_is_no_part_of_the_base(checkpoint, tmp_path):
    model = put_adapter(classifier(checkpoint), modules_to_save=["score"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(classifier(checkpoint, seed=1), tmp_path / "adapter")
    assert_same_bits(scores(loaded), scores(model))


def test_plain_peft_reads_the_new_head(checkpoint, tmp_path):
    model = put_adapter(classifier(checkpoint, dtype=torch.float32))
    with pytest.warns(UserWarning, match="was in no checkpoint"):
        save_adapter(model, tmp_path / "adapter")
    other = classifier(checkpoint, seed=1, dtype=torch.float32)
    assert_same_bits(scores(peft.PeftModel.from_pretrained(other, tmp_path / "adapter")), scores(model))


def test_a_parameter_of_the_base_that_was_trained_by_hand_is_saved(checkpoint, tmp_path):
    def fresh():
        return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=NF4Config())

    model = adapted(fresh())
    norm = model.get_base_model().model.norm.weight.requires_grad_(True)
    with torch.no_grad():
        norm.normal_()
    save_adapter(model, tmp_path / "adapter")
    assert_same_bits(load_adapter(fresh(), tmp_path / "adapter")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_come_with_the_adapter(tmp_path, tied):
    tiny_llama(num_hidden_layers=1, tied=tied).save_pretrained(tmp_path / "base")

    def fresh(seed):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=NF4Config())
        model.resize_token_embeddings(300)
        return model

    model = adapted(fresh(0))
    ids = torch.tensor([[270, 5, 299]])
    save_adapter(model, tmp_path / "adapter")
    assert_same_bits(load_adapter(fresh(1), tmp_path / "adapter")(ids).logits, model(ids).logits)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=NF4Config())
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(300\) first if tokens were added"):
        load_adapter(bare, tmp_path / "adapter")


# ---- another base ----


def saved_on(model, folder, **options):
    save_adapter(adapted(model, **options), folder)
    return folder


def refused(model, folder, match):
    with pytest.raises(ValueError, match=match):
        load_adapter(model, folder)


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.norm", "lm_head", "model.layers.0.input_layernorm"])
def test_another_16_bit_weight_is_named(tmp_path, name):
    folder = saved_on(packed_llama(), tmp_path / "adapter")
    other = packed_llama()
    with torch.no_grad():
        other.get_submodule(name).weight.normal_()
    refused(other, folder, f"trained on, base_sha256 .*{name}.weight has other values; to use it")


def test_other_codes_scales_and_options_are_told_apart(tmp_path):
    folder = saved_on(packed_llama(), tmp_path / "adapter")
    other = packed_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj._parameters["weight"][0, 0] ^= 1
    refused(other, folder, r"layers\.0\.mlp\.up_proj has other codes; to use")
    other = packed_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight_nested.view(torch.float32).mul_(1.1)
    refused(other, folder, r"layers\.0\.mlp\.up_proj has the same codes with other scales")
    refused(packed_llama(seed=1), folder, "has other codes.* and .* more; to use it on another base")
    refused(packed_llama(double_quant=False), folder, "has double_quant False instead of True")
    other = packed_llama()
    other.model.layers[0].mlp.up_proj = nn.Linear(64, 128, bias=False)
    refused(other, folder, r"mlp\.up_proj is not in NF4")
    other = packed_llama()
    other.model.layers[0].extra = NF4Linear.from_linear(nn.Linear(64, 64))
    refused(other, folder, r"model\.layers\.0\.extra is in NF4 but was not")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_read_in_another_dtype_is_the_same_base(checkpoint, tmp_path, dtype):
    def load(dtype):
        return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=NF4Config(), dtype=dtype)

    folder = saved_on(load(torch.bfloat16), tmp_path / "adapter")
    load_adapter(load(dtype), folder)


def test_a_folder_of_an_older_release_is_read_by_its_hash(tmp_path):
    folder = saved_on(packed_llama(), tmp_path / "adapter")
    about = json.loads((folder / "nf4lora.json").read_text())
    for key in ("base", "with_base", "base_class"):
        del about[key]
    (folder / "nf4lora.json").write_text(json.dumps(about))
    load_adapter(packed_llama(), folder)
    refused(packed_llama(seed=1), folder, r"got base_sha256 \w{12}; the folder is of an older nf4lora")


@pytest.mark.parametrize("double_quant", [True, False])
def test_an_adapter_over_adopted_bitsandbytes_fits_the_base_that_we_pack(tmp_path, double_quant):
    """And the other way round. A few of the double-quantised scales differ by a step, all codes are equal."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1}
    tiny_llama(**sizes, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    bnb = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip

    def load(quantization):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantization, device_map={"": "cpu"}
        )
        return model.train()

    theirs = nf4lora.prepare(load(bnb), r=2)
    ours = nf4lora.prepare(load(NF4Config(double_quant)), r=2)
    for one, other, name in (
        (theirs, load(NF4Config(double_quant)), "a"),
        (ours, nf4lora.prepare(load(bnb), r=2), "b"),
    ):
        save_adapter(one, tmp_path / name)
        load_adapter(other, tmp_path / name)


def test_replicated_layers_are_those_of_the_base_before(tmp_path):
    options = {"layer_replication": [[0, 2], [1, 3], [0, 1]], "target_modules": ["q_proj", "down_proj"]}

    def base(seed=0):
        return packed_llama(num_hidden_layers=3, seed=seed)

    model = adapted(base(), **options)
    assert len(model.get_base_model().model.layers) == 5
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(base(), tmp_path / "adapter")
    assert_same_bits(loaded(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
    prepared = load_adapter(adapted(base(), **options), tmp_path / "adapter")
    assert_same_bits(prepared(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
    refused(base(seed=1), tmp_path / "adapter", "has other codes")
    # a refusal after PEFT has repeated the layers puts the old ones back
    bare = base()
    (tmp_path / "adapter" / "nf4lora.json").unlink()
    tensors = tmp_path / "adapter" / "adapter_model.safetensors"
    from safetensors.torch import save_file

    content = load_file(tensors)
    content.pop(next(iter(content)))
    save_file(content, tensors)
    before = list(bare.model.layers)
    refused(bare, tmp_path / "adapter", "must hold every tensor")
    assert list(bare.model.layers) == before
    assert bare.config.num_hidden_layers == 3


# ---- the sums ----


@pytest.mark.parametrize("shape", [(1,), (7,), (300, 500), ((1 << 20) + 3,), (3, 1 << 20)])
def test_sums_tell_two_draws_apart_and_forgive_a_rounding(shape):
    generator = torch.Generator().manual_seed(3)
    one, other = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    assert close(sums(one), sums(one.bfloat16()))
    assert close(sums(one.bfloat16()), sums(one.bfloat16().half()))
    assert not close(sums(one), sums(other))
    assert not close(sums(one), sums(one * 1.05))
    assert close(sums(torch.zeros(shape)), sums(torch.zeros(shape)))
    assert not close(sums(torch.zeros(shape)), sums(one))


def test_sums_know_where_a_value_stands():
    tensor = torch.randn(4, 1 << 20, generator=torch.Generator().manual_seed(3))
    assert not close(sums(tensor), sums(tensor.flip(0)))  # whole chunks exchanged
    assert not close(sums(tensor), sums(tensor.roll(1)))


def test_sums_of_what_is_not_finite_are_equal_to_themselves_alone():
    assert close(sums(torch.tensor([1.0, float("inf")])), sums(torch.tensor([1.0, float("inf")])))
    assert not close(sums(torch.tensor([1.0, float("inf")])), sums(torch.tensor([1.0, 2.0])))


def test_a_second_save_hashes_no_weight_again_unless_it_has_changed(monkeypatch):
    model, hashed = packed_llama(), []
    original = base_identity._bytes
    monkeypatch.setattr(base_identity, "_bytes", lambda tensor: hashed.append(1) or original(tensor))
    first = base_identity.identity(model), base_identity.base_hash(model)
    assert hashed
    hashed.clear()
    assert (base_identity.identity(model), base_identity.base_hash(model)) == first
    assert not hashed
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj._parameters["weight"].bitwise_xor_(1)
    assert base_identity.base_hash(model) != first[1]
    assert base_identity.identity(model) != first[0]
    assert base_identity.identity(copy.deepcopy(model)) == base_identity.identity(model)


def test_sums_of_a_large_frozen_weight_are_remembered_until_it_changes(monkeypatch):
    monkeypatch.setattr(base_identity, "LARGE", 1000)
    model, summed = packed_llama(), []
    original = base_identity.sums
    monkeypatch.setattr(base_identity, "sums", lambda tensor: summed.append(tensor.numel()) or original(tensor))
    model.requires_grad_(False)
    first = base_identity.identity(model)
    summed.clear()
    assert base_identity.identity(model) == first
    assert summed
    assert max(summed) < 1000
    model.lm_head.weight.add_(1)
    assert base_identity.identity(model) != first


def test_an_identity_in_inference_mode_is_the_same():
    expected = base_identity.identity(packed_llama())
    with torch.inference_mode():
        assert base_identity.identity(packed_llama()) == expected


# ---- files ----


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        save_adapter(adapted(packed_llama()), tmp_path / "adapter")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()} == {0o640}


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "nf4lora.json"])
def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch, file):
    folder = saved_on(packed_llama(), tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = adapted(packed_llama(), r=2)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if file == "adapter_model.safetensors":
        monkeypatch.setattr("nf4lora.adapters.files.save_file", full)
    elif file == "adapter_config.json":
        monkeypatch.setattr(peft.LoraConfig, "save_pretrained", full)
    else:
        monkeypatch.setattr("nf4lora.adapters.files.as_json", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(other, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_trainable_parameters_are_no_part_of_the_base(tmp_path):
    model = adapted(packed_llama(), bias="all")
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.02)
    save_adapter(model, tmp_path / "adapter")
    assert_same_bits(load_adapter(packed_llama(), tmp_path / "adapter")(IDS).logits, model(IDS).logits)
    assert config().bias == "none"


def test_codes_are_no_weights_of_their_own():
    """A guard in front of them is another object: what is told apart by it would list and hash them twice."""
    model = packed_llama()
    names = set(base_identity.identity(model)["weights"])
    assert "lm_head.weight" in names
    assert not names & {f"{name}.weight" for name in base_identity.packed_layers(model)}


def test_an_identity_that_lists_codes_as_weights_too_is_read():
    model = packed_llama()
    saved = base_identity.identity(model)
    saved["weights"] = {
        **saved["weights"],
        "model.layers.0.mlp.up_proj.weight": {"shape": [256, 64], "sums": [0.0] * 5},
    }
    assert not base_identity.differences(saved, model, {}, True)
    model.lm_head.weight.data.add_(1)
    assert base_identity.differences(saved, model, {}, True) == ["lm_head.weight has other values"]
