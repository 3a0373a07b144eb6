"""Cross-entropy of the trained tokens against torch's, and how it comes behind a model's own forward."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nf4lora.loss import cross_entropy
from nf4lora.loss.causal_lm import chunk_loss, has_chunked_loss, has_plain_head, score
from nf4lora.loss.cross_entropy import CrossEntropy
from nf4lora.loss.deferred_logits import DeferredLogits

from support.bits import assert_same_bits
from support.models import tiny_llama


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1 << 25, 1])
def test_log_probabilities_and_gradient_are_torchs(bias, chunk, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk)  # one chunk, and chunks of 16 rows with a ragged last one
    hidden, weight = torch.randn(50, 24, requires_grad=True), torch.randn(40, 24)
    offset = torch.randn(40) if bias else None
    targets, upstream = torch.randint(0, 40, (50,)), torch.randn(50)
    log_p, correct = CrossEntropy.apply(hidden, weight, offset, targets)
    (ours,) = torch.autograd.grad((log_p * upstream).sum(), hidden)
    logits = F.linear(hidden, weight, offset)
    expected = -F.cross_entropy(logits, targets, reduction="none")
    (theirs,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    torch.testing.assert_close(log_p, expected)  # float32 sums in another order
    torch.testing.assert_close(ours, theirs)
    assert_same_bits(correct, logits.argmax(1) == targets)


def test_nothing_trained_is_zero_and_differentiable():
    hidden = torch.randn(0, 8, requires_grad=True)
    log_p, _ = CrossEntropy.apply(hidden, torch.randn(5, 8), None, torch.empty(0, dtype=torch.int64))
    log_p.sum().backward()
    assert log_p.sum() == 0
    assert hidden.grad.shape == (0, 8)


def test_score_counts_exactly_the_labelled_tokens():
    model = tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    ids = torch.randint(0, 259, (3, 20))
    labels = ids.where(torch.rand(3, 20) < 0.4, torch.tensor(-100))
    log_p, _ = score(model, {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    expected = model(input_ids=ids, labels=labels).loss
    assert len(log_p) == labels[:, 1:].ne(-100).sum()
    torch.testing.assert_close(-log_p.mean(), expected)


class Scaled(nn.Module):
    """A model whose logits are not its head's output."""

    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor, self.base_model = model, factor, model.base_model

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, **inputs):
        output = self.model(**inputs)
        output.logits = output.logits * self.factor
        return output


def test_head_is_plain_only_if_the_logits_are_its_output():
    model = tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1).requires_grad_(False)
    cpu = torch.device("cpu")
    assert has_plain_head(model, cpu)
    assert has_plain_head(Scaled(model, 1.0), cpu)
    assert not has_plain_head(Scaled(model, 0.5), cpu)
    model.lm_head.weight.requires_grad_(True)
    assert not has_plain_head(model, cpu)


class Remembering(nn.Module):
    """A part that notes each call in a buffer, draws random numbers, and counts in Python where it trains."""

    def __init__(self, part):
        super().__init__()
        self.part = part
        self.register_buffer("calls", torch.zeros(1))
        self.mean = nn.BatchNorm1d(64)

    def forward(self, *args, **kwargs):
        self.calls += 1
        self.calls = self.calls + torch.rand(1)
        return self.part(*args, **kwargs)


def test_trying_the_head_leaves_no_trace():
    model = tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1).requires_grad_(False)
    model.model.norm = Remembering(model.model.norm)
    model.train()
    model.model.layers.eval()  # a frozen part that its user keeps in evaluation mode
    model.model.embed_tokens.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    same = dict(model.named_buffers())
    state = torch.get_rng_state()
    assert has_plain_head(model, torch.device("cpu")) in (True, False)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(buffer is same[name] for name, buffer in model.named_buffers())
    assert_same_bits(torch.get_rng_state(), state)


class Broken(nn.Module):
    def forward(self, *args, **kwargs):
        raise ZeroDivisionError("of a model that takes other inputs")


def test_a_model_that_fails_when_it_is_tried_has_no_plain_head():
    model = tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1).requires_grad_(False).train()
    model.model.norm = Broken()
    assert not has_plain_head(model, torch.device("cpu"))
    assert model.training
    assert model.model.training
    assert not has_plain_head(nn.Linear(2, 2), torch.device("cpu"))


def prepared(**options):
    model = tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1, **options).requires_grad_(False)
    original = copy.deepcopy(model)
    assert chunk_loss(model)
    return model, original


def batch():
    ids = torch.randint(0, 259, (3, 20))
    return ids, ids.where(torch.rand(3, 20) < 0.4, torch.tensor(-100))


