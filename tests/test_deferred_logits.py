"""Logits that nobody has looked at: the loss without them, and that whoever looks sees the model's own."""

import copy
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils.operations import convert_to_fp32
from torch import nn
from torch.utils import _pytree as pytree

from nf4lora.loss import cross_entropy, deferred_logits
from nf4lora.loss.causal_lm import chunk_loss
from nf4lora.loss.deferred_logits import DeferredLogits

from support.bits import assert_same_bits
from support.models import tiny_llama

V = 259
TEXT = dict(
    vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
ENCODER_DECODER = dict(vocab_size=V, decoder_start_token_id=0, pad_token_id=0)


@pytest.fixture
def computed(monkeypatch):
    """One entry for each time that logits were computed."""
    calls, original = [], deferred_logits._logits
    monkeypatch.setattr(deferred_logits, "_logits", lambda *how: calls.append(1) or original(*how))
    return calls


def pair(model=None, **options):
    """A frozen model with its loss in chunks, and the same model as transformers made it."""
    model = model or tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1, **options)
    model.requires_grad_(False).eval()
    original = copy.deepcopy(model)
    assert chunk_loss(model)
    return model, original


def batch():
    ids = torch.randint(3, V - 3, (3, 20))
    return ids, ids.where(torch.rand(3, 20) < 0.4, torch.tensor(-100))


def both(models, **inputs):
    """The two outputs, and the gradients of their losses at the embeddings."""
    ids = inputs.pop("input_ids")
    outputs, grads = [], []
    for model in models:
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        outputs.append(model(inputs_embeds=embeds, **inputs))
        outputs[-1].loss.backward(retain_graph=True)
        grads.append(embeds)
    return outputs, grads


def small(name, config, **options):
    return getattr(transformers, name)(getattr(transformers, config)(**options))


ARCHITECTURES = {
    "Qwen3": lambda: small("Qwen3ForCausalLM", "Qwen3Config", **TEXT),
    "Gemma 2, whose logits are capped": lambda: small("Gemma2ForCausalLM", "Gemma2Config", **TEXT),
    "Cohere, whose logits are scaled": lambda: small("CohereForCausalLM", "CohereConfig", **TEXT),
    "Granite, whose logits are divided": lambda: small(
        "GraniteForCausalLM", "GraniteConfig", **TEXT, logits_scaling=8.0
    ),
    "Mixtral, with a loss of its routers": lambda: small(
        "MixtralForCausalLM", "MixtralConfig", **TEXT, num_local_experts=2, output_router_logits=True
    ),
    "Gemma 3 with its tower": lambda: small(
        "Gemma3ForConditionalGeneration", "Gemma3Config", text_config=dict(TEXT), vision_config=dict(VISION),
        image_token_index=V - 1, boi_token_index=V - 2, eoi_token_index=V - 3,
    ),
    "LLaVA": lambda: small(
        "LlavaForConditionalGeneration", "LlavaConfig", text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION), image_token_index=V - 1,
    ),
    "T5": lambda: small(
        "T5ForConditionalGeneration", "T5Config", **ENCODER_DECODER, d_model=64, d_kv=16, d_ff=64, num_layers=1,
        num_heads=4, dropout_rate=0.0,
    ),
    "BERT, whose head has a bias": lambda: small(
        "BertForMaskedLM", "BertConfig", vocab_size=V, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_gradient_and_output_are_those_of_the_model_and_no_logits_are_made(name, computed):
    ids, labels = batch()
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    models = pair(ARCHITECTURES[name]())
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    (found, expected), grads = both(models, **inputs)
    assert not computed
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(grads[0].grad, grads[1].grad)
    assert type(found) is type(expected)
    assert list(found) == list(expected)
    assert isinstance(found.logits, DeferredLogits)
    assert found.logits.shape == expected.logits.shape
    torch.testing.assert_close(found.logits.clone(), expected.logits)


def test_a_head_that_is_followed_by_anything_else_computes_its_logits():
    # BART adds a bias that is no part of its head.
    options = dict(d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64)
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4)
    bart = small("BartForConditionalGeneration", "BartConfig", **ENCODER_DECODER, **options, **heads)
    nn.init.normal_(bart.final_logits_bias)
    ids, labels = batch()
    found, expected = (each(input_ids=ids, labels=labels) for each in pair(bart))
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits)


