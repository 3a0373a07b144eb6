"""What our ops, a layer and a step of a model do to a card, counted on one that computes nothing (bench/harness/card).

Each function that stands above a test is a question: it runs in a process that sees the card.
"""

import contextlib
import functools
import gc

import pytest
import torch

from bench.cases import host
from bench.harness import card as the_card
from bench.harness.card import counting
from bench.harness.case import Settings

from support.capture import capture

pytestmark = pytest.mark.slow  # a process of its own, which loads torch for CUDA

SQUARE = (4096, 4096)
LAYERS = [SQUARE, (1024, 4096), (14336, 4096), (4096, 14336)]  # N and K of Llama-3.1-8B
RANK = 16


@functools.cache
def packed(double_quantised, shape=SQUARE):
    from nf4lora import ops

    # On the CPU: it waits for a verdict that no kernel gives here.
    qweight, absmax = ops.nf4_quantize(torch.randn(1, shape[1]).expand(shape).contiguous())
    if not double_quantised:
        return qweight.cuda(), absmax.cuda(), None
    return tuple(tensor.cuda() for tensor in (qweight, *ops.absmax_quantize(absmax)))


def taking(kernel):
    from nf4lora.ops.kernels import dispatch

    return contextlib.nullcontext() if kernel is None else dispatch.forcing(kernel)


def tensors_of_lora(tokens, shape=SQUARE):
    N, K = shape
    x = torch.empty(tokens, K, device="cuda", dtype=torch.bfloat16).requires_grad_()
    return x, *(torch.empty(size, device="cuda").requires_grad_() for size in ((RANK, K), (N, RANK)))


def lora_forward(tokens, kernel=None, double_quantised=True, dropout=0.0, scaling=2.0, shape=SQUARE):
    from nf4lora import ops

    (x, A, B), weight = tensors_of_lora(tokens, shape), packed(double_quantised, tuple(shape))
    seed = torch.zeros(1, dtype=torch.int64, device="cuda") if dropout else None

    def call():
        with taking(kernel):
            return ops.lora_linear(x, *weight, None, A, B, scaling, dropout, seed)

    return call


def lora_backward(tokens, kernel=None, double_quantised=True, dropout=0.0, scaling=2.0, shape=SQUARE):
    (x, A, B), weight = tensors_of_lora(tokens, shape), packed(double_quantised, tuple(shape))
    S, dy = (torch.empty(tokens, size, device="cuda", dtype=torch.bfloat16) for size in (RANK, shape[0]))
    seed = torch.zeros(1, dtype=torch.int64, device="cuda") if dropout else None
    backward = torch.ops.nf4lora.lora_linear_backward

    def call():
        with taking(kernel):
            return backward(dy, x.detach(), S, *weight, A.detach(), B.detach(), scaling, dropout, seed, 64, True)

    return call


def lora_both(tokens, kernel=None):
    from nf4lora import ops

    tensors, weight = tensors_of_lora(tokens), packed(True)
    dy = torch.ones(tokens, SQUARE[0], device="cuda", dtype=torch.bfloat16)

    def call():
        with taking(kernel):
            return torch.autograd.grad(ops.lora_linear(tensors[0], *weight, None, *tensors[1:], 2.0), tensors, dy)

    return call


# What a call of each path launches and allocates. A path that changes changes these lines.
LOW_RANK = {"tall_skinny_kernel": 1, "sum_parts_kernel": 1}
BEFORE = {"tall_skinny_kernel": 1, "expand_parts_kernel": 1}  # the sums become the low-rank term at once
PRODUCT = {"lora_slice_kernel": 1, "cublasGemmEx": 1}
FUSED = {"lora_gemm_kernel": 1, "lora_gemm_sum_kernel": 1}
FORWARD = {
    ("few", 1, 2.0): ({"low_rank_kernel": 1, "lora_few_kernel": 1}, 2),
    ("few", 16, 2.0): ({"low_rank_kernel": 1, "lora_few_kernel": 1}, 2),
    ("fused", 512, 2.0): ({**LOW_RANK, **FUSED}, 3),
    ("dense", 2048, 2.0): ({**LOW_RANK, **PRODUCT}, 3),
    ("dense", 2048, 1.75): ({**BEFORE, **PRODUCT}, 3),
}
BACKWARD = {
    ("fused", 512, 2.0): ({"tall_skinny_kernel": 2, "sum_parts_kernel": 2, **FUSED}, 5),
    ("dense", 2048, 2.0): ({"tall_skinny_kernel": 2, "sum_parts_kernel": 2, **PRODUCT}, 5),
    ("dense", 2048, 1.75): ({"tall_skinny_kernel": 2, "expand_parts_kernel": 1, "sum_parts_kernel": 1, **PRODUCT}, 5),
}


