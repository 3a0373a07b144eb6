"""What no checkpoint held (a classifier's head, a pooler, a language model's new head) is trained, saved and loaded."""

import copy
import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    LlamaModel,
)

from nf4lora import NF4Config, NF4Linear, load_adapter, prepare, report, save_adapter
from nf4lora.adapters.new_weights import HELD_NAMES, new_parameters
from nf4lora.quantization.quantizer import layers_to_pack

from support.adapted import trainable
from support.bits import assert_same_bits
from support.families import inputs, tiny
from support.models import tiny_llama

# Before 5.23 transformers gives a model with a quantizer a tensor of any size, whatever it is asked; we refuse that.
IGNORES_SIZES = Version(transformers.__version__) >= Version("5.23")
NF4 = {"quantization_config": NF4Config()}


def language_model(folder, name="LlamaForCausalLM"):
    tiny(name).save_pretrained(folder)
    return folder


def trained(model, steps=3):
    model.train()
    batch = inputs(model.get_base_model()) | {"labels": torch.tensor([0, 1])}
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


# --- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, NF4], ids=["16-bit", "NF4"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM", "EsmForSequenceClassification"])
def test_a_classifier_made_from_a_language_model_answers_the_same_when_it_is_loaded_again(
    name, options, tmp_path, capsys
):
    language_model(tmp_path / "base", name)
    load = AutoModelForSequenceClassification.from_pretrained
    torch.manual_seed(1)
    model = prepare(load(tmp_path / "base", num_labels=2, **options), r=4)
    assert "trained in full and saved" in capsys.readouterr().out
    assert not new_parameters(model.get_base_model()) - {n for n, _ in model.get_base_model().named_parameters()}
    expected = trained(model)(**inputs(model.get_base_model())).logits
    save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(2)  # another random head
    bare = load(tmp_path / "base", num_labels=2, quantization_config=NF4Config())
    assert (bare(**inputs(bare)).logits - expected).abs().max() > 1e-3
    again = load_adapter(bare, tmp_path / "adapter").eval()
    assert_same_bits(again(**inputs(bare)).logits, expected)


def test_a_pooler_that_the_checkpoint_lacks_is_trained_and_not_packed(tmp_path):
    """BertForMaskedLM has no pooler; the classifier made from it draws one."""
    language_model(tmp_path, "BertForMaskedLM")
    for options in ({}, NF4):
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path, **options)
        assert {name for name in new_parameters(base) if "pooler" in name} == {
            "bert.pooler.dense.weight",
            "bert.pooler.dense.bias",
        }
        model = prepare(base, r=2)
        assert set(report(model).trained_in_full) >= {"bert.pooler", "classifier"}
        assert type(base.bert.pooler.modules_to_save["default"].dense) is nn.Linear


def test_such_a_model_is_saved_packed_and_read_back(tmp_path):
    language_model(tmp_path / "16", "BertForMaskedLM")
    base = prepare(AutoModelForSequenceClassification.from_pretrained(tmp_path / "16"), r=2).get_base_model()
    base.save_pretrained(tmp_path / "4")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "4")
    assert type(again.bert.pooler.dense) is nn.Linear
    assert isinstance(again.bert.encoder.layer[0].intermediate.dense, NF4Linear)
    assert_same_bits(again.classifier.weight, base.classifier.original_module.weight)
    assert not new_parameters(again)


def test_a_head_with_another_number_of_classes_is_new(tmp_path):
    language_model(tmp_path, "BertForSequenceClassification")
    for options in ({}, NF4):
        load = AutoModelForSequenceClassification.from_pretrained
        if options and not IGNORES_SIZES:
            with pytest.raises(ValueError, match=r"classifier.weight must be in the checkpoint as its config says"):
                load(tmp_path, num_labels=5, ignore_mismatched_sizes=True, **options)
            continue
        model = load(tmp_path, num_labels=5, ignore_mismatched_sizes=True, **options)
        assert new_parameters(model) == {"classifier.weight", "classifier.bias"}
        assert report(prepare(model, r=2)).trained_in_full == ("classifier",)


def test_a_language_model_made_from_a_bare_one_trains_its_new_head(tmp_path, capsys):
    LlamaModel(tiny("LlamaForCausalLM").config).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **NF4)
    model = prepare(base, r=2)
    assert "lm_head trained in full and saved (in no checkpoint)" in capsys.readouterr().out
    assert model.get_base_model().lm_head.modules_to_save["default"].weight.requires_grad