@pytest.mark.parametrize("count", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("shifted", [False, True])
def test_arguments_of_the_loss_are_the_models_own(count, shifted, computed):
    ids, labels = batch()
    extra = {} if count is None else {"num_items_in_batch": count}
    if shifted:
        extra["shift_labels"] = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    found, expected = (each(input_ids=ids, labels=labels, **extra) for each in pair())
    torch.testing.assert_close(found.loss, expected.loss)
    assert not computed


@pytest.mark.parametrize(
    "wanted",
    [
        {"logits_to_keep": 20},
        {"logits_to_keep": torch.arange(20)},  # has no truth value
        {"return_dict": False},
        {"output_hidden_states": True},
        {"use_cache": True},
        {"label_smoothing": 0.1},
    ],
    ids=str,
)
def test_calls_that_ask_for_more_get_it(wanted):
    ids, labels = batch()
    found, expected = (each(input_ids=ids, labels=labels, **wanted) for each in pair())
    assert type(found) is type(expected)
    assert len(found) == len(expected)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1].clone(), expected[1])


def test_calls_without_labels_and_compiled_ones_are_left_alone():
    model, original = pair()
    ids, labels = batch()
    assert type(model(input_ids=ids).logits) is torch.Tensor
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = compiled(input_ids=ids, labels=labels, use_cache=False)
    assert type(found.logits) is torch.Tensor
    torch.testing.assert_close(found.loss, original(input_ids=ids, labels=labels).loss)


def test_a_loss_that_somebody_set_gets_the_logits():
    model, original = pair()
    ids, labels = batch()
    model.loss_function = lambda logits, labels, **_: logits.sum()
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, original(input_ids=ids).logits.sum())


# ---- who walks over outputs -----------------------------------------------------------------------------------------


def outputs(training=False, **options):
    models = pair(**options)
    ids, labels = batch()
    return [each.train(training)(input_ids=ids, labels=labels, use_cache=False) for each in models]


@pytest.mark.parametrize("training", [False, True])
def test_the_output_is_its_items(training, computed):
    found, expected = outputs(training)
    assert list(found) == list(found.keys()) == ["loss", "logits"]
    assert len(found.to_tuple()) == 2
    for logits in (found.logits, found["logits"], found[1], found[1:][0], found.to_tuple()[1], dict(found)["logits"]):
        assert isinstance(logits, torch.Tensor)
        assert logits.shape == (3, 20, V)
        assert logits.dtype == torch.float32
    assert not computed
    torch.testing.assert_close(found[1].clone(), expected[1])
    assert_same_bits(found.logits.argmax(-1), expected.logits.argmax(-1))
    assert len(computed) == 1, "they are computed once"


@pytest.mark.parametrize("training", [False, True])
def test_accelerates_conversion_and_pytrees_keep_the_logits_deferred(training, computed):
    found, expected = outputs(training, dtype=torch.bfloat16)
    converted = convert_to_fp32(found)
    flat, spec = pytree.tree_flatten(converted)
    again = pytree.tree_unflatten(flat, spec)
    detached = pytree.tree_map(lambda t: t.detach(), again)
    assert type(detached) is type(expected)
    assert detached.logits.dtype == torch.float32
    assert not computed
    torch.testing.assert_close(detached.logits.clone(), expected.logits.float())


def test_copies_pickles_and_numbers_are_those_of_the_logits():
    found, expected = outputs()
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert type(twin) is type(expected)
        torch.testing.assert_close(twin.logits.clone(), expected.logits)
    assert found.logits.numpy().shape == (3, 20, V)
    assert found.logits[0, 0, :2].tolist() == pytest.approx(expected.logits[0, 0, :2].tolist())
    assert "tensor" in repr(found.logits)
    assert torch.cat([found.logits, found.logits]).shape == (6, 20, V)


def test_a_loss_of_ones_own_from_the_logits_trains_the_model():
    models = pair()
    ids, labels = batch()
    (found, expected), embeds = both(models, input_ids=ids, labels=labels)
    for output, inputs in zip((found, expected), embeds, strict=True):
        inputs.grad = None
        with torch.no_grad():
            output.logits.argmax(-1)  # who looks first must not decide on the gradient
        (output.logits.softmax(-1)[..., 5] ** 2).sum().backward()
    assert embeds[1].grad.abs().sum() > 0
    torch.testing.assert_close(embeds[0].grad, embeds[1].grad)