def check_asynchronous(done):
    assert (done.synchronisations, done.queries, done.events, done.waits) == (0, 0, 0, 0)
    assert (done.copies, done.fills, done.mallocs) == (0, 0, 0)


@pytest.mark.parametrize(("kernel", "tokens", "scaling"), FORWARD)
def test_forward_launches(card, kernel, tokens, scaling):
    done = card.counted(lora_forward, tokens=tokens, kernel=kernel, scaling=scaling)
    assert (done.kernels, done.allocations) == FORWARD[kernel, tokens, scaling]
    check_asynchronous(done)


@pytest.mark.parametrize(("kernel", "tokens", "scaling"), BACKWARD)
def test_backward_launches(card, kernel, tokens, scaling):
    done = card.counted(lora_backward, tokens=tokens, kernel=kernel, scaling=scaling)
    assert (done.kernels, done.allocations) == BACKWARD[kernel, tokens, scaling]
    check_asynchronous(done)


@pytest.mark.parametrize("scaling", [2.0, 1.75])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_no_layer_of_a_model_takes_more_launches(card, shape, dropout, scaling):
    for tokens in (512, 2048, 16384):
        forward, backward = (
            card.counted(question, tokens=tokens, dropout=dropout, scaling=scaling, shape=shape)
            for question in (lora_forward, lora_backward)
        )
        assert forward.launches <= 4
        assert backward.launches <= 6
        check_asynchronous(forward)
        check_asynchronous(backward)


@pytest.mark.parametrize("double_quantised", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [1, 512, 4096])
@pytest.mark.parametrize("question", [lora_forward, lora_backward])
def test_a_call_waits_for_nothing(card, question, tokens, dropout, double_quantised):
    done = card.counted(question, tokens=tokens, dropout=dropout, double_quantised=double_quantised)
    assert done.launches > 0
    check_asynchronous(done)


# ---- layers of one x


QKV = (4096, 1024, 1024)  # out features, of Llama-3.1-8B


def tensors_of_group(tokens, scaling):
    from nf4lora.ops.lora_group import Layers

    weights = [packed(True, (N, SQUARE[1])) for N in QKV]
    A, B = ([torch.empty(size, device="cuda").requires_grad_() for size in sizes] for sizes in (
        [(RANK, SQUARE[1])] * 3, [(N, RANK) for N in QKV]
    ))  # fmt: skip
    lists = (list(values) for values in zip(*weights, strict=True))
    x = torch.empty(tokens, SQUARE[1], device="cuda", dtype=torch.bfloat16).requires_grad_()
    return x, Layers(*lists, [None] * 3, A, B, scaling)


def group_forward(tokens=2048, scaling=2.0):
    from nf4lora import ops

    x, layers = tensors_of_group(tokens, scaling)
    return lambda: ops.lora_linear_group(x, layers)


def group_backward(tokens=2048, scaling=2.0):
    x, layers = tensors_of_group(tokens, scaling)
    layers = layers._replace(lora_A=[A.detach() for A in layers.lora_A], lora_B=[B.detach() for B in layers.lora_B])
    S, dy = (
        [torch.empty(tokens, size, device="cuda", dtype=torch.bfloat16) for size in sizes]
        for sizes in ([RANK] * 3, QKV)
    )
    packed_ones = (layers.qweight, layers.absmax, layers.nested, layers.lora_A, layers.lora_B)
    backward = torch.ops.nf4lora.lora_linear_group_backward
    return lambda: backward(dy, x.detach(), S, *packed_ones, scaling, 64, True)


def group_both(tokens=2048):
    from nf4lora import ops

    x, layers = tensors_of_group(tokens, 2.0)
    inputs = [x, *layers.lora_A, *layers.lora_B]
    dys = [torch.ones(tokens, N, device="cuda", dtype=torch.bfloat16) for N in QKV]
    return lambda: torch.autograd.grad(ops.lora_linear_group(x, layers), inputs, dys)


