"""Cross-entropy of the trained tokens against torch's, and the models for which it may stand in."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nf4lora import loss
from nf4lora.loss import CrossEntropy, LossOutput, chunk_loss, has_plain_head, score

from models import tiny_llama


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1 << 25, 1])
def test_log_probabilities_and_gradient_are_torchs(bias, chunk, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", chunk)  # one chunk, and chunks of 16 rows with a ragged last one
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
    assert torch.equal(correct, logits.argmax(1) == targets)


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


def prepared(**options):
    model = tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1, **options).requires_grad_(False)
    original = copy.deepcopy(model)
    assert chunk_loss(model)
    return model, original


def batch():
    ids = torch.randint(0, 259, (3, 20))
    return ids, ids.where(torch.rand(3, 20) < 0.4, torch.tensor(-100))


@pytest.mark.parametrize("training", [False, True])
def test_a_models_own_loss_is_the_same_in_chunks(training):
    model, original = (each.train(training) for each in prepared())
    ids, labels = batch()
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    for extra in ({}, {"num_items_in_batch": torch.tensor(7)}, {"num_items_in_batch": 7}, {"shift_labels": shifted}):
        found, expected = (each(input_ids=ids, labels=labels, **extra) for each in (model, original))
        assert isinstance(found, LossOutput)
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(found.logits, expected.logits)
        assert found.loss is found["loss"] is found[0]


def test_gradients_pass_through_the_chunked_loss():
    model, original = prepared()
    ids, labels = batch()
    grads = []
    for each in (model, original):
        embeds = each.get_input_embeddings()(ids).detach().requires_grad_()
        each.train()(inputs_embeds=embeds, labels=labels).loss.backward()
        grads.append(embeds.grad)
    torch.testing.assert_close(*grads)


def test_logits_are_computed_when_asked_for_and_listed_in_evaluation_only():
    model, original = prepared()
    ids, labels = batch()
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    output = model.train()(input_ids=ids, labels=labels, use_cache=False)
    assert list(output) == ["loss"] and len(output.to_tuple()) == 1 and not calls
    assert output["logits"].shape == (3, 20, 259) and output.logits is output["logits"] and len(calls) == 1
    output = model.eval()(input_ids=ids, labels=labels, use_cache=False)
    expected = original.eval()(input_ids=ids, labels=labels, use_cache=False)
    assert list(output) == list(expected) == ["loss", "logits"] and len(calls) == 1
    torch.testing.assert_close(dict(output.items()), dict(expected.items()))
    torch.testing.assert_close(output[1], expected[1])


def test_calls_that_ask_for_something_else_get_what_they_ask_for():
    model, original = prepared()
    ids, labels = batch()
    for wanted in ({}, {"labels": labels, "logits_to_keep": 20}, {"labels": labels, "return_dict": False}):
        found, expected = (each(input_ids=ids, **wanted) for each in (model, original))
        assert type(found) is type(expected) is not LossOutput
        torch.testing.assert_close(found[0], expected[0])
    model.loss_function = lambda logits, labels, **_: logits.sum()
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, original(input_ids=ids).logits.sum())


def test_no_label_at_all_is_nan_as_for_torch():
    model, original = prepared()
    ids, _ = batch()
    labels = torch.full_like(ids, -100)
    assert model(input_ids=ids, labels=labels).loss.isnan() and original(input_ids=ids, labels=labels).loss.isnan()


def test_a_copy_of_the_model_computes_its_own_loss():
    model, _ = prepared()
    ids, labels = batch()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(3)
    assert other(input_ids=ids, labels=labels).loss != model(input_ids=ids, labels=labels).loss
    assert "labels" in inspect.signature(model.forward).parameters


def test_a_head_that_is_trained_or_scaled_keeps_its_models_loss():
    model = tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    assert not chunk_loss(model)
    model.requires_grad_(False)
    assert chunk_loss(model) and not chunk_loss(model)  # once is enough
    model.lm_head.weight.requires_grad_(True)
    ids, labels = batch()
    model(input_ids=ids, labels=labels).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


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
    assert type(found) is not LossOutput and found.loss != plain
    torch.testing.assert_close(found.loss, original(input_ids=ids, labels=labels).loss)


def test_the_loss_holds_few_logits(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 16 * 259)
    model, _ = prepared()
    ids = torch.randint(0, 259, (4, 200))
    sizes = []
    amax = torch.Tensor.amax
    monkeypatch.setattr(torch.Tensor, "amax", lambda t, *a, **k: sizes.append(t.numel()) or amax(t, *a, **k))
    model.train()(input_ids=ids, labels=ids)
    assert max(sizes) == 16 * 259
