"""Whole passes of models whose siblings are computed together: checkpointing, accumulation, generation, trainers.

A part that activation checkpointing computes again must be computed as before, or torch raises a CheckpointError; so
groups change only where no graph waits for its backward pass. Every number is that of a twin which never groups.
"""

import copy
import gc
import itertools
import warnings
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nf4lora import prepare
from nf4lora.adapters import siblings

from support.families import inputs, tiny
from support.models import tiny_llama, tiny_tokenizer
from support.siblings import (
    GROUP,
    REORDERED,
    SINGLE,
    K,
    Twins,
    alone,
    assert_same,
    calls_of,
    drawn,
    gradients,
    grouped,
    layer,
    learned,
    loss_of,
    row,
    step,
)

IDS = [torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(siblings, "DEVICES", {"cpu"})


def llama(blocks=2, **options):
    model = tiny_llama(hidden_size=64, intermediate_size=128, num_hidden_layers=blocks)
    torch.manual_seed(0)
    return prepare(model, **{"r": 4, "init_lora_weights": False, **options}).train()


def checkpointed(reentrant, **options):
    model = llama(**options)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def loss(model, ids=IDS[0]):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def train_step(model, ids=IDS[0]):
    model.zero_grad(set_to_none=True)
    value = loss(model, ids)
    value.backward()
    return value.detach(), list(gradients(model).items())


# --- checkpointing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_computes_the_same(reentrant):
    twins = Twins(checkpointed(reentrant))
    for ids in IDS[:4]:
        calls = twins.compare(lambda model, ids=ids: train_step(model, ids))
    assert calls[f"{GROUP}_backward"] == 4
    assert calls[GROUP] == (4 if reentrant else 8)  # computed again; a reentrant first pass has no gradients


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_two_graphs_wait_while_siblings_are_found(reentrant, order):
    """Forward, forward, backward, backward, from the first pass on: what was alone is computed again alone."""
    twins = Twins(checkpointed(reentrant))

    def run(model):
        model.zero_grad(set_to_none=True)
        losses = [loss(model, IDS[number]) for number in range(2)]
        for number in order:
            losses[number].backward()
        return [value.detach() for value in losses], list(gradients(model).items())

    for _ in range(3):
        calls = twins.compare(run)
    assert calls[f"{GROUP}_backward"] == 8


def test_a_graph_that_waits_keeps_its_successors_alone():
    twins = Twins(llama(1))
    kept = []

    def forward(model):
        kept.append(loss(model))
        return kept[-1].detach()

    for _ in range(3):
        assert GROUP not in twins.compare(forward)
    for value in kept:
        value.backward()
    assert twins.compare(forward)[GROUP] == 2


def test_a_graph_that_was_thrown_away_waits_no_longer():
    twins = Twins(llama(1))
    twins.compare(lambda model: loss(model).detach())
    gc.collect()
    assert twins.compare(lambda model: loss(model).detach())[GROUP] == 2


def test_losses_that_are_kept_after_their_backward_pass_hinder_nothing():
    """As in `total += loss`."""
    twins, kept = Twins(llama(1)), []

    def run(model):
        model.zero_grad()
        kept.append(loss(model))
        kept[-1].backward()
        return list(gradients(model).items())

    twins.compare(run)
    assert twins.compare(run)[GROUP] == 2


def in_the_meantime_learned(model):
    siblings.learn(model, lambda: model(IDS[3]))


def in_the_meantime_forgotten(model):
    siblings.forget(model)


def in_the_meantime_wrong(model):
    """The first layers alone are called, again and again, until the group ends."""
    attention = model.get_base_model().model.layers[0].self_attn
    with torch.no_grad():
        for _ in range(20):
            attention.q_proj(drawn(3, 64))


def in_the_meantime_evaluated(model):
    model.eval()
    with torch.no_grad():
        model(IDS[3])
    model.train()


def in_the_meantime_generated(model):
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.generate(input_ids=IDS[3], attention_mask=torch.ones_like(IDS[3]), max_new_tokens=2, do_sample=False)
    model.train()


def in_the_meantime_hooked(model):
    model.get_base_model().model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, x, y: None)


def in_the_meantime_trained(model):
    """Of another batch, with a backward pass that ends before the first batch's."""
    loss(model, IDS[4]).backward()


MEANTIME = {
    function.__name__.removeprefix("in_the_meantime_"): function
    for function in (
        in_the_meantime_learned,
        in_the_meantime_forgotten,
        in_the_meantime_wrong,
        in_the_meantime_evaluated,
        in_the_meantime_generated,
        in_the_meantime_hooked,
        in_the_meantime_trained,
    )
}


# A group that is forgotten or hooked before it is computed again saves other tensors then, and torch says so.
SAVES_OTHERS = [("forgotten", True, False), ("hooked", True, False)]


@pytest.mark.parametrize(
    ("what", "known", "reentrant"),
    [case for case in itertools.product(MEANTIME, [False, True], [False, True]) if case not in SAVES_OTHERS],
)
def test_what_happens_between_a_pass_and_its_backward_pass(what, known, reentrant):
    twins = Twins(checkpointed(reentrant))
    if known:
        twins.learn(IDS[2])

    def run(model):
        model.zero_grad(set_to_none=True)
        first = loss(model)
        MEANTIME[what](model)
        first.backward()
        return first.detach(), list(gradients(model).items())

    for _ in range(3):
        twins.compare(run)