IN_TURN = {"lora_slice_kernel": 3, "cublasGemmEx": 3}


def test_a_group_makes_once_what_its_layers_share(card):
    done = card.counted(group_forward)
    assert (done.kernels, done.allocations) == ({**LOW_RANK, **IN_TURN}, 7)
    check_asynchronous(done)
    done = card.counted(group_forward, scaling=1.75)
    assert (done.kernels, done.allocations) == ({**LOW_RANK, **IN_TURN, "expand_parts_kernel": 3}, 7)
    done = card.counted(group_backward)
    shared = {"tall_skinny_kernel": 4, "sum_parts_kernel": 4, "expand_parts_kernel": 1}
    assert (done.kernels, done.allocations) == ({**shared, **IN_TURN}, 9)
    check_asynchronous(done)


@pytest.mark.parametrize("tokens", [1, 64, 100, 512])
def test_a_group_of_few_tokens_is_its_layers_in_turn(card, tokens):
    for question in (group_forward, group_backward):
        check_asynchronous(card.counted(question, tokens=tokens))


def captured_group(tokens):
    call = group_both(tokens)
    graph, capturing = capture(call)
    graph.replay()
    with counting() as eager:
        call()
    return capturing.captured, capturing.launches, eager.launches


@pytest.mark.parametrize("tokens", [16, 2048])
def test_a_group_becomes_a_graph(card, tokens):
    captured, launches, eager = card.ask(captured_group, tokens=tokens)
    assert captured == launches == eager


def captured_lora(tokens, kernel):
    call = lora_both(tokens, kernel)
    graph, capturing = capture(call)
    graph.replay()
    with counting() as eager:
        call()
    return capturing.captured, capturing.launches, eager.launches


@pytest.mark.parametrize(("tokens", "kernel"), [(16, None), (512, "fused"), (2048, "dense")])
def test_forward_and_backward_of_the_op_become_a_graph(card, tokens, kernel):
    captured, launches, eager = card.ask(captured_lora, tokens=tokens, kernel=kernel)
    assert captured == launches == eager


def recomputed_lora(most=None):
    """A layer under activation checkpointing, whose W takes 32 MB."""
    from torch.utils.checkpoint import checkpoint

    from nf4lora import ops
    from nf4lora.ops.kernels.kept_weights import limit_kept_weights

    tensors, weight = tensors_of_lora(2048), packed(True)
    dy = torch.empty(2048, SQUARE[0], device="cuda", dtype=torch.bfloat16)

    def layer(x, A, B):
        return ops.lora_linear(x, *weight, None, A, B, 1.75)

    def call():
        limit_kept_weights(most)
        return torch.autograd.grad(checkpoint(layer, *tensors, use_reentrant=False), tensors, dy)

    return call


@pytest.mark.parametrize(("most", "unpacked"), [(None, 2), (32 << 20, 3), (40 << 20, 2), (0, 3)])
def test_a_weight_that_is_unpacked_again_for_a_backward_pass_is_kept_for_it(card, most, unpacked):
    done = card.counted(recomputed_lora, most=most)  # W and room for a factor beside it take more than 32 MB
    assert done.kernels["lora_slice_kernel"] == unpacked
    check_asynchronous(done)


