"""Models that read images too: text data trains their text part."""
# ruff: noqa: F811  (a package may be missing; fixtures are imported)

import json

import pytest
import torch

pytest.importorskip("trl")

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    Mistral3Config,
    Qwen3_5Config,
    Qwen3_5TextConfig,
    WhisperConfig,
)

from nf4lora.train.errors import RunError
from nf4lora.train.model import auto_class
from nf4lora.train.reach import as_pattern, parts, unreached

from support.models import tiny_tokenizer
from support.train_runs import adapter, data, options, quick, train  # noqa: F401

TEXT = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512, "pad_token_id": 256,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """Folder of a tiny Gemma 3 with its vision tower."""
    folder = tmp_path_factory.mktemp("gemma")
    torch.manual_seed(0)
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 290, "boi_token_index": 291, "eoi_token_index": 292}
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, **tokens)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("more", [(), ("--lora_target_modules", "q_proj,v_proj"), ("--load_in_4bit", "false")])
def test_the_text_part_of_a_multimodal_model_is_trained(gemma, data, tmp_path, more):
    code, said = train(*options(gemma, data, tmp_path / "out", "--max_steps", "1", *more))
    assert code == 0
    assert "text does not pass through model.vision_tower: no adapters there" in said
    assert all(".language_model.layers." in name for name in adapter(tmp_path / "out"))
    assert "AutoModelForImageTextToText.from_pretrained" in said
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["exclude_modules"] == r"(model\.vision_tower)(\..*)?"


def test_adapters_that_text_never_reaches_are_refused_with_the_option_that_helps(gemma, data, tmp_path):
    asked = options(gemma, data, tmp_path / "out", "--max_steps", "1",
                    "--lora_target_modules", r".*(vision_tower|language_model).*\.q_proj")  # fmt: skip
    with pytest.raises(RunError, match="no gradient reaches .*vision_tower") as raised:
        train(*asked)
    assert not list((tmp_path / "out").glob("*"))
    option, value = str(raised.value).splitlines()[1].split()
    assert train(*asked, option, value.strip("'"))[0] == 0


def test_parts_stand_for_all_that_is_dead_and_nothing_that_lives():
    dead = {"vision.layers.0.q", "vision.layers.0.k", "projector", "text.layers.3.k"}
    alive = {"text.layers.3.q", "text.layers.2.k", "head"}
    assert parts(dead, alive) == ["projector", "text.layers.3.k", "vision"]
    assert as_pattern(["text.layers.3.k", "vision"]) == r"(text\.layers\.3\.k|vision)(\..*)?"


class Block(torch.nn.Module):
    """A layer whose key is unused in every second copy, as in models whose layers share their cache."""

    def __init__(self, shares):
        super().__init__()
        self.q, self.k = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.experts = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
        self.shares = shares

    def forward(self, x):
        return self.q(x) if self.shares else self.q(x) + self.k(x)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers = torch.nn.Embedding(20, 8), torch.nn.ModuleList([Block(False), Block(True)])
        self.tower = torch.nn.ModuleList([Block(False)]).train()

    def forward(self, input_ids, attention_mask, use_cache):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_that_are_not_called_are_found_whatever_they_are_called():
    model = Model().train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert unreached(model, [1, 2, 3], "all-linear") == ["layers.1.k", "tower.0.k", "tower.0.q"]
    assert unreached(model, [1, 2, 3], ["q", "k"]) == ["layers.1.k", "tower.0.k", "tower.0.q"]
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("config", "saved_as", "expected"),
    [
        (LlamaConfig(), "LlamaForCausalLM", "AutoModelForCausalLM"),
        (LlamaConfig(), None, "AutoModelForCausalLM"),
        (Mistral3Config(), "Mistral3ForConditionalGeneration", "AutoModelForImageTextToText"),
        (Mistral3Config(), None, "AutoModelForImageTextToText"),
        (Qwen3_5Config(), "Qwen3_5ForConditionalGeneration", "AutoModelForImageTextToText"),
        (Qwen3_5TextConfig(), "Qwen3_5ForCausalLM", "AutoModelForCausalLM"),
        (WhisperConfig(), "WhisperForConditionalGeneration", None),
    ],
)
def test_a_checkpoint_is_opened_as_what_it_was_saved_from(config, saved_as, expected):
    config.architectures = [saved_as] if saved_as else None
    if expected is None:
        with pytest.raises(RunError, match="m is a WhisperForConditionalGeneration; nf4lora train trains models that"):
            auto_class(config, "m")
    else:
        assert auto_class(config, "m").__name__ == expected
