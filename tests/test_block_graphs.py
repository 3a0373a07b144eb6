"""Blocks that are replayed compute the same bits; on a CPU, where a replay is the work again."""

import copy
import gc
import weakref

import pytest
import torch

pytest.importorskip("trl")
from nf4lora.train.errors import RunError
from nf4lora.train.speed import graphs
from nf4lora.train.speed.blocks import decoder_blocks
from nf4lora.train.speed.calls import put_together, replaced, take_apart
from nf4lora.train.speed.graphs import BlockGraphs

from support.adapted import adapted, packed_llama, trainable
from support.bits import assert_same_bits
from support.models import tiny_llama
from support.recorder import CpuRecorder


def models(**options):
    """Two of the same kind, and the graphs of the first."""
    model = adapted(packed_llama(num_hidden_layers=3), **options).train()
    other = copy.deepcopy(model)
    return model, other, BlockGraphs(decoder_blocks(model, "cuda_graphs"), CpuRecorder)


def batch(number, length=24):
    """Two samples in a row; where the second one begins depends on the number."""
    ids = torch.randint(0, 259, (1, length), generator=torch.Generator().manual_seed(number))
    first = 5 + number % 7
    positions = torch.cat([torch.arange(first), torch.arange(length - first)])[None]
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def loss_of(model, inputs, seed=0):
    torch.manual_seed(seed)
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_steps_of_several_batches_are_the_same_to_the_bit(dropout):
    model, other, block_graphs = models(lora_dropout=dropout)
    for step in range(3):
        for number in range(3 * step, 3 * step + 3):
            with block_graphs.batch():
                loss = loss_of(model, batch(number), seed=number)
            assert_same_bits(loss, loss_of(other, batch(number), seed=number))
        for (name, p), q in zip(trainable(model).items(), trainable(other).values(), strict=True):
            assert torch.equal(p.grad, q.grad), name
        with torch.no_grad():
            for p in (*trainable(model).values(), *trainable(other).values()):
                p -= 0.1 * p.grad
        model.zero_grad()
        other.zero_grad()
    assert (block_graphs.captured, block_graphs.others) == (3, 0)


def test_from_the_second_batch_on_each_block_is_replayed_once_forward_and_once_backward():
    model, _, block_graphs = models()
    calls = []
    for block in model.get_base_model().model.layers:
        block.self_attn.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for number in range(4):
        calls.clear()
        before = CpuRecorder.replays
        with block_graphs.batch():
            loss_of(model, batch(number))
        counts.append((CpuRecorder.replays - before, len(calls)))
    # The recorder of a CPU calls a block to replay it: 3 warm-ups and captures, then once.
    assert counts == [(0, 3), (6, 3 * (graphs.WARM_UPS + 1) + 3), (6, 3), (6, 3)]


def test_capture_leaves_the_random_state_alone():
    model, _, block_graphs = models(lora_dropout=0.5)
    for number in (0, 1):
        with block_graphs.batch():
            torch.manual_seed(3)
            loss = model(**batch(number), use_cache=False).loss
        state = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), state)
    assert block_graphs.captured == 3


def test_gradients_that_are_there_already_are_added_to():
    model, other, block_graphs = models()
    for number in (0, 1):
        with block_graphs.batch():
            loss_of(model, batch(number))
    model.zero_grad()
    for each in (model, other):
        for i, p in enumerate(trainable(each).values()):
            p.grad = torch.full_like(p, 0.5) if i % 2 else None
    with block_graphs.batch():
        loss_of(model, batch(2))
    loss_of(other, batch(2))
    for p, q in zip(trainable(model).values(), trainable(other).values(), strict=True):
        assert_same_bits(p.grad, q.grad)


def test_gradients_of_a_step_are_not_overwritten_by_the_next_one():
    model, _, block_graphs = models()
    kept = []
    for number in range(3):
        with block_graphs.batch():
            loss_of(model, batch(number))
        kept.append(next(iter(trainable(model).values())).grad.clone())
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[1], kept[2])


def test_other_calls_run_as_they_are():
    model, other, block_graphs = models()
    for number in (0, 1):
        with block_graphs.batch():
            loss_of(model, batch(number))
    before = CpuRecorder.replays
    with block_graphs.batch(), torch.no_grad():  # without gradients
        assert_same_bits(model(**batch(2), use_cache=False).logits, other(**batch(2), use_cache=False).logits)
    assert_same_bits(loss_of(model, batch(3)), loss_of(other, batch(3)))  # outside of a training batch
    assert (CpuRecorder.replays, block_graphs.others) == (before, 0)
    with block_graphs.batch():  # of another length
        assert_same_bits(loss_of(model, batch(4, 20)), loss_of(other, batch(4, 20)))
    with block_graphs.batch():  # without samples: no mask
        inputs = {name: tensor for name, tensor in batch(5).items() if name != "position_ids"}
        assert_same_bits(loss_of(model, inputs), loss_of(other, inputs))
    with block_graphs.batch(), torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(model, batch(6))
    assert (CpuRecorder.replays, block_graphs.others) == (before, 9)