class Clone(torch.autograd.Function):
    """As DDP's own function with static_graph: it gets tensors that Python has not seen."""

    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


ASKS = {
    "retain_grad": lambda loss, logits: logits.retain_grad(),
    "register_hook": lambda loss, logits: logits.register_hook(lambda grad: None),
    "grad": lambda loss, logits: torch.autograd.grad(loss, logits, allow_unused=True),
    "grad by keyword": lambda loss, logits: torch.autograd.grad(outputs=loss, inputs=[logits]),
}


@pytest.mark.parametrize("ask", ASKS)
def test_the_gradient_at_logits_of_a_loss_in_chunks_is_an_error_with_a_cure(ask):
    model, _ = pair()
    ids, labels = batch()
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    output = model(inputs_embeds=embeds, labels=labels)
    with pytest.raises(
        RuntimeError, match=rf"{ask.split()[0]} must .* a loss in chunks.*; call the model without labels"
    ):
        ASKS[ask](output.loss, output.logits)
    assert output.logits.sum().isfinite()  # whatever else is asked is answered


def test_a_hook_of_torchs_own_is_called_where_a_gradient_comes():
    """FSDP wants to know when the backward pass begins, from whichever output."""

    def hook(grad):
        seen.append(grad.shape)

    hook.__module__ = "torch.distributed.fsdp"
    model, _ = pair()
    ids, labels = batch()
    embeds, seen = model.get_input_embeddings()(ids).detach().requires_grad_(), []
    output = model(inputs_embeds=embeds, labels=labels)
    output.logits.register_hook(hook)
    output.logits.sum().backward()
    assert seen == [output.logits.shape]


@pytest.mark.parametrize("ask", ["retain_grad", "grad"])
def test_a_loss_of_ones_own_has_a_gradient_at_the_logits(ask):
    model, _ = pair()
    ids, labels = batch()
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds).logits
    if ask == "retain_grad":
        logits.retain_grad()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    if ask == "retain_grad":
        loss.backward()
    grad = logits.grad if ask == "retain_grad" else torch.autograd.grad(loss, logits)[0]
    assert grad.shape == logits.shape
    assert grad.norm() > 0


def test_a_gradient_passes_through_a_function_below_python():
    models = pair()
    ids, labels = batch()
    outputs, embeds = both(models, input_ids=ids, labels=labels)
    for output, inputs in zip(outputs, embeds, strict=True):
        inputs.grad = None
        (Clone.apply(output.logits)[..., 7] ** 2).sum().backward()
    assert embeds[1].grad.abs().sum() > 0
    torch.testing.assert_close(embeds[0].grad, embeds[1].grad)