@pytest.mark.parametrize("options", [{}, NF4], ids=["16-bit", "NF4"])
def test_a_parameter_alone_that_the_checkpoint_lacks_is_warned_of_and_saved_with_the_adapter(options, tmp_path):
    """wav2vec2's vector that training masks with: many files lack it, and transformers draws it."""
    model = tiny("Wav2Vec2ForCTC")
    lacking = {name: tensor for name, tensor in model.state_dict().items() if "masked_spec_embed" not in name}
    model.save_pretrained(tmp_path / "base", state_dict=lacking)
    load = AutoModelForCTC.from_pretrained
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        base = load(tmp_path / "base", **options)
    assert any("masked_spec_embed must be in the checkpoint" in str(each.message) for each in said) == bool(options)
    assert new_parameters(base) == {"wav2vec2.masked_spec_embed"}
    with pytest.warns(UserWarning, match=r"wav2vec2\.masked_spec_embed was in no checkpoint and is in no layer"):
        model = prepare(base, r=2)
    with pytest.warns(UserWarning, match=r"masked_spec_embed was in no checkpoint.* saved with the adapter$"):
        save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(5)  # another draw
    again = load(tmp_path / "base", **NF4)
    assert not torch.equal(again.wav2vec2.masked_spec_embed, base.wav2vec2.masked_spec_embed)
    load_adapter(again, tmp_path / "adapter")
    assert_same_bits(again.wav2vec2.masked_spec_embed, base.wav2vec2.masked_spec_embed)


# --- how it is known -------------------------------------------------------------------------------------------------


def test_nothing_is_new_in_a_model_that_came_whole_or_from_no_checkpoint(tmp_path):
    assert new_parameters(tiny("BertForSequenceClassification")) == set()
    for name in ("LlamaForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration"):
        language_model(tmp_path / name, name)
    for load, name in (
        (AutoModelForCausalLM, "LlamaForCausalLM"),
        (AutoModelForMaskedLM, "BertForMaskedLM"),
        (AutoModel, "T5ForConditionalGeneration"),
    ):
        for options in ({}, NF4):
            model = load.from_pretrained(tmp_path / name, **options).to(torch.bfloat16)
            assert new_parameters(model) == set()
            assert new_parameters(prepare(model, r=2).unload()) == set()


def test_what_is_dequantised_is_not_new(tmp_path):
    language_model(tmp_path)
    assert new_parameters(AutoModelForCausalLM.from_pretrained(tmp_path, **NF4).dequantize()) == set()
    assert new_parameters(prepare(AutoModelForCausalLM.from_pretrained(tmp_path), r=2).unload().dequantize()) == set()


def scaled(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def untied(model):
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())


def assigned(model):
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)