def test_a_graph_that_is_kept_is_computed_again_as_it_was():
    """The first backward pass of a graph is over when siblings are found; the second must not notice."""
    twins = Twins(checkpointed(False))  # a reentrant checkpoint has one backward pass

    def run(model):
        model.zero_grad(set_to_none=True)
        first = loss(model)
        first.backward(retain_graph=True)
        second = loss(model, IDS[1])
        second.backward()
        first.backward()
        return first.detach(), second.detach(), list(gradients(model).items())

    for _ in range(3):
        twins.compare(run)


def test_a_part_of_a_graph_is_differentiated_before_the_rest():
    twins = Twins(checkpointed(False))

    def run(model):
        model.zero_grad(set_to_none=True)
        blocks = model.get_base_model().model.layers
        last = [p for p in blocks[1].parameters() if p.requires_grad]
        first = loss(model)
        some = torch.autograd.grad(first, last, retain_graph=True)
        second = loss(model, IDS[1])
        second.backward()
        first.backward()
        return some, list(gradients(model).items())

    for _ in range(3):
        twins.compare(run)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("letters", ["abc", "abcda", "ab"])
def test_a_checkpoint_that_ends_with_siblings(reentrant, letters):
    """Computing again stops early, at the last tensor that the backward pass needs: siblings are left uncalled."""
    twins = learned("abcd")

    def run(model):
        model.zero_grad()
        leaf = drawn().requires_grad_()
        results = checkpoint(lambda x: tuple(model(x, letters=letters)), leaf, use_reentrant=reentrant)
        loss_of(results).backward()
        return [y.detach() for y in results], leaf.grad, gradients(model)

    for _ in range(12):
        twins.compare(run, REORDERED)


def test_checkpointing_in_the_middle_of_siblings():
    twins = learned()

    def run(model):
        model.zero_grad()
        leaf = drawn().requires_grad_()
        a = layer(model, "a")(leaf)
        b, c = checkpoint(lambda x: (layer(model, "b")(x), layer(model, "c")(x)), leaf, use_reentrant=False)
        loss_of([a, b, c]).backward()
        return [y.detach() for y in (a, b, c)], leaf.grad, gradients(model)

    for _ in range(12):
        twins.compare(run, REORDERED)


def test_dropout_of_a_checkpointed_model_is_drawn_again():
    twins = Twins(checkpointed(False, lora_dropout=0.3))

    def run(model):
        torch.manual_seed(4)
        return train_step(model)

    for _ in range(3):
        assert GROUP not in twins.compare(run)


def test_checkpointing_is_turned_on_and_off():
    twins = Twins(llama())
    for number, change in enumerate(["gradient_checkpointing_enable", "gradient_checkpointing_disable"] * 2):
        twins.change(lambda model, change=change: getattr(model, change)())
        for _ in range(2):
            calls = twins.compare(train_step)
        assert calls[f"{GROUP}_backward"] == 4, number


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_accumulated_and_parameters_stepped(autocast):
    """The same parameters after steps of several batches; passes without gradients in between."""
    twins = Twins(llama())
    optimizers = {
        id(model): torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for model in (twins.ours, twins.twin)
    }

    def run(model):
        losses = []
        for ids in IDS[:3]:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                value = loss(model, ids)
            value.backward()
            losses.append(value.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizers[id(model)].step()
        model.zero_grad()
        with torch.no_grad():
            losses.append(loss(model.eval(), IDS[3]))
        model.train()
        return losses, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    if autocast:  # gradients differ by a rounding (see test_siblings.py), which AdamW's first steps make large
        twins.compare(lambda model: run(model)[0][:3], 2e-2)
        return
    for _ in range(3):
        calls = twins.compare(run)
    assert calls[GROUP] == 12


def test_batches_of_every_length():
    twins = Twins(llama())
    for length in (8, 1, 3, 8, 2, 40):
        ids = torch.randint(3, 90, (1 + length % 3, length), generator=torch.Generator().manual_seed(length))
        twins.compare(lambda model, ids=ids: model(input_ids=ids, use_cache=False).logits.detach())
        if length > 1:
            twins.compare(lambda model, ids=ids: train_step(model, ids))


def test_nothing_is_held_after_a_step_of_a_model():
    model = llama()
    for _ in range(3):
        kept = []
        handles = [
            module.register_forward_hook(lambda m, x, y, kept=kept: kept.extend(weakref.ref(t) for t in (*x, y)))
            for name, module in model.named_modules()
            if name.endswith(("o_proj", "down_proj", "act_fn"))
        ]
        train_step(model)
        for handle in handles:
            handle.remove()
        model.zero_grad()
        assert kept
        assert [ref() for ref in kept if ref() is not None] == []


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM", "T5ForConditionalGeneration"])
def test_generation_with_a_cache(name):
    torch.manual_seed(0)
    twins = Twins(prepare(tiny(name), r=4, init_lora_weights=False).eval())
    batch = inputs(twins.ours.get_base_model())
    twins.learn(**batch)

    def run(model):
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=torch.ones_like(batch["input_ids"]),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            use_cache=True,
            output_scores=True,
            return_dict_in_generate=True,
        )
        return output.sequences, list(output.scores)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            calls = twins.compare(run)
    assert GROUP not in calls  # there are no gradients


