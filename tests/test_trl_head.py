"""A call of TRL's fused head on a CPU gets the same numbers from our loss in chunks, or is left to TRL."""

import copy

import pytest
import torch

from nf4lora.loss import trl_head
from nf4lora.loss.causal_lm import chunk_loss

from support.models import tiny_llama

trl = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
if not hasattr(trl, "add_fused_lm_head"):
    pytest.skip("this release of trl has no fused head", allow_module_level=True)

SFT = {"outputs": ("log_probs", "entropy", "is_top1")}


@pytest.fixture
def taken_over(monkeypatch):
    calls, original = [], trl_head.score
    monkeypatch.setattr(trl_head, "score", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def pair(dtype=torch.float32, **options):
    """A model whose head TRL has fused, on top of ours and alone."""
    alone = tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1, dtype=dtype).requires_grad_(False)
    ours = copy.deepcopy(alone)
    assert chunk_loss(ours)
    for model in (ours, alone):
        trl.add_fused_lm_head(model, **{**SFT, **options})
    return ours, alone


def batch():
    ids = torch.randint(0, 259, (3, 20))
    return ids, ids.where(torch.rand(3, 20) < 0.4, torch.tensor(-100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [None, torch.tensor(7)])
@pytest.mark.parametrize("shifted", [False, True])
def test_numbers_and_gradients_are_those_of_trl(dtype, count, shifted, taken_over):
    ids, labels = batch()
    inputs = {"labels": labels, "fused_lm_head": True, "num_items_in_batch": count}
    if shifted:
        inputs["shift_labels"] = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    outputs, grads = [], []
    for model in pair(dtype):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        outputs.append(model(inputs_embeds=embeds, **inputs))
        (-outputs[-1].log_probs.sum() + outputs[-1].loss).backward()
        grads.append(embeds.grad)
    found, expected = outputs
    assert len(taken_over) == 1
    assert type(found) is type(expected)
    assert list(found) == list(expected)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]  # TRL multiplies in float32, we as the head does
    for name in found:
        assert found[name].shape == expected[name].shape, name
        assert found[name].dtype == expected[name].dtype, name
        if name != "is_top1":  # which two neighbours in bfloat16 may swap
            torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)
    assert (found.is_top1 != expected.is_top1).sum() <= (0 if dtype == torch.float32 else 2)
    torch.testing.assert_close(*grads, rtol=10 * tolerance, atol=tolerance)


def test_a_batch_without_any_label_is_a_zero_that_can_be_differentiated():
    ids, _ = batch()
    for model in pair():
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        output = model(inputs_embeds=embeds, labels=torch.full_like(ids, -100), fused_lm_head=True)
        output.log_probs.sum().backward()
        assert output.loss == 0
        assert embeds.grad.abs().sum() == 0


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"cast_lm_head_to_fp32": True},
        {"outputs": ("log_probs",)},
        {"outputs": ("log_probs", "mean_logits")},
    ],
    ids=str,
)
def test_what_is_asked_for_otherwise_is_left_to_trl(options, taken_over):
    ids, labels = batch()
    found, expected = (each(input_ids=ids, labels=labels, fused_lm_head=True) for each in pair(**options))
    assert not taken_over
    torch.testing.assert_close(found.log_probs, expected.log_probs)


def test_a_head_that_is_trained_is_left_to_trl(taken_over):
    ids, labels = batch()
    model, _ = pair()
    model.lm_head.weight.requires_grad_(True)
    model(input_ids=ids, labels=labels, fused_lm_head=True).loss.backward()
    assert not taken_over
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_other_calls_of_a_model_with_a_fused_head_are_as_before(taken_over):
    ids, labels = batch()
    found, expected = (each(input_ids=ids, labels=labels) for each in pair())
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits.clone(), expected.logits)
    assert torch.equal(*(each.generate(ids, max_new_tokens=3, do_sample=False) for each in pair()))
    assert not taken_over


def test_under_sft_trainer_a_prepared_model_takes_our_way(tmp_path, taken_over):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    import nf4lora

    from support.models import tiny_tokenizer

    model = nf4lora.prepare(tiny_llama(num_hidden_layers=1), r=2)
    rows = Dataset.from_dict({"input_ids": [list(range(1, 30))] * 4, "labels": [list(range(1, 30))] * 4})
    options = SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = SFTTrainer(model, options, train_dataset=rows, processing_class=tiny_tokenizer())
    result = trainer.train()
    assert len(taken_over) == 2
    assert 0 < result.training_loss < 10
    entropies = [entry["entropy"] for entry in trainer.state.log_history if "entropy" in entry]
    assert not entropies or all(0 < entropy < 6 for entropy in entropies)
