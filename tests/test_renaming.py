"""An adapter of a text model on the multimodal model that it was taken from, and the other way round."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from nf4lora import NF4Config, load_adapter, save_adapter
from nf4lora.adapters.renaming import find_prefixes, module_of

from support.adapted import adapted, packed_llama
from support.bits import assert_same_bits

IDS = torch.arange(5, 15)[None]
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 99,
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A checkpoint of a vision-language Qwen 3.5, which AutoModelForCausalLM reads as its text part."""
    linear = {f"linear_num_{part}_heads": 2 for part in ("key", "value")}
    linear |= {f"linear_{part}_head_dim": 32 for part in ("key", "value")}
    config = transformers.Qwen3_5Config(
        text_config={**TEXT, **linear, "layer_types": ["linear_attention", "full_attention"]},
        vision_config={
            "hidden_size": 64, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 64,
            "num_position_embeddings": 16,
        },
        image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen")
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A Gemma 3, in which the image encoder calls its projections as the text part does."""
    config = transformers.Gemma3Config(
        text_config={**TEXT, "layer_types": ["full_attention"] * 2},
        vision_config={
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4, image_token_index=90, boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("gemma")
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    # the text part alone, as a checkpoint of its own
    model = transformers.Gemma3ForConditionalGeneration.from_pretrained(folder)
    text = transformers.Gemma3ForCausalLM(model.config.text_config)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.tie_weights()
    text.save_pretrained(folder / "text")
    return folder


def text_of(folder):
    where = folder / "text" if (folder / "text").exists() else folder
    return AutoModelForCausalLM.from_pretrained(where, quantization_config=NF4Config(), dtype=torch.float32)


def whole_of(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, quantization_config=NF4Config(), dtype=torch.float32)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # the same products through another wrapper


@pytest.mark.parametrize("name", ["qwen", "gemma"])
@pytest.mark.parametrize("plain", [False, True], ids=["ours", "plain PEFT"])
def test_an_adapter_of_the_text_part_fits_the_whole_model(name, plain, request, tmp_path):
    folder = request.getfixturevalue(name)
    model = adapted(text_of(folder))
    if plain:
        model.save_pretrained(tmp_path)
    else:
        save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match=r"model is model\.language_model here"):
        loaded = load_adapter(whole_of(folder), tmp_path)
    assert not [key for key, _ in loaded.named_parameters() if "lora_" in key and "vis" in key]
    close(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["qwen", "gemma"])
def test_an_adapter_of_the_whole_model_on_its_text_part_fits_the_text_model(name, request, tmp_path):
    folder = request.getfixturevalue(name)
    model = adapted(whole_of(folder), target_modules=r".*language_model.*_proj", task_type=None)
    save_adapter(model, tmp_path)
    with pytest.warns(
        UserWarning, match=r"trained on \S+ForConditionalGeneration .* model\.language_model is model here"
    ):
        loaded = load_adapter(text_of(folder), tmp_path)
    close(logits(loaded), logits(model))


def test_what_was_loaded_under_other_names_is_saved_and_loaded_under_these(qwen, tmp_path, recwarn):
    save_adapter(adapted(text_of(qwen)), tmp_path / "text")
    loaded = load_adapter(whole_of(qwen), tmp_path / "text")
    save_adapter(loaded, tmp_path / "whole")
    recwarn.clear()
    again = load_adapter(whole_of(qwen), tmp_path / "whole")
    assert not [warning for warning in recwarn if "other names" in str(warning.message)]
    assert_same_bits(logits(again), logits(loaded))
    prepared = adapted(whole_of(qwen), target_modules=r".*language_model\.layers.*(proj|proj_.*)", task_type=None)
    assert_same_bits(logits(load_adapter(prepared, tmp_path / "whole")), logits(loaded))


def test_a_prepared_whole_model_takes_the_adapter_of_the_text_part(gemma, tmp_path):
    model = adapted(text_of(gemma), target_modules=r"model\.layers.*_proj")
    save_adapter(model, tmp_path)
    whole = adapted(whole_of(gemma), target_modules=r".*language_model.*_proj", task_type=None)
    with pytest.warns(UserWarning, match="other names"):
        loaded = load_adapter(whole, tmp_path)
    close(logits(loaded), logits(model))


def test_another_text_part_is_refused_under_other_names_too(qwen, gemma, tmp_path):
    save_adapter(adapted(text_of(gemma)), tmp_path)
    other = whole_of(gemma)
    with torch.no_grad():
        other.model.language_model.layers[0].mlp.up_proj.weight[0, 0] ^= 1
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj has other codes"):
        load_adapter(other, tmp_path)
    with pytest.raises(ValueError, match=r"has shape \[128, 64\] instead of \[64, 64\]"):
        load_adapter(whole_of(qwen), tmp_path)


def test_an_adapter_of_the_image_encoder_has_no_place_in_the_text_model(gemma, tmp_path):
    save_adapter(adapted(whole_of(gemma), task_type=None), tmp_path)
    with pytest.raises(ValueError, match="vision_tower|must fit the model"):
        load_adapter(text_of(gemma), tmp_path)


def test_an_adapter_of_the_bare_decoder_fits_the_model_with_a_head(tmp_path):
    full = packed_llama()
    model = adapted(full.model, task_type=None)
    save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="other names"):
        loaded = load_adapter(packed_llama(), tmp_path)
    with torch.no_grad():
        hidden = model.eval()(IDS)[0]
        assert_same_bits(loaded(IDS).logits, full.lm_head(hidden))


def test_names_as_they_were_before_transformers_5_are_found(gemma, tmp_path):
    model = adapted(whole_of(gemma), target_modules=r".*language_model.*_proj", task_type=None)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    old = {key.replace("model.language_model.", "language_model.model.", 1): value for key, value in
           ((key.removeprefix("base_model.model."), value) for key, value in load_file(file).items())}  # fmt: skip
    save_file({f"base_model.model.{key}": value for key, value in old.items()}, file)
    loaded = load_adapter(whole_of(gemma), tmp_path)
    close(logits(loaded), logits(model))


def test_where_several_places_fit_and_none_is_the_decoder_nothing_is_exchanged():
    model = nn.ModuleDict({"one": nn.ModuleDict({"q": nn.Linear(1, 1)}), "two": nn.ModuleDict({"q": nn.Linear(1, 1)})})
    assert find_prefixes(["base_model.model.model.q.lora_A.weight"], [], model) == {}
    assert find_prefixes(["base_model.model.model.one.q.lora_A.weight"], [], model) == {"model": ""}
    assert find_prefixes(["base_model.model.one.q.lora_A.weight"], [], model) == {}


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("base_model.model.a.q.lora_A.weight", "a.q"),
        ("base_model.model.a.embed.lora_embedding_A", "a.embed"),
        ("base_model.model.a.q.lora_magnitude_vector.weight", "a.q"),
        ("base_model.model.a.embed.token_adapter.trainable_tokens_delta", "a.embed"),
        ("base_model.model.a.experts.base_layer.lora_A.weight", "a.experts"),
        ("base_model.model.score.weight", "score"),
        ("base_model.model.classifier.dense.bias", "classifier.dense"),
    ],
)
def test_the_module_of_a_key(key, module):
    assert module_of(key) == module