def dequantised_by_another(model):
    """As transformers does it after bitsandbytes: other modules, with other parameters."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(module.weight.detach().clone())
            model.set_submodule(name, plain)


@pytest.mark.parametrize("noted", [True, False], ids=["loaded with nf4lora", "loaded before"])
@pytest.mark.parametrize("change", [scaled, untied, assigned, dequantised_by_another])
def test_what_was_replaced_since_it_was_loaded_is_not_new(change, noted, tmp_path):
    language_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    change(model)
    if not noted:
        del model.__dict__[HELD_NAMES]
    assert new_parameters(model) == set()
    layers = sum(type(module) is nn.Linear for module in model.modules()) - 1
    about = report(prepare(model, r=2))
    assert about.packed_layers == layers
    assert about.trained_in_full == ()


def test_a_copy_of_a_model_knows_what_is_new(tmp_path):
    language_model(tmp_path, "BertForMaskedLM")
    model = AutoModel.from_pretrained(tmp_path)
    assert new_parameters(copy.deepcopy(model)) == new_parameters(model) == {"pooler.dense.weight", "pooler.dense.bias"}


def test_a_model_loaded_before_nf4lora_was_imported_knows_what_is_new(tmp_path):
    language_model(tmp_path, "BertForMaskedLM")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    new = new_parameters(model)
    del model.__dict__[HELD_NAMES]
    assert new_parameters(model) == new
    assert {name.rpartition(".")[0] for name in new} == {"bert.pooler.dense", "classifier"}


def test_a_layer_that_the_user_has_added_is_new(tmp_path):
    language_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.model.extra = nn.Linear(64, 64)
    assert new_parameters(model) == {"model.extra.weight", "model.extra.bias"}


def test_a_new_pooler_that_is_trained_is_not_said_to_be_frozen_by_a_second_prepare(tmp_path):
    language_model(tmp_path, "BertForMaskedLM")
    model = prepare(AutoModel.from_pretrained(tmp_path), r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert prepare(model, r=2) is model


def test_a_grown_vocabulary_is_said_with_what_to_do(tmp_path):
    language_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(103)
    with pytest.warns(UserWarning, match=r"103 tokens, 99 of them in the checkpoint.*list\(range\(99, 103\)\)"):
        prepare(model, r=2)


def test_an_adapter_that_leaves_the_new_head_out_is_warned_of(tmp_path):
    from peft import get_peft_model

    language_model(tmp_path)
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(tmp_path), LoraConfig(r=2, target_modules=["q_proj"])
    )
    with pytest.warns(UserWarning, match="score must be trained with the adapter, but stays frozen"):
        prepare(model)


# --- heads are not packed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("BertForSequenceClassification", "RobertaForSequenceClassification", "DistilBertForSequenceClassification"),
        *("EsmForSequenceClassification", "ViTForImageClassification", "BertForTokenClassification"),
        *("BertForQuestionAnswering", "ElectraForSequenceClassification"),
    ],
)
@pytest.mark.parametrize("bits", ["16", "NF4", "bitsandbytes"])
def test_a_head_with_a_bias_stays_in_16_bits(name, bits, tmp_path):
    model = tiny(name)
    assert not [
        layer for layer in layers_to_pack(model, NF4Config())[0] if not layer.startswith(model.base_model_prefix)
    ]
    if bits != "16":
        if bits == "bitsandbytes":
            pytest.importorskip("bitsandbytes")
        model.save_pretrained(tmp_path)
        how = {"NF4": NF4Config(), "bitsandbytes": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
        model = type(model).from_pretrained(tmp_path, quantization_config=how[bits], dtype=torch.float32)
    model = prepare(model, r=2)
    for part in report(model).trained_in_full:
        trained_copy = model.get_base_model().get_submodule(part).modules_to_save["default"]
        for parameter in trained_copy.parameters():
            assert parameter.requires_grad
            assert parameter.is_floating_point()
    assert report(model).trained_in_full


def test_the_last_layer_of_a_model_without_a_head_stays_though_it_has_a_bias():
    """transformers' rule names the last parameter, pooler.dense.bias; meant is its layer."""
    packed, skipped = layers_to_pack(tiny("BertModel"), NF4Config())
    assert "pooler.dense" not in packed
    assert skipped["pooler.dense"] == "output head, last layer or tied to one: stays by transformers' rule"


# --- a head tied to the embedding ------------------------------------------------------------------------------------


def test_training_the_embedding_of_a_tied_model_says_that_it_unties(capsys):
    model = prepare(tiny_llama(tied=True), r=2, modules_to_save=["embed_tokens"])
    assert "model.embed_tokens no longer shares its weight with lm_head, which stays frozen" in capsys.readouterr().out
    about = report(model)
    assert {row.name: row.reason for row in about.kept}["lm_head"] == (
        "output head, tied to the embedding as it was before training"
    )
    assert about.trained_in_full == ("model.embed_tokens",)


def test_both_ends_of_a_tied_model_can_be_trained_as_one(capsys, tmp_path):
    tiny_llama(tied=True).save_pretrained(tmp_path / "base")
    load = AutoModelForCausalLM.from_pretrained
    model = prepare(load(tmp_path / "base"), r=2, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert "model.embed_tokens and lm_head trained as one weight" in capsys.readouterr().out
    base = model.get_base_model()
    embedding = base.model.embed_tokens.modules_to_save["default"].weight
    assert base.lm_head.modules_to_save["default"].weight is embedding
    nn.init.normal_(embedding)
    ids = torch.tensor([[3, 4, 5]])
    expected = model.eval()(ids).logits
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load(tmp_path / "base", **NF4), tmp_path / "adapter").eval()
    assert_same_bits(again(ids).logits, expected)


def test_labels_of_tokens_train_a_new_head_too(tmp_path):
    language_model(tmp_path)
    model = prepare(AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=3, **NF4), r=2)
    batch = inputs(model.get_base_model())
    model(**batch, labels=torch.ones_like(batch["input_ids"])).loss.backward()
    assert model.get_base_model().score.modules_to_save["default"].weight.grad.norm() > 0