def test_generation_between_steps():
    twins = Twins(llama(1))

    def run(model):
        first = train_step(model)
        in_the_meantime_generated(model)
        return first, train_step(model, IDS[1])

    for _ in range(2):
        calls = twins.compare(run)
    assert calls[f"{GROUP}_backward"] == 4


# --- graphs of the program -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("learn", [False, True])
def test_a_compiled_model_has_one_graph_and_the_same_numbers(backend, learn):
    twins = learned() if learn else Twins(row())
    torch._dynamo.reset()
    compiled = {id(m): torch.compile(m, backend=backend, fullgraph=True) for m in (twins.ours, twins.twin)}

    def run(model):
        model.zero_grad()
        leaf = drawn().requires_grad_()
        results = compiled[id(model)](leaf)
        loss_of(results).backward()
        return [y.detach() for y in results], leaf.grad, gradients(model)

    def both(tolerance):
        got = run(twins.ours)
        with alone():
            assert_same(got, run(twins.twin), tolerance)

    for _ in range(3):
        both(REORDERED)
    twins.compare(step(), REORDERED)  # not compiled
    twins.compare(step(), REORDERED)
    both(REORDERED)
    torch._dynamo.reset()


def test_a_compiled_block_in_a_model_that_is_not():
    twins = Twins(llama())
    twins.learn(IDS[2])
    torch._dynamo.reset()
    for model in (twins.ours, twins.twin):
        model.get_base_model().model.layers[0].mlp.compile(backend="eager")
    for _ in range(3):
        got = train_step(twins.ours)
        with alone():
            assert_same(got, train_step(twins.twin))
    torch._dynamo.reset()


def test_an_exported_model_has_the_single_ops():
    twins = learned()
    program = torch.export.export(twins.ours.get_base_model().eval(), (drawn(),))
    ops = [str(node.target) for node in program.graph.nodes if "nf4lora" in str(node.target)]
    assert len(ops) == 3
    assert not any("group" in op for op in ops)
    with torch.no_grad():
        assert_same(program.module()(drawn(seed=1)), twins.twin(drawn(seed=1)))
    assert twins.compare(step())[GROUP] == 1


def test_fake_tensors_have_the_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    twins = learned()

    def run(model):
        with FakeTensorMode(allow_non_fake_inputs=True):
            return [(tuple(y.shape), y.dtype) for y in model(torch.empty(2, 3, K))]

    got = run(twins.ours)
    with alone():
        assert got == run(twins.twin)
    assert twins.compare(step())[GROUP] == 1


def test_a_traced_model_computes_the_same():
    from torch.fx.experimental.proxy_tensor import make_fx

    twins = learned()

    def traced(model):
        with torch.no_grad():
            graph = make_fx(lambda x: tuple(model(x)))(drawn())
            return list(graph(drawn(seed=1)))

    got = traced(twins.ours)
    with alone():
        assert_same(got, traced(twins.twin))
    assert twins.compare(step())[GROUP] == 1


# --- trainers --------------------------------------------------------------------------------------------------------


def trained(model, folder, kind, **options):
    """The parameters and the losses after steps of a trainer."""
    from datasets import Dataset

    options = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,  # which TRL turns on
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 1,
        **options,
    }
    texts = [f"row {number} of these " + "ab" * number for number in range(12)]
    if kind == "trl":
        trl = pytest.importorskip("trl")
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**options, max_length=32, dataset_num_proc=None),
            train_dataset=Dataset.from_dict({"text": texts}),
            processing_class=tiny_tokenizer(),
        )
    else:
        from transformers import Trainer, TrainingArguments

        tokens = [[*text.encode()[:16].ljust(16)] for text in texts]
        rows = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
        trainer = Trainer(model=model, args=TrainingArguments(**options), train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    return losses, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["transformers", "trl"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_a_trainer_trains_the_same(kind, options, tmp_path):
    pytest.importorskip("datasets")
    ours = llama()
    twin = copy.deepcopy(ours)
    made = {}
    made["calls"] = calls_of(lambda: made.update(got=trained(ours, tmp_path / "ours", kind, **options)))
    with alone():
        expected = trained(twin, tmp_path / "twin", kind, **options)
    if "bf16" in options:
        torch.testing.assert_close(made["got"][0], expected[0], rtol=2e-2, atol=0)
    else:
        assert_same(made["got"], expected)
    assert grouped(ours) == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 2
    if "bf16" in options:
        assert GROUP not in made["calls"]  # float32 tensors are cast for each layer
    else:  # 3 steps of 2 batches, of which the first finds the siblings
        assert made["calls"][f"{GROUP}_backward"] >= 5 * 4
        assert made["calls"][SINGLE] < made["calls"][GROUP] * 2
