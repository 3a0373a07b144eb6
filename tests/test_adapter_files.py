"""save_adapter and load_adapter: PEFT's files both ways, the base they belong to, and everything that is refused."""

import copy
import dataclasses
import json
import os
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import nf4lora
from nf4lora import load_adapter, save_adapter
from nf4lora.adapters.files import base_hash, base_state_dict
from nf4lora.nn.linear import NF4Linear

from support.adapted import IDS, adapted, config, dequantised, layers, packed_llama, relative, trainable
from support.bits import assert_same_bits
from support.models import tiny_llama


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter of rank 4 for `packed_llama()`, and the logits that belong to it."""
    model = adapted(packed_llama())
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter", model(IDS).logits


def edit(folder, file, **changes):
    path = folder / file
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


def edit_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


# --- round trips -----------------------------------------------------------------------------------------------------


def test_a_folder_holds_pefts_two_files_and_one_that_names_the_base(saved):
    folder, _ = saved
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors", "nf4lora.json"]
    about = json.loads((folder / "nf4lora.json").read_text())
    assert about["format_version"] == 1
    assert about["blocksize"] == 64
    assert about["double_quant"] is True
    assert about["base_sha256"] == base_hash(packed_llama())
    assert about["versions"] == {
        "nf4lora": nf4lora.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 14
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 64)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_bare_model_takes_an_adapter_bit_for_bit_and_can_train_it(saved):
    folder, logits = saved
    model = load_adapter(packed_llama(), folder)
    assert isinstance(model, peft.PeftModel)
    assert len(layers(model)) == 7
    assert_same_bits(model(IDS).logits, logits)
    assert len(trainable(model)) == 14


def test_a_prepared_model_takes_an_adapter_bit_for_bit(saved):
    folder, logits = saved
    model = adapted(packed_llama())
    for parameter in trainable(model).values():
        nn.init.normal_(parameter)
    assert load_adapter(model, folder) is model
    assert_same_bits(model(IDS).logits, logits)


def test_plain_peft_reads_our_folder_on_a_plain_model(saved):
    folder, logits = saved
    model = peft.PeftModel.from_pretrained(dequantised(packed_llama()), folder)
    assert not layers(model)
    assert relative(model(IDS).logits, logits) < 1e-5


def test_we_read_the_folder_of_plain_peft(tmp_path):
    plain = adapted(dequantised(packed_llama()))
    plain.save_pretrained(tmp_path)
    model = load_adapter(packed_llama(), tmp_path)
    assert relative(model(IDS).logits, plain(IDS).logits) < 1e-5


def test_an_adapter_on_the_embedding_is_read_with_the_weight_that_peft_writes_beside_it(tmp_path):
    plain = adapted(dequantised(packed_llama()), target_modules=["q_proj", "embed_tokens"])
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        plain.save_pretrained(tmp_path)
    assert any(
        key.endswith("embed_tokens.base_layer.weight") for key in load_file(tmp_path / "adapter_model.safetensors")
    )
    for base in (packed_llama(), adapted(packed_llama(), target_modules=["q_proj", "embed_tokens"])):
        assert relative(load_adapter(base, tmp_path)(IDS).logits, plain(IDS).logits) < 1e-5


def test_our_file_equals_pefts(saved, tmp_path):
    model = load_adapter(packed_llama(), saved[0])
    model.save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (saved[0], tmp_path / "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}],
)
def test_variants_and_layers_trained_in_full_survive(options, tmp_path):
    model = adapted(packed_llama(), **options)
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.02)
    save_adapter(model, tmp_path)
    loaded = load_adapter(packed_llama(), tmp_path)
    assert_same_bits(loaded(IDS).logits, model(IDS).logits)
    assert trainable(loaded).keys() == trainable(model).keys()


def test_the_active_adapter_is_the_one_that_is_saved(tmp_path):
    model = adapted(packed_llama())
    torch.manual_seed(5)
    model.add_adapter("other", config(r=2))
    model.set_adapter("other")
    save_adapter(model, tmp_path)
    assert_same_bits(load_adapter(packed_llama(), tmp_path)(IDS).logits, model(IDS).logits)


def test_the_name_of_the_base_model_stays_that_of_the_training(saved, recwarn):
    edit(saved[0], "adapter_config.json", base_model_name_or_path="someone/some-model")
    model = load_adapter(packed_llama(), saved[0])
    assert model.active_peft_config.base_model_name_or_path == "someone/some-model"
    assert not [warning for warning in recwarn if "base_model_name_or_path" in str(warning.message)]


# --- the hash of the base --------------------------------------------------------------------------------------------


def test_the_hash_knows_nothing_of_adapters():
    bare = packed_llama()
    expected = base_hash(bare)
    model = adapted(bare, modules_to_save=["lm_head"])
    assert base_hash(model) == base_hash(model.get_base_model()) == expected
    assert base_hash(adapted(packed_llama(), r=2)) == expected
    assert base_hash(copy.deepcopy(bare).to(torch.bfloat16)) == expected


def test_the_hash_knows_every_byte_name_and_shape():
    seen = {base_hash(packed_llama())}

    def changed(change):
        model = packed_llama()
        change(model.model.layers[0].mlp)
        digest = base_hash(model)
        assert digest not in seen
        seen.add(digest)

    changed(lambda mlp: mlp.up_proj._parameters["weight"].data[-1, -1].bitwise_xor_(1))
    changed(lambda mlp: mlp.up_proj.weight_absmax.data[0, 0].bitwise_xor_(1))
    changed(lambda mlp: mlp.up_proj.weight_nested.data[-1].bitwise_xor_(1))
    changed(lambda mlp: mlp.__setattr__("up_proj", nn.Linear(64, 128, bias=False)))

    def swap(mlp):
        mlp.up_proj, mlp.gate_proj = mlp.gate_proj, mlp.up_proj

    changed(swap)
    assert base_hash(packed_llama(double_quant=False)) not in seen
    layer = NF4Linear.from_linear(nn.Linear(64, 64))
    assert base_hash(nn.ModuleDict({"one": layer})) != base_hash(nn.ModuleDict({"other": layer}))


def test_the_base_of_a_prepared_model_has_its_own_names():
    bare = packed_llama()
    expected = {name: tensor.clone() for name, tensor in bare.state_dict().items()}
    state = base_state_dict(adapted(bare, modules_to_save=["lm_head"]))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(folder, match, model=None):
    """The error names the cause, and the model is as it was."""
    model = packed_llama() if model is None else model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=match):
        load_adapter(model, folder)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert grads == [parameter.requires_grad for parameter in model.parameters()]
    assert hasattr(model, "peft_config") == isinstance(model, peft.PeftModel)


def test_an_adapter_of_another_base_is_refused(saved):
    refused(saved[0], r"the base must be the one.*was trained on, base_sha256 \w{12} .*PeftModel", packed_llama(seed=1))
    refused(saved[0], "blocksize 64, double_quant True", packed_llama(double_quant=False))


def test_an_adapter_for_other_shapes_is_refused_without_a_hash_too(saved):
    (saved[0] / "nf4lora.json").unlink()
    wide = packed_llama(intermediate_size=256)
    refused(saved[0], r"down_proj\.lora_A\.weight .* must be \[4, 256\], got \[4, 128\]", wide)


@pytest.mark.parametrize(("option", "value"), [("r", 8), ("lora_alpha", 16), ("use_rslora", True)])
def test_an_adapter_of_another_rank_or_scaling_is_refused_on_a_prepared_model(saved, option, value):
    model = adapted(packed_llama(), **{option: value})
    refused(saved[0], rf"{option} of the model's adapter must be that of .*, got {value}", model)


Q = {"target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("there", "here", "match"),
    [
        ({"trainable_token_indices": [20, 21]}, {"trainable_token_indices": [50, 51]}, r"\[20, 21\], got \[50, 51\]"),
        ({"trainable_token_indices": [20, 21]}, {"trainable_token_indices": [21, 20]}, "trainable_token_indices"),
        ({"bias": "all"}, {"bias": "lora_only"}, "bias of the model's adapter must be that of"),
        ({"use_dora": True}, {}, "use_dora of the model's adapter"),
        ({"lora_bias": True}, {}, "lora_bias of the model's adapter"),
        ({"alpha_pattern": {"q_proj": 3}}, {"alpha_pattern": {"k_proj": 3}}, "alpha_pattern of the model's adapter"),
        ({**Q, "layers_to_transform": [0]}, {**Q, "layers_to_transform": [1]}, "got none for"),
        ({"exclude_modules": ["q_proj"]}, {"exclude_modules": ["k_proj"]}, "got none for"),
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["norm"]}, "got none for"),
        ({"modules_to_save": ["lm_head"]}, {}, "only tensors that have a place in the model, got .*lm_head"),
    ],
)
def test_every_option_that_changes_the_meaning_is_compared(tmp_path, there, here, match):
    size = {"num_hidden_layers": 2}
    save_adapter(adapted(packed_llama(**size), **there), tmp_path)
    refused(tmp_path, match, adapted(packed_llama(**size), **here))


def test_a_field_that_a_later_peft_brings_is_compared(saved, monkeypatch):
    @dataclasses.dataclass
    class Later(peft.LoraConfig):
        use_future: bool = False

    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "LORA", Later)
    edit(saved[0], "adapter_config.json", use_future=True)
    model = adapted(packed_llama())
    model.peft_config["default"].use_future = False
    refused(saved[0], "use_future of the model's adapter must be that of .*, True, got False", model)


def test_fields_that_change_nothing_or_are_written_otherwise_do_not_matter(saved):
    folder, logits = saved
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    model = adapted(
        packed_llama(),
        target_modules=names,
        lora_dropout=0.5,
        init_lora_weights="gaussian",
        rank_pattern={},
        lora_alpha=8.0,
        inference_mode=True,
        revision="main",
    ).eval()
    assert_same_bits(load_adapter(model, folder)(IDS).logits, logits)


def test_a_bare_model_comes_back_in_evaluation_mode_and_a_prepared_one_as_it_was(tmp_path):
    save_adapter(adapted(packed_llama(), lora_dropout=0.5), tmp_path)
    bare = packed_llama().train()
    loaded = load_adapter(bare, tmp_path)
    assert not any(module.training for module in loaded.modules())
    assert_same_bits(loaded(IDS).logits, loaded(IDS).logits)
    assert trainable(loaded)
    for training in (True, False):
        prepared = adapted(packed_llama(), lora_dropout=0.5).train(training)
        assert {module.training for module in load_adapter(prepared, tmp_path).modules()} == {training}


def test_an_adapter_for_other_modules_is_refused_on_a_prepared_model(saved):
    refused(
        saved[0],
        r"must hold only tensors that have a place in the model, got .* more",
        adapted(packed_llama(), target_modules=["q_proj"]),
    )


KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop(KEY), r"must hold every tensor of the adapter, got none for .*up_proj\.lora_B"),
        (
            lambda tensors: tensors.update(extra=torch.ones(2)),
            "must hold only tensors that have a place in the model, got extra",
        ),
        (
            lambda tensors: tensors.update({KEY: tensors[KEY][:, :2].contiguous()}),
            r"up_proj\.lora_B.* must be \[128, 4\], got \[128, 2\]",
        ),
    ],
)
def test_a_missing_extra_or_wrong_tensor_is_named(saved, change, match):
    edit_tensors(saved[0], change)
    refused(saved[0], match)
    refused(saved[0], match, adapted(packed_llama()))


def test_a_truncated_file_is_refused(saved):
    path = saved[0] / "adapter_model.safetensors"
    content = path.read_bytes()
    for length in (0, 5, 200, len(content) - 1):
        path.write_bytes(content[:length])
        refused(saved[0], r"adapter_model\.safetensors must be a whole safetensors file, got one that is truncated")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(saved, file):
    (saved[0] / file).unlink()
    refused(saved[0], f"folder must hold {file}, got")


@pytest.mark.parametrize("file", ["adapter_config.json", "nf4lora.json"])
def test_a_file_that_is_no_json_is_named(saved, file):
    (saved[0] / file).write_text("{")
    refused(saved[0], f"{file} must be JSON")
    (saved[0] / file).write_text("[1]")
    refused(saved[0], f"{file} must hold a JSON object")


def test_a_newer_format_is_refused_by_name(saved):
    edit(saved[0], "nf4lora.json", format_version=2)
    refused(saved[0], r"format_version in .*nf4lora\.json must be at most 1, got 2")


def test_another_kind_of_adapter_is_refused_by_name(saved):
    edit(saved[0], "adapter_config.json", peft_type="IA3")
    refused(saved[0], "peft_type in .* must be 'LORA', got 'IA3'")


def test_an_adapter_for_modules_that_are_not_there_is_refused(saved):
    (saved[0] / "nf4lora.json").unlink()
    edit(saved[0], "adapter_config.json", target_modules=["query_key_value"])
    refused(saved[0], "must fit the model: Target modules")


def test_a_model_that_is_not_packed_is_refused_both_ways(saved, tmp_path):
    refused(saved[0], "the base must be in NF4, got no NF4 layer", tiny_llama(num_hidden_layers=1))
    with pytest.raises(ValueError, match="save_adapter: the base must be in NF4"):
        save_adapter(adapted(dequantised(packed_llama())), tmp_path / "other")
    with pytest.raises(
        TypeError, match=r"save_adapter: model must be a PeftModel, as nf4lora.prepare returns it, got Llama"
    ):
        save_adapter(packed_llama(), tmp_path / "other")
    with pytest.raises(TypeError, match=r"load_adapter: model must be an nn.Module, got str"):
        load_adapter("model", saved[0])
    assert not (tmp_path / "other").exists()


def test_a_model_with_adapters_in_it_must_come_as_its_peft_model(saved):
    with pytest.raises(ValueError, match="must come as its PeftModel, got the LlamaForCausalLM inside"):
        load_adapter(adapted(packed_llama()).get_base_model(), saved[0])


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder must be a folder, got the file"):
        save_adapter(adapted(packed_llama()), tmp_path / "file")


def test_an_adapter_saved_over_another_replaces_it(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "twice")
    other = adapted(packed_llama(), r=2)
    save_adapter(other, tmp_path / "twice")
    loaded = load_adapter(packed_llama(), tmp_path / "twice")
    assert_same_bits(loaded(IDS).logits, other(IDS).logits)
    assert all(isinstance(layer.base_layer, NF4Linear) for layer in layers(loaded))


# ---- shards ----


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_a_model_in_shards_is_refused_and_the_way_that_is_named_works(one_process, tmp_path):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = adapted(packed_llama())
    expected = model(IDS).logits
    save_adapter(model, tmp_path / "whole")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(
        ValueError, match=r"save_adapter: the model must be whole.*get_model_state_dict.*save_pretrained"
    ):
        save_adapter(model, tmp_path / "sharded")
    assert not (tmp_path / "sharded").exists()
    with pytest.raises(ValueError, match=r"load_adapter: the model must be whole.*before fully_shard"):
        load_adapter(model, tmp_path / "whole")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.save_pretrained(tmp_path / "gathered", state_dict=state)
    assert_same_bits(load_adapter(packed_llama(), tmp_path / "gathered")(IDS).logits, expected)
