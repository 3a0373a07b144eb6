"""Blocks that torch.compile has compiled, one by one: the same numbers, few programs, clean names, exact resumption."""
# ruff: noqa: F811  (a package may be missing; fixtures are imported)

import copy
import shutil

import pytest

pytest.importorskip("trl")
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

import nf4lora
from nf4lora.train.errors import RunError
from nf4lora.train.speed import compiled
from nf4lora.train.speed.blocks import decoder_blocks

from support.adapted import relative, trainable
from support.models import tiny_llama
from support.train_runs import adapter, base, data, equal, losses, options, quick, train  # noqa: F401

pytestmark = pytest.mark.slow  # a program takes ten seconds to compile

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
OTHERS = {**SMALL, "head_dim": 16, "vocab_size": 259, "max_position_embeddings": 512}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def build(name, blocks=4):
    torch.manual_seed(0)
    if name == "llama":
        return tiny_llama(**SMALL, num_hidden_layers=blocks)
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**OTHERS, num_hidden_layers=blocks))
    config = Gemma3TextConfig(**OTHERS, num_hidden_layers=blocks, layer_types=SLIDING[:blocks], sliding_window=8)
    return Gemma3ForCausalLM(config)


def prepared(name, blocks=4, **options):
    model = nf4lora.prepare(build(name, blocks), r=4, **options).train()
    for p in trainable(model).values():
        nn.init.normal_(p, std=0.05)
    return model


def step(model, length, seed=3):
    """Loss and gradients of two texts, of which the second is padded."""
    ids = torch.arange(2 * length).view(2, length) % 259
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(input_ids=ids, attention_mask=mask, labels=ids.where(mask == 1, -100), use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainable(model).items()}


@pytest.fixture
def programs():
    """How many programs torch has compiled since the test began."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "checkpointing"), [("llama", False), ("qwen3", True), ("gemma3", False)])
def test_losses_and_gradients_are_those_of_the_model_as_it_was(name, checkpointing, programs):
    model = prepared(name, lora_dropout=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lengths = (12, 17, 33, 20)
    expected = [step(model, length) for length in lengths]
    assert compiled.compile_blocks(model) == 4
    for length, (loss, grads) in zip(lengths, expected, strict=True):
        got, gradients = step(model, length)
        torch.testing.assert_close(got, loss, rtol=1e-5, atol=0)
        for key, grad in grads.items():
            assert relative(gradients[key], grad) < 1e-4, key  # float32 sums in another order
    # With the first block, whose input wants no gradient: two, for four blocks and four lengths.
    assert programs() <= 2


def test_a_deeper_model_has_no_more_programs(programs):
    counts = []
    for blocks in (2, 6):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = prepared("llama", blocks)
        compiled.compile_blocks(model)
        step(model, 12)
        counts.append(programs())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_nothing_of_ours_breaks_a_block_into_several_programs(name, programs):
    model = prepared(name, 2)
    calls = []
    for block in decoder_blocks(model, "torch_compile").values():
        block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    step(model, 12)
    for block, (args, kwargs) in zip(decoder_blocks(model, "torch_compile").values(), calls, strict=True):
        block._forward_pre_hooks.clear()
        args = [arg.detach().requires_grad_() for arg in args]
        whole = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")  # raises where it breaks
        torch.testing.assert_close(whole(*args, **kwargs), block(*args, **kwargs), rtol=1e-5, atol=1e-6)


def test_names_and_copies_of_a_compiled_model_are_clean(tmp_path, programs):
    model = prepared("llama", 2)
    names = [*model.state_dict()]
    compiled.compile_blocks(model)
    step(model, 12)
    assert [*model.state_dict()] == names
    nf4lora.save_adapter(model, tmp_path / "adapter")
    fresh = nf4lora.load_adapter(nf4lora.prepare(build("llama", 2), r=4).unload(), tmp_path / "adapter")
    assert not copy.deepcopy(fresh).training
    loaded = [p for name, p in fresh.named_parameters() if "lora_" in name]
    for (key, p), q in zip(trainable(model).items(), loaded, strict=True):
        assert torch.equal(p, q), key


def test_a_model_without_blocks_is_refused():
    with pytest.raises(RunError, match="torch_compile: Linear names no blocks that repeat; use torch_compile false"):
        compiled.compile_blocks(nn.Linear(2, 2))


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_compiled_run_trains_as_another_one_and_is_resumed_to_the_bit(base, data, tmp_path, checkpointing):
    flags = ("--gradient_checkpointing", checkpointing, "--lora_dropout", "0.2", "--val_size", "4", "--save_steps", "2",
             "--save_total_limit", "9", "--max_steps", "4", "--learning_rate", "1e-3")  # fmt: skip
    torch._dynamo.reset()
    _, said = train(*options(base, data, tmp_path / "whole", *flags, "--torch_compile"))
    assert "faster   torch_compile" in said
    train(*options(base, data, tmp_path / "eager", *flags))
    a, b = adapter(tmp_path / "whole"), adapter(tmp_path / "eager")
    assert a.keys() == b.keys()
    assert not any("_orig_mod" in name for name in a)
    # Where dropout leaves a gradient near zero, Adam's first steps have the sign that rounding gives it.
    distance = sum(float((a[name] - b[name]).square().sum()) for name in a)
    assert distance < 1e-4 * sum(float(tensor.square().sum()) for tensor in b.values())
    for (x,), (y,) in zip(losses(tmp_path / "whole", "loss"), losses(tmp_path / "eager", "loss"), strict=True):
        assert x == pytest.approx(y, rel=1e-4)
    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole", parts)
    (parts / "adapter_model.safetensors").unlink()
    torch._dynamo.reset()  # as in another process: the first batch that is compiled for is another one
    again = ("--resume_from_checkpoint", str(parts / "checkpoint-2"))
    _, said = train(*options(base, data, parts, *flags, "--torch_compile", *again))
    assert "another run" not in said
    assert equal(a, adapter(parts))
    assert losses(tmp_path / "whole", "step", "loss") == losses(parts, "step", "loss")