def test_ddp_that_looks_for_unused_parameters_sees_the_gradient(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for options in ({"find_unused_parameters": True}, {"static_graph": True}):
            model, original = pair()
            ids, labels = batch()
            grads = []
            for each in (model, original):
                each.get_input_embeddings().weight.requires_grad_(True)
                parallel = nn.parallel.DistributedDataParallel(each, **options)
                output = parallel(input_ids=ids, labels=labels)
                (output.loss + output.logits.float().std()).backward()
                grads.append(each.get_input_embeddings().weight.grad)
            torch.testing.assert_close(*grads)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("base", [torch.float32, torch.float16])
def test_under_accelerates_mixed_precision_the_head_runs_as_where_it_was_called(base):
    # The logits are looked at outside of autocast, where a bfloat16 hidden state would meet a float16 head.
    model, original = pair(dtype=base)
    ids, labels = batch()
    found, expected = (
        Accelerator(cpu=True, mixed_precision="bf16").prepare_model(each, evaluation_mode=True)(
            input_ids=ids, labels=labels
        )
        for each in (model, original)
    )
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.logits.dtype == expected.logits.dtype == torch.float32
    torch.testing.assert_close(found.logits.clone(), expected.logits)


@pytest.mark.parametrize("only_loss", [True, False])
def test_trainer_evaluates_with_and_without_predictions(only_loss, tmp_path, computed):
    model, original = pair(dtype=torch.float16)
    ids, labels = batch()
    rows = [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]
    metrics = []
    for each in (model, original):
        trainer = transformers.Trainer(
            each,
            transformers.TrainingArguments(
                tmp_path, bf16=True, use_cpu=True, report_to=[], per_device_eval_batch_size=2, disable_tqdm=True,
                prediction_loss_only=only_loss,
            ),
            eval_dataset=rows,
            compute_metrics=None if only_loss else lambda p: {"mean": float(p.predictions.astype("float64").mean())},
        )  # fmt: skip
        metrics.append(trainer.evaluate())
    assert metrics[0]["eval_loss"] == pytest.approx(metrics[1]["eval_loss"], rel=1e-3)  # bfloat16 logits
    assert bool(computed) != only_loss
    if not only_loss:
        assert metrics[0]["eval_mean"] == pytest.approx(metrics[1]["eval_mean"], rel=1e-3)


# ---- functions of deferred logits -----------------------------------------------------------------------------------


def deferred(*lead, hidden=24, bias=True, dtype=torch.float32):
    head = nn.Linear(hidden, 40, bias=bias).to(dtype).requires_grad_(False)
    tokens = torch.randn(*lead, hidden).to(dtype).requires_grad_()
    with deferred_logits.deferred(head):
        logits = head(tokens)
    return logits, head(tokens), tokens


LAZY = {
    "float": lambda t: t.float(),
    "to": lambda t: t.to(torch.float32),
    "to a keyword": lambda t: t.to(dtype=torch.float64),
    "half": lambda t: t.half(),
    "scaled": lambda t: t * 0.5,
    "scaled from the left": lambda t: 2 * t,
    "capped": lambda t: 30.0 * torch.tanh(t / 30.0),
    "flattened": lambda t: t.view(-1, 40),
    "reshaped": lambda t: t.reshape(6, 2, 40),
    "contiguous": lambda t: t.contiguous(),
    "detached": lambda t: t.detach(),
    "all but the last token": lambda t: t[..., :-1, :],
    "the last token": lambda t: t[:, -1],
    "the last tokens": lambda t: t[:, -2:, :],
    "a row": lambda t: t[1],
    "a token": lambda t: t[1, 2],
    "chosen tokens": lambda t: t[torch.tensor([[True, False, True, True]] * 3)],
    "everything": lambda t: t[...],
}
EAGER = {
    "of some words": lambda t: t[..., 3:5],
    "of one word": lambda t: t[:, :, 7],
    "ellipsis that stands for nothing": lambda t: t[0, 1, 2, ...],
    "new axis": lambda t: t[None],
    "tensor index": lambda t: t[torch.tensor([0, 2])],
    "plus": lambda t: t + 1,
    "times a tensor": lambda t: t * torch.linspace(0, 1, 40),
    "transposed": lambda t: t.transpose(1, 2),
    "words first": lambda t: t.view(-1),
    "softmax": lambda t: t.softmax(-1),
    "another dtype's bits": lambda t: t.view(torch.int32),
    "max": lambda t: t.max(-1).values,
    "contiguous in a format": lambda t: t.contiguous(memory_format=torch.contiguous_format),
    "float in a format": lambda t: t.float(memory_format=torch.preserve_format),
    "half in a format": lambda t: t.half(memory_format=torch.preserve_format),
    "a shape by keyword": lambda t: torch.reshape(t, shape=(-1, 40)),
    "a size by keyword": lambda t: t.view(size=(12, 40)),
    "a factor by keyword": lambda t: torch.mul(t, other=2.0),
}


@pytest.mark.parametrize("name", [*LAZY, *EAGER])
def test_functions_give_what_they_give_of_the_logits(name):
    logits, expected, _ = deferred(3, 4)
    function = (LAZY | EAGER)[name]
    found = function(logits)
    assert isinstance(found, DeferredLogits) == (name in LAZY)
    assert found.shape == function(expected).shape
    assert found.dtype == function(expected).dtype
    assert found.requires_grad == function(expected).requires_grad
    torch.testing.assert_close(found.clone(), function(expected))


def test_shapes_that_do_not_fit_are_the_error_of_torch():
    logits, _, _ = deferred(3, 4)
    with pytest.raises(RuntimeError, match=r"shape '\[5, 40\]' is invalid for input of size 480"):
        logits.view(5, 40)
    with pytest.raises(IndexError, match="too many indices"):
        logits[0, 0, 0, 0]


def test_what_is_written_into_the_logits_is_in_the_loss():
    logits, expected, _ = deferred(8)
    targets = torch.arange(8)
    for each in (logits, expected):
        each[:, 20:] = -100.0
    torch.testing.assert_close(F.cross_entropy(logits, targets), F.cross_entropy(expected, targets))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", ["float", "capped"])
def test_cross_entropy_is_torchs(reduction, dtype, steps, monkeypatch, computed):
    monkeypatch.setattr(cross_entropy, "CHUNK", 1)  # chunks of 16 rows with a ragged last one
    logits, expected, tokens = deferred(50, dtype=dtype)
    targets = torch.randint(0, 40, (50,))
    targets[::3] = -100
    losses = F.cross_entropy(LAZY[steps](logits), targets, reduction=reduction)
    theirs = F.cross_entropy(LAZY[steps](expected).float(), targets, reduction=reduction)
    assert not computed
    assert losses.shape == theirs.shape
    # bfloat16: the loss of capped logits has their dtype, and gradients are rounded to it on the way back.
    tolerance = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.float(), theirs, **tolerance)
    grads = [torch.autograd.grad(loss.float().sum(), tokens)[0] for loss in (losses, theirs)]
    torch.testing.assert_close(*grads, **tolerance)


