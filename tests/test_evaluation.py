"""An evaluation in the middle of training changes nothing: train-eval-train equals train, to the bit."""

import pytest
import torch

import nf4lora
from nf4lora import PagedAdamW

from support.adapted import packed_llama
from support.bits import assert_same_bits
from support.models import tiny_llama

BATCH = torch.randint(0, 259, (2, 24), generator=torch.Generator().manual_seed(3))
STEPS = 4
OPTIMIZERS = {
    "torch": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "32 bits": lambda parameters: PagedAdamW(parameters, lr=1e-2),
    "8 bits": lambda parameters: PagedAdamW(parameters, lr=1e-2, bits=8),
}


def prepared(packed_at_load=True, dtype=torch.bfloat16):
    base = packed_llama(dtype=dtype) if packed_at_load else tiny_llama(hidden_size=64, num_hidden_layers=1, dtype=dtype)
    torch.manual_seed(1)
    return nf4lora.prepare(base, r=4, lora_dropout=0.1)


def trained(model, make_optimizer, between=lambda model: None):
    """The adapter after a few steps with dropout, with something done before each of them."""
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    torch.manual_seed(7)
    model.train()
    for step in range(STEPS):
        between(model)
        ids = BATCH.roll(step, 1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def evaluate(tokens):
    def between(model):
        model.eval()
        ids = torch.arange(tokens)[None] % 259
        with torch.no_grad():
            model(input_ids=ids)
            float(model(input_ids=ids, labels=ids).loss)
        with torch.inference_mode():
            model(input_ids=ids)
        model.train()

    return between


def generate(model):
    model.eval()
    model.generate(BATCH[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.train()


def in_training_mode(model):
    """Without `eval()`, as who logs a loss in between does; the masks drawn for it must not shift the later ones."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model(input_ids=BATCH, labels=BATCH)


def everything(model):
    for tokens in (1, 2, 8, 9, 16, 17, 64):
        evaluate(tokens)(model)
    generate(model)
    in_training_mode(model)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("packed_at_load", [True, False], ids=["NF4", "16 bits"])
def test_training_with_evaluations_in_between_equals_training(optimizer, packed_at_load):
    expected = trained(prepared(packed_at_load), OPTIMIZERS[optimizer])
    found = trained(prepared(packed_at_load), OPTIMIZERS[optimizer], everything)
    assert expected.keys() == found.keys()
    for name in expected:
        assert_same_bits(expected[name], found[name], name)
    start = prepared(packed_at_load)
    assert any(not torch.equal(p, found[name]) for name, p in start.named_parameters() if name in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 64])
def test_in_other_dtypes_too(dtype, tokens):
    expected = trained(prepared(dtype=dtype), OPTIMIZERS["torch"])
    found = trained(prepared(dtype=dtype), OPTIMIZERS["torch"], evaluate(tokens))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_evaluation_between_forward_and_backward_changes_no_gradient():
    def gradients(between):
        model = prepared().train()
        torch.manual_seed(7)
        loss = model(input_ids=BATCH, labels=BATCH).loss
        between(model)
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected, found = gradients(lambda model: None), gradients(everything)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_save_and_a_load_in_between_change_nothing(tmp_path):
    def save_and_load(model):
        nf4lora.save_adapter(model, tmp_path / "adapter")
        nf4lora.load_adapter(model, tmp_path / "adapter")

    expected = trained(prepared(), OPTIMIZERS["torch"])
    found = trained(prepared(), OPTIMIZERS["torch"], save_and_load)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