class Fails(torch.autograd.Function):
    """Its backward pass fails, when what it saved has been computed again."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        raise RuntimeError(f"no gradient for {len(ctx.saved_tensors)} tensor")


def memory_after_a_backward_pass_that_fails():
    """Bytes that are in use after it, and after the next forward pass, beyond those before."""
    from torch.utils.checkpoint import checkpoint

    from nf4lora import ops
    from nf4lora.ops.kernels.kept_weights import limit_kept_weights

    limit_kept_weights(None)
    tensors, weight = tensors_of_lora(2048), packed(True)
    layer = lambda x, A, B: ops.lora_linear(x, *weight, None, A, B)  # noqa: E731
    torch.autograd.grad(layer(*tensors).sum(), tensors)  # cuBLAS takes its memory
    gc.collect()  # what earlier questions have left
    before = torch.cuda.memory_allocated()
    with pytest.raises(RuntimeError, match="no gradient for 1 tensor"):
        checkpoint(lambda *given: Fails.apply(layer(*given)), *tensors, use_reentrant=False).sum().backward()
    gc.collect()  # the error's frames, which hold what was computed again
    left = torch.cuda.memory_allocated() - before
    layer(*tensors)
    return left, torch.cuda.memory_allocated() - before


def test_a_weight_that_was_kept_for_a_backward_pass_which_failed_goes_with_the_next_forward_pass(card):
    left, after = card.ask(memory_after_a_backward_pass_that_fails)
    assert left > 32 << 20  # W
    assert after == 0


def out_of_memory(tokens):
    from nf4lora import ops

    weight, tensors = packed(True), tensors_of_lora(1)
    x = torch.empty(tokens, SQUARE[1], device="cuda", dtype=torch.bfloat16)
    try:
        ops.lora_linear(x, *weight, None, *tensors[1:])
    except torch.OutOfMemoryError as error:
        return str(error)
    return None


@pytest.mark.usefixtures("card")
def test_a_card_without_memory_says_so_as_torch_does():
    with the_card.Card(limit=256 << 20) as card:
        assert card.ask(out_of_memory, tokens=16) is None
        said = card.ask(out_of_memory, tokens=1 << 14)  # 128 MB of x, and as many of y
    assert said.startswith("CUDA out of memory. nf4lora asked for")


def quantisation():
    weight = torch.randn(256, 256, device="cuda")
    return lambda: torch.ops.nf4lora.nf4_quantize(weight, 64)


def test_quantising_waits_once_to_refuse_what_is_not_finite(card):
    done = card.counted(quantisation)
    assert done.kernels == {"nf4_quantize_kernel": 1}
    assert (done.fills, done.copies, done.synchronisations, done.allocations) == (1, 1, 1, 3)


# ---- a model


def training(layers):
    from peft import LoraConfig, get_peft_model

    from nf4lora.adapters import lora_layer

    from support.adapted import packed_llama

    lora_layer.install()
    model = packed_llama(num_hidden_layers=layers, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).cuda().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = torch.zeros(2, 32, dtype=torch.int64, device="cuda")

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def test_a_step_of_a_model_waits_for_nothing(card):
    one, two = (card.counted(training, layers=layers) for layers in (1, 2))
    for done in (one, two):
        assert (done.synchronisations, done.queries, done.mallocs, done.frees) == (0, 0, 0, 0)
        assert done.kernels["multi_tensor_apply_kernel"] == 2  # the optimizer's step count, and its step
    assert 100 < two.launches - one.launches < 150  # of a block, forward and backward
    assert two.kernels["flash_fwd_kernel"] == 2 * one.kernels["flash_fwd_kernel"] == 2


# ---- the benchmark


@pytest.mark.usefixtures("card")
def test_the_hosts_part_of_a_call_is_timed():
    table, of_group, of_blocks = host.tables(Settings(quick=True))
    assert [row["way"] for row in table.rows] == [host.OP, host.AUTOGRAD, host.LAYER, host.LINEAR]
    for row in (*table.rows, *of_group.rows):
        assert row[host.FORWARD]["median"] > 0
        assert row[host.BACKWARD]["median"] > 0
    op, *_, linear = table.rows
    assert linear["launches, forward"] == linear["launches, backward"] == 1
    assert op["launches, forward"] == 2  # for one token
    group, *_, linears = of_group.rows
    assert group["way"] == host.GROUP_OP
    assert group["launches, forward"] == 3 * op["launches, forward"]  # for one token each layer is computed alone
    assert linears["launches, forward"] == 3
    assert linears["launches, backward"] == 3 + 2  # and the sum of dx
    assert [row["way"] for row in of_blocks.rows] == ["together", "one by one"]
    for row in of_blocks.rows:
        assert row[host.BLOCK]["median"] > 0
        assert row["launches a block"] > 7 * (2 + 5)
    assert not table.targets  # quick sizes promise nothing


def test_where_it_cannot_be_timed_the_table_says_why(monkeypatch):
    monkeypatch.setattr(the_card, "reason", lambda: "no card today")
    for table in host.tables(Settings()):
        assert not table.rows
        assert table.notes == ["not measured: no card today"]


def test_what_the_op_is_held_to():
    row = {"way": host.OP, "tokens": 512, host.FORWARD: {"median": 30.0}, host.BACKWARD: {"median": 55.1}}
    assert host.targets([row, {**row, "way": host.AUTOGRAD}]) == [
        ("512 tokens, forward, no gradients: at most 30 us, got 30", True),
        ("512 tokens, backward: at most 55 us, got 55", False),
    ]
