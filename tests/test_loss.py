"""Cross-entropy of the trained tokens against torch's, and the models for which it may stand in."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nf4lora.train import loss
from nf4lora.train.loss import CrossEntropy, has_plain_head, score

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