def test_autocast_of_the_batch_is_that_of_the_graph():
    model, other, block_graphs = models()
    for number in range(3):
        with block_graphs.batch(), torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch(number))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same_bits(loss, loss_of(other, batch(number)))
    assert (block_graphs.captured, block_graphs.others) == (3, 0)
    for p, q in zip(trainable(model).values(), trainable(other).values(), strict=True):
        assert_same_bits(p.grad, q.grad)


def test_removed_graphs_leave_the_model_as_it_was():
    model, other, block_graphs = models()
    for number in (0, 1):
        with block_graphs.batch():
            loss_of(model, batch(number))
    gone = weakref.ref(block_graphs)
    block_graphs.remove()
    del block_graphs
    model.zero_grad()
    assert not any("forward" in vars(block) for block in model.get_base_model().model.layers)
    assert_same_bits(loss_of(model, batch(2)), loss_of(other, batch(2)))
    gc.collect()
    assert gone() is None


def test_a_second_forward_pass_before_the_backward_pass_is_an_error():
    model, _, block_graphs = models()
    for number in (0, 1):
        with block_graphs.batch():
            loss_of(model, batch(number))
    with block_graphs.batch():
        first = model(**batch(2), use_cache=False).loss
    with block_graphs.batch():
        model(**batch(3), use_cache=False)
    with pytest.raises(RuntimeError, match=r"layers\.2 was called again before the backward pass"):
        first.backward()


def test_what_cannot_be_captured_is_an_error_with_a_cure():
    model, _, block_graphs = models()

    class Refusing(CpuRecorder):
        def record(self, work):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    block_graphs.recorder = Refusing
    with block_graphs.batch():
        loss_of(model, batch(0))
    with (
        pytest.raises(
            RunError,
            match=r"LlamaDecoderLayer model.layers.0 cannot be captured \(operation not permitted when stream is "
            r"capturing\); use cuda_graphs false",
        ),
        block_graphs.batch(),
    ):
        pass


def test_memory_that_is_out_stays_what_it_is():
    model, _, block_graphs = models()

    class Full(CpuRecorder):
        def record(self, work):
            raise torch.OutOfMemoryError("out of memory")

    block_graphs.recorder = Full
    with block_graphs.batch():
        loss_of(model, batch(0))
    with pytest.raises(torch.OutOfMemoryError), block_graphs.batch():
        pass


def test_arguments_that_no_graph_can_hold_are_refused():
    model, _, block_graphs = models()
    model.get_base_model().set_attn_implementation("flex_attention")
    for block in block_graphs.blocks:  # flex_attention has no backward pass on a CPU: its mask is what counts
        block.original = lambda hidden, *args, **kwargs: hidden
    with block_graphs.batch():
        model(**batch(0), use_cache=False)
    words = r"layers.0 is called with a BlockMask, which a graph cannot hold"
    with pytest.raises(RunError, match=words), block_graphs.batch():
        pass


def test_a_model_without_blocks_is_refused():
    with pytest.raises(RunError, match="cuda_graphs: Linear names no blocks that repeat; use cuda_graphs false"):
        decoder_blocks(torch.nn.Linear(2, 2), "cuda_graphs")


def test_blocks_are_found_under_adapters_and_in_order():
    names = [f"model.layers.{i}" for i in range(12)]
    assert list(decoder_blocks(adapted(packed_llama(num_hidden_layers=12)), "x")) == names
    assert list(decoder_blocks(tiny_llama(), "x")) == ["model.layers.0", "model.layers.1"]


def test_values_come_apart_and_together():
    x, y = torch.ones(2), torch.zeros(3)
    value = ((x, [y, None]), {"a": x, "b": {"c": 1}, "d": "text"})
    form, tensors = [], []
    take_apart(value, form, tensors)
    assert [id(tensor) for tensor in tensors] == [id(x), id(y), id(x)]
    again = put_together(form, iter(tensors))
    assert again[0][0] is x
    assert again[0][1][0] is y
    assert again[1] == value[1]
    assert replaced(value, iter([y, x, y]))[1]["a"] is y
    other = []
    take_apart(((x, (y, None)), {"a": x, "b": {"c": 1}, "d": "text"}), other, [])
    assert form != other  # a tuple in place of a list