def test_once_is_enough_and_a_model_without_an_output_head_is_left_alone():
    model, _ = prepared()
    assert not chunk_loss(model)
    assert not chunk_loss(nn.Sequential(nn.Linear(2, 2)))
    assert not chunk_loss(model.model), "the backbone has no logits"
    from transformers import LlamaForSequenceClassification

    assert not chunk_loss(LlamaForSequenceClassification(model.config))


def test_a_copy_of_the_model_computes_its_own_loss():
    model, _ = prepared()
    ids, labels = batch()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(3)
    assert other(input_ids=ids, labels=labels).loss != model(input_ids=ids, labels=labels).loss
    assert "labels" in inspect.signature(model.forward).parameters


def test_a_pickled_model_computes_the_same_loss():
    model, _ = prepared()
    ids, labels = batch()
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(input_ids=ids, labels=labels).loss, model(input_ids=ids, labels=labels).loss)


def test_whether_the_head_is_trained_is_asked_at_each_call():
    # A model that was loaded is frozen by get_peft_model later, and a head may be trained later still.
    model = tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    assert chunk_loss(model)
    assert not has_chunked_loss(model)
    ids, labels = batch()
    output = model(input_ids=ids, labels=labels)
    output.loss.backward()
    assert type(output.logits) is torch.Tensor
    assert model.lm_head.weight.grad.abs().sum() > 0
    model.requires_grad_(False)
    assert has_chunked_loss(model)
    assert type(model(input_ids=ids, labels=labels).logits) is DeferredLogits


class Doubled(nn.Module):
    """A head that was wrapped after `chunk_loss`, as PEFT does to put an adapter on it."""

    def __init__(self, head):
        super().__init__()
        self.head, self.weight = head, head.weight

    def forward(self, hidden):
        return 2 * self.head(hidden)


def test_a_head_that_is_wrapped_later_is_not_bypassed():
    model, original = prepared()
    ids, labels = batch()
    plain = model(input_ids=ids, labels=labels).loss
    for each in (model, original):
        each.set_output_embeddings(Doubled(each.get_output_embeddings()))
    found = model(input_ids=ids, labels=labels)
    assert type(found.logits) is torch.Tensor
    assert found.loss != plain
    torch.testing.assert_close(found.loss, original(input_ids=ids, labels=labels).loss)


def test_the_loss_holds_few_logits(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", 16 * 259)
    model, _ = prepared()
    ids = torch.randint(0, 259, (4, 200))
    sizes = []
    amax = torch.Tensor.amax
    monkeypatch.setattr(torch.Tensor, "amax", lambda t, *a, **k: sizes.append(t.numel()) or amax(t, *a, **k))
    model.train()(input_ids=ids, labels=ids)
    assert max(sizes) == 16 * 259


def test_a_model_that_was_copied_or_pickled_has_the_loss_in_chunks():
    model = tiny_llama().requires_grad_(False)
    assert chunk_loss(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    ids = torch.arange(12).reshape(1, 12)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert has_chunked_loss(twin)
        assert vars(twin)["forward"].base is twin
        assert type(twin(input_ids=ids, labels=ids).logits) is DeferredLogits
    assert inspect.signature(model.forward) == inspect.signature(tiny_llama().forward)


def test_an_adapter_by_plain_peft_over_a_loaded_model_has_the_loss_in_chunks(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import nf4lora

    tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4lora.NF4Config())
    model = get_peft_model(loaded, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    ids, labels = batch()
    output = model(input_ids=ids, labels=labels)
    assert type(output.logits) is DeferredLogits
    output.loss.backward()
    nf4lora.save_adapter(model, tmp_path / "adapter")
    base = tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4lora.NF4Config())
    assert (
        type(nf4lora.load_adapter(fresh, tmp_path / "adapter")(input_ids=ids, labels=labels).logits) is DeferredLogits
    )
    assert type(base(input_ids=ids, labels=labels).logits) is torch.Tensor


@pytest.mark.parametrize("prompts", [1, 3])
def test_generating_never_copies_the_frozen_head_for_each_prompt(prompts):
    """torch makes a batched product of a slice of hidden states and a frozen weight: the weight once for each row."""
    model = prepared()[0].eval()
    ids = torch.arange(prompts * 6).reshape(prompts, 6)
    wanted = [model.generate(ids[i : i + 1], max_new_tokens=4, do_sample=False) for i in range(prompts)]

    class Products(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.bmm.default:
                self.largest = max(self.largest, *(tensor.numel() for tensor in args[:2]))
            return func(*args, **(kwargs or {}))

    with Products() as seen:
        found = model.generate(ids, max_new_tokens=4, do_sample=False)
        logits = model(ids, logits_to_keep=2).logits
    assert_same_bits(found, torch.cat(wanted))
    assert seen.largest < model.get_output_embeddings().weight.numel()
    torch.testing.assert_close(logits, model(ids).logits[:, -2:])