@pytest.mark.parametrize(
    "options",
    [{"weight": torch.linspace(0.5, 2, 40)}, {"label_smoothing": 0.1}, {"ignore_index": 3}, {"reduce": False}],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_options_of_cross_entropy_mean_what_they_mean(options):
    logits, expected, _ = deferred(10)
    targets = torch.arange(10)
    torch.testing.assert_close(
        F.cross_entropy(logits, targets, **options), F.cross_entropy(expected, targets, **options)
    )


def test_probabilities_as_targets_and_words_in_the_second_dimension_work():
    logits, expected, _ = deferred(10)
    chances = torch.rand(10, 40).softmax(-1)
    torch.testing.assert_close(F.cross_entropy(logits, chances), F.cross_entropy(expected, chances))
    logits, expected, _ = deferred(3, 4)
    targets = torch.randint(0, 40, (3, 4))
    found, wanted = (F.cross_entropy(each.transpose(1, 2), targets) for each in (logits, expected))
    torch.testing.assert_close(found, wanted)


def test_no_target_at_all_is_nan_as_for_torch_and_one_out_of_bounds_is_its_error():
    logits, _, _ = deferred(4)
    assert F.cross_entropy(logits, torch.full((4,), -100)).isnan()
    assert F.cross_entropy(logits, torch.full((4,), -100), reduction="sum") == 0
    with pytest.raises(IndexError, match="Target 40 is out of bounds"):
        F.cross_entropy(logits, torch.tensor([0, 1, 2, 40]))


def test_a_second_derivative_of_the_loss_is_refused():
    logits, _, tokens = deferred(4)
    (grad,) = torch.autograd.grad(F.cross_entropy(logits, torch.arange(4)), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        grad.sum().backward()


# ---- which heads ----------------------------------------------------------------------------------------------------


def with_forward(head):
    head.forward = types.MethodType(lambda self, x: 2 * F.linear(x, self.weight), head)


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.weight.requires_grad_(True),
        lambda head: head.register_forward_hook(lambda module, inputs, output: output * 2),
        lambda head: head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
        lambda head: head.register_full_backward_hook(lambda module, grads, outs: None),
        with_forward,
        lambda head: nn.utils.parametrizations.weight_norm(head).requires_grad_(False),
    ],
)
def test_a_head_that_does_more_than_multiply_computes_its_logits(change):
    model, original = pair()
    for each in (model, original):
        change(each.get_output_embeddings())
    ids, labels = batch()
    found, expected = (each(input_ids=ids, labels=labels) for each in (model, original))
    assert type(found.logits) is torch.Tensor
    torch.testing.assert_close(found.loss, expected.loss)


def test_a_head_of_another_dtype_is_the_error_of_the_model():
    model, _ = pair()
    model.get_output_embeddings().to(torch.bfloat16)
    ids, labels = batch()
    with pytest.raises(RuntimeError, match="dtype"):
        model(input_ids=ids, labels=labels)
    model.get_output_embeddings().to(torch.float32)
    assert model(input_ids=ids, labels=labels).loss.isfinite(), "an error must leave the head as it was"
