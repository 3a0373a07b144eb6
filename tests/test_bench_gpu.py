"""The bench's tables of a GPU, without one: contenders, sums, targets and budgets, on a card in simulated time."""

import contextlib
import gc
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from test_bench import InProcess, SlowHost
from torch.overrides import TorchFunctionMode

from bench import __main__
from bench.cases import lora, lora_block, lora_gpu, lora_groups, overhead, step, step_options, step_random, tune
from bench.harness import expected, groups, layers, random_model, steady, targets, timing
from bench.harness.case import Settings, WrongAnswer
from bench.harness.composition import Composition
from bench.harness.contenders import OURS, RIVAL
from bench.harness.layers import BITSANDBYTES, MAKERS, TORCH, TORCHAO
from bench.harness.process import Process
from bench.harness.shapes import ON_A_CARD, SHAPES, Shape, block_of, groups_of
from bench.harness.table import Table
from bench.harness.timing import ALONE, IN_A_ROW, NAMES, SATURATED, Timing
from nf4lora import NF4Linear
from nf4lora.adapters import siblings
from nf4lora.ops import reference
from nf4lora.train.speed import attention, graphs

from support.recorder import CpuRecorder

QUICK = Settings(quick=True)
TINY = Shape("tiny", "q, o", 64, 128)


@pytest.fixture
def card(monkeypatch):
    """card(name, capability): what torch says of the card."""

    def be(name="NVIDIA H200", capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return be


@pytest.fixture
def few_copies(monkeypatch):
    monkeypatch.setattr(timing, "last_cache", lambda device="cpu": 1 << 10)


# ---- contenders ----


def test_composition_and_its_gradients_are_those_of_autograd():
    weight = torch.randn(64, 128).mul_(0.02).bfloat16()
    A, B = layers.adapter(64, 128, "cpu")
    rival = Composition(weight, A.clone(), B.clone(), 2.0)
    x, dy = torch.randn(2, 16, 128).bfloat16(), torch.randn(2, 16, 64).bfloat16()
    W = lora_gpu.dequantised(weight).double()
    exact = [tensor.double().requires_grad_() for tensor in (x, A.bfloat16(), B.bfloat16())]
    y = exact[0] @ W.T + 2.0 * (exact[0] @ exact[1].T) @ exact[2].T
    wanted = (y, *torch.autograd.grad(y, exact, dy.double()))
    given = x.requires_grad_()
    got = rival(given)
    got = (got, *torch.autograd.grad(got, [given, rival.lora_A, rival.lora_B], dy))
    assert [tensor.dtype for tensor in got] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for result, right in zip(got, wanted, strict=True):
        # S and T are rounded to bf16, 2**-9 of themselves, and so is the result, twice.
        assert (result.double() - right).abs().max() <= 2**-6 * right.abs().max()


def test_composition_shares_one_buffer_that_grows():
    small, large = (Composition(torch.randn(64, K).bfloat16(), *layers.adapter(64, K, "cpu"), 1.0) for K in (64, 128))
    lora_gpu.forget_buffers()
    from bench.harness.composition import _buffers, unpacked

    for rival, most in ((small, 64 * 64), (large, 64 * 128), (small, 64 * 128)):
        W = unpacked(rival.packed, torch.bfloat16)
        (buffer,) = _buffers.values()
        assert buffer.numel() == most
        assert W.data_ptr() == buffer.data_ptr()
    lora_gpu.forget_buffers()
    assert not _buffers


def test_expected_answers_are_those_of_the_reference():
    weight = torch.randn(64, 128).mul_(0.02).bfloat16()
    packed = NF4Linear.from_linear(layers.linear(weight)).op_arguments()
    A, B = layers.adapter(64, 128, "cpu")
    x, dy = torch.randn(8, 128).bfloat16(), torch.randn(8, 64).bfloat16()
    y, S = reference.lora_linear(x, **packed, lora_A=A, lora_B=B, scaling=2.0)
    wanted = (y, S, *reference.lora_linear_backward(dy, x, S, **packed, lora_A=A, lora_B=B, scaling=2.0))
    W = lora_gpu.dequantised(weight)
    got = (*expected.forward(x, W, A, B, 2.0), *expected.backward(dy, x, W, A, B, 2.0))
    for result, right in zip(got, wanted, strict=True):  # the reference's are rounded to bf16, in its last place 2**-8
        assert (result.double() - right.double()).abs().max() <= 2**-8 * right.double().abs().max()
    y, S = expected.forward(x, W, None, None, 1.0)
    torch.testing.assert_close(y, x.float() @ W.float().T)
    assert S.shape == (8, 0)
    assert len(expected.backward(dy, x, W, None, None, 1.0)) == 1


def test_torchao_packs_by_whichever_module_its_version_has(monkeypatch):
    def to_nf4(weight):
        return weight

    modules = {"torchao.quantization": SimpleNamespace(), "torchao.dtypes": SimpleNamespace(to_nf4=to_nf4)}
    monkeypatch.setattr(layers.importlib, "import_module", modules.__getitem__)
    weight = torch.ones(2, 3).bfloat16()
    layer = layers.of_torchao(weight)
    assert layer.weight.data_ptr() == weight.data_ptr()
    assert not layer.weight.requires_grad
    del modules["torchao.dtypes"].to_nf4
    with pytest.raises(ImportError, match=r"to_nf4 must be in torchao\.quantization or torchao\.dtypes"):
        layers.of_torchao(weight)


def test_absent_rivals_are_named(monkeypatch):
    monkeypatch.setattr(layers, "installed", lambda package: package == "torchao")
    names = layers.present()
    assert BITSANDBYTES not in names
    assert names[0] == layers.OURS
    assert "bitsandbytes is absent: not compared with" in layers.notes(names)
    assert "torchao is absent: not compared with" not in layers.notes(names)
    for name in names[1:]:
        assert any(note.startswith(f"{name}: ") for note in layers.notes(names))


# ---- the host ----


class Ticks:
    """A clock that a call of F.linear moves by as many seconds as come next."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds = 0.0, iter(seconds)
        monkeypatch.setattr(steady.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.nn.functional, "linear", self.linear)
        self.calls = 0

    def linear(self, x, weight):
        if self.calls % (steady.CALLS * steady.BATCHES) == 0:
            self.each = next(self.seconds)
        self.calls += 1
        self.now += self.each


@pytest.mark.parametrize(
    ("seconds", "moved"),
    [
        ([1.0] * 12, 0.0),
        ([1.0] * 5 + [50.0] + [1.0] * 6, 0.0),  # an interrupt
        ([1.0] * 9 + [1.5] * 3, 0.5),  # slower at the end
        ([1.5] * 3 + [1.0] * 9, 0.5),
        ([1.0, 1.4] * 6, 0.4),  # between its rounds
    ],
)
def test_a_host_that_moves_is_noticed(monkeypatch, seconds, moved):
    Ticks(monkeypatch, seconds)
    host = steady.Host("cpu")
    for _ in seconds:
        host.look()
    assert host.seconds == pytest.approx(seconds)
    assert host.moved() == pytest.approx(moved)


class Moving:
    """A host that moves by so much."""

    def __init__(self, share):
        self.share = share

    def look(self):
        pass

    def moved(self):
        return self.share


@pytest.mark.parametrize(
    ("movements", "kept", "moved"),
    [([0.1], 0, 0.1), ([0.5, 0.2], 1, 0.2), ([0.5, 0.3, 0.4], 1, 0.3), ([0.9, 0.8, 0.7], 2, 0.7)],
)
def test_a_row_is_measured_again_three_times_at_most(monkeypatch, movements, kept, moved):
    remaining, results = iter(movements), iter(range(9))
    monkeypatch.setattr(steady, "Host", lambda device: Moving(next(remaining)))
    assert steady.steadily(lambda look: next(results), "cuda") == (kept, moved)
    assert next(results) == len(movements)
    assert ("unsteady" in steady.shown(moved)) == (moved > 0.2)


def test_on_a_cpu_nothing_is_measured_again(monkeypatch):
    monkeypatch.setattr(steady, "Host", lambda device: Moving(0.5))
    results = iter(range(9))
    assert steady.steadily(lambda look: next(results), "cpu") == (0, 0.5)
    assert next(results) == 1


# ---- rows ----


def as_card(monkeypatch, machine):
    """Tensors stay on the CPU, clocks are those of a card in simulated time."""
    monkeypatch.setitem(timing.CLOCKS, "cpu", timing.CLOCKS["cuda"])
    monkeypatch.setattr(lora_gpu, "alternate", lambda *a, device, **k: timing.alternate(*a, device="cuda", **k))
    monkeypatch.setattr(steady, "Host", lambda device: Moving(0.0))


def test_three_times_are_told_apart(monkeypatch):
    machine = SlowHost(monkeypatch, 0, 0)
    as_card(monkeypatch, machine)

    def costing(host, card):
        def call():
            machine.now += host
            machine.work(card)

        return call

    calls = {OURS: costing(1e-4, 2e-5), TORCH: costing(2e-5, 1e-5), BITSANDBYTES: costing(5e-5, 4e-4)}
    took, moved = lora_gpu.timed(calls, QUICK)
    assert moved == 0
    for clock, of in ((SATURATED, lambda h, c: c), (IN_A_ROW, max), (ALONE, lambda h, c: h + c)):
        for name, host, on_card in ((OURS, 1e-4, 2e-5), (TORCH, 2e-5, 1e-5), (BITSANDBYTES, 5e-5, 4e-4)):
            assert took[clock][name].median == pytest.approx(of(host, on_card), rel=0.05)
    row = lora_gpu.described(lora_gpu.Row(TINY, 4, "both", took, 0.3), [OURS, TORCH, BITSANDBYTES, TORCHAO], NAMES)
    assert list(row)[2:5] == ["saturated, ms", "in a row, ms", "alone, ms"]
    assert row["saturated: ours / torch"]["median"] == pytest.approx(2, rel=0.05)
    assert row["in a row: ours / torch"]["median"] == pytest.approx(5, rel=0.05)
    assert row["alone: ours / bitsandbytes"]["median"] == pytest.approx(12 / 45, rel=0.05)
    assert row["saturated: ours / torchao"] is None  # it could not be measured
    assert row["TFLOP/s, saturated"] == pytest.approx(2 * 2 * 4 * 64 * 128 / 2e-5 / 1e12, rel=0.05)
    assert row["host moved"] == "30 %, unsteady"


@pytest.mark.usefixtures("few_copies")
def test_every_contender_that_is_there_has_its_columns(monkeypatch, capsys):
    monkeypatch.setattr(lora_gpu, "QUICK", (TINY,))
    forward, both, together, layer = lora_gpu.tables(QUICK)
    names = layers.present()
    for table in (forward, both):
        assert [row["M"] for row in table.rows] == [1, 16]
        for row in table.rows:
            for clock in NAMES:
                assert row[f"{timing.heading(clock)}, ms"]["median"] > 0
                for name in set(names[1:]) - {TORCHAO}:  # which packs no such small weight
                    assert row[lora_gpu.ratio_of(clock, name)]["median"] > 0
        assert not table.targets
        assert Table(**json.loads(json.dumps(table.to_dict()))).markdown() == table.markdown()
    assert not layer.rows
    assert not together.rows  # no layer k or v
    assert capsys.readouterr().out.count("tokens, forward and backward: saturated") == 2


@pytest.mark.usefixtures("few_copies")
def test_one_clock_has_the_columns_of_one(monkeypatch):
    monkeypatch.setattr(lora_gpu, "QUICK", (TINY,))
    monkeypatch.setattr(layers, "installed", lambda package: False)
    table, *_ = lora_gpu.tables(Settings(quick=True, clocks=(SATURATED,)))
    assert [key for key in table.rows[0] if "alone" in key or "in a row" in key] == []
    assert "saturated: ours / torch + LoRA" in table.rows[0]


@pytest.mark.usefixtures("few_copies")
@pytest.mark.parametrize("where", ["made", "checked", "run"])
def test_a_rival_that_fails_is_named_and_the_others_go_on(monkeypatch, where):
    broken = MAKERS[TORCH]

    class OutOfMemory(torch.nn.Linear):
        def forward(self, x):
            if len(x) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
            return super().forward(x)

    def make(weight):
        if where == "made":
            raise RuntimeError("no such card")
        layer = broken(weight * (2 if where == "checked" else 1))
        if where == "run":
            layer.__class__ = OutOfMemory
        return layer

    monkeypatch.setitem(MAKERS, TORCH, make)
    missing = []
    budget = lora_gpu.Budget(None)
    rows = lora_gpu.rows_of(TINY, (1, 32), [layers.OURS, TORCH, "composition"], QUICK, budget, missing)
    with_torch = [(row.M, row.kind) for row in rows if TORCH in row.took[ALONE]]
    assert with_torch == {"made": [], "checked": [(32, "forward"), (32, "both")]}.get(
        where, [(1, "forward"), (1, "both")]
    )
    assert all("composition" in row.took[ALONE] for row in rows)
    said = {"made": "RuntimeError: no such card", "checked": "WrongAnswer: torch, 1 tokens, forward 0: off by"}
    assert said.get(where, "OutOfMemoryError: CUDA out of memory. Tried") in missing[0]
    assert all(line.startswith("tiny q, o 64 x 128") and "torch is not measured" in line for line in missing)


@pytest.mark.usefixtures("few_copies")
def test_our_own_wrong_answer_is_not_timed(monkeypatch):
    monkeypatch.setattr(lora_gpu, "timed", lambda *a: pytest.fail("timed"))
    right = MAKERS[layers.OURS]
    monkeypatch.setitem(MAKERS, layers.OURS, lambda weight: right(1.1 * weight))
    with pytest.raises(WrongAnswer, match="nf4lora, 1 tokens, forward 0: off by"):
        lora_gpu.rows_of(TINY, (1,), [layers.OURS], QUICK, lora_gpu.Budget(None), [])


def test_a_budget_leaves_out_the_last_shapes_and_names_them(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(lora_gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(lora_gpu, "QUICK", (TINY, Shape("tiny", "k", 64, 128), Shape("tiny", "v", 64, 128)))

    def timed(calls, settings):
        now[0] += 4
        return {name: {name: Timing([1.0]) for name in calls} for name in settings.clocks}, 0.0

    monkeypatch.setattr(lora_gpu, "timed", timed)
    monkeypatch.setattr(timing, "last_cache", lambda device="cpu": 1)
    monkeypatch.setattr(layers, "installed", lambda package: False)
    forward, *_ = lora_gpu.tables(Settings(quick=True, seconds=20))
    assert [(row["layer"], row["M"]) for row in forward.rows] == [
        ("tiny q, o 64 x 128", 1), ("tiny q, o 64 x 128", 16), ("tiny k 64 x 128", 1),
    ]  # fmt: skip
    left = "tiny k 64 x 128, 16 tokens; tiny v 64 x 128; tiny q, k, v 64 + 64 + 64 x 128"
    assert f"not measured, the time was spent: {left}" in forward.notes


@pytest.mark.usefixtures("few_copies")
def test_a_budget_may_end_while_copies_are_made(monkeypatch):
    monkeypatch.setattr(lora_gpu, "timed", lambda *a: pytest.fail("timed"))
    budget = lora_gpu.Budget(-1.0)
    assert lora_gpu.rows_of(TINY, (1,), [OURS], QUICK, budget, []) == []
    assert lora_gpu.rows_of_group(QKV, (1,), QUICK, budget) == []
    assert budget.left == [f"{TINY.name}, 1 tokens", f"{QKV.name}, 1 tokens"]


def test_shapes_of_a_card_do_not_reach_a_cpu():
    assert not set(ON_A_CARD) & set(SHAPES)
    assert not set(ON_A_CARD) & set(lora.SHAPES)
    assert all(shape.K % 64 == 0 for shape in ON_A_CARD)
    assert set(ON_A_CARD) < set(lora_gpu.SHAPES)
    assert set(lora.SHAPES) < set(lora_gpu.SHAPES)
    assert lora_gpu.TOKENS[0] == 1
    assert lora_gpu.TOKENS[-1] == 16384
    for model in lora_gpu.BLOCKS:  # q, k, v, o, gate, up, down
        assert sum(shape.count for shape in block_of(model)) == 7
        assert [len(group.parts) for group in groups_of(block_of(model))] == [3, 2]
    assert sum(shape.count * shape.weights for shape in block_of("Llama-3.1-8B")) == 218_103_808


# ---- groups ----

KV = Shape("tiny", "k, v", 32, 128)
(QKV,) = groups_of([TINY, KV])


def group(seed=0):
    torch.manual_seed(seed)
    return groups.SameInput([lora_gpu.drawn(part, "cpu") for part in QKV.parts])


def counted(monkeypatch):
    """How many layers each call of the group's op has computed, from now on."""
    called, right = [], siblings.lora_linear_group
    monkeypatch.setattr(siblings, "lora_linear_group", lambda x, of: called.append(len(of.qweight)) or right(x, of))
    return called


def test_groups_come_after_their_block():
    names = [measured.name for measured in lora_gpu.in_order(lora_gpu.SHAPES, lora_gpu.BLOCKS)]
    assert names[3:8] == [
        "Llama-3.1-8B down 4096 x 14336",
        "Llama-3.1-8B q, k, v 4096 + 1024 + 1024 x 4096",
        "Llama-3.1-8B gate, up 14336 + 14336 x 4096",
        "Llama-3.2-1B q, o 2048 x 2048",
        "Llama-3.2-1B k, v 512 x 2048",
    ]
    assert len(names) == len(lora_gpu.SHAPES) + 2 * len(lora_gpu.BLOCKS)


@pytest.mark.parametrize("kind", lora_gpu.KINDS)
def test_layers_are_computed_together_or_one_by_one(monkeypatch, kind):
    layers_of_group, called = group(), counted(monkeypatch)
    x, *dys = (torch.randn(4, size).bfloat16() for size in (128, 64, 32, 32))
    calls = groups.calls(kind, lambda: layers_of_group, x, dys)
    together = calls[OURS]()
    assert called == [3]
    one_by_one = calls[groups.ONE_BY_ONE]()
    assert called == [3]
    calls[OURS]()
    assert called == [3, 3]
    for result, right in zip(together, one_by_one, strict=True):
        assert torch.equal(result, right)


def test_layers_that_are_no_group_are_not_measured_as_one(monkeypatch):
    monkeypatch.setattr(groups, "together", groups.apart)
    with pytest.raises(RuntimeError, match=r"must have groups of \[3\] layers with the same input, got \[\]"):
        group()


def test_devices_come_back_after_a_failure():
    before = siblings.DEVICES
    with pytest.raises(KeyError), groups.apart():
        raise KeyError
    assert siblings.DEVICES is before


@pytest.mark.parametrize("kind", lora_gpu.KINDS)
def test_each_answer_of_a_group_is_checked(kind):
    layers_of_group = group()
    Ws = [lora_gpu.dequantised(weight) for weight in drawn_as(0)]
    x, *dys = (torch.randn(4, size).bfloat16() for size in (128, 64, 32, 32))
    got = list(groups.calls(kind, lambda: layers_of_group, x, dys)[OURS]())
    groups.check("qkv", kind, got, x, dys, Ws, 2**-7)
    assert len(got) == {"forward": 3, "both": 7}[kind]
    for number, right in enumerate(got):
        wrong = [*got[:number], 1.1 * right, *got[number + 1 :]]
        with pytest.raises(WrongAnswer, match=f"qkv, 4 tokens, {kind} {number}: off by"):
            groups.check("qkv", kind, wrong, x, dys, Ws, 2**-7)
    if kind == "forward":  # adapters differ, so that k's output is not v's
        with pytest.raises(WrongAnswer, match="forward 1"):
            groups.check("qkv", kind, [got[0], got[2], got[1]], x, dys, [Ws[0], Ws[1], Ws[1]], 2**-7)


def drawn_as(seed):
    torch.manual_seed(seed)
    return [lora_gpu.drawn(part, "cpu") for part in QKV.parts]


@pytest.mark.usefixtures("few_copies")
def test_copies_of_a_layer_do_not_become_a_group(monkeypatch):
    called = counted(monkeypatch)
    weight = lora_gpu.drawn(TINY, "cpu")
    copies = [MAKERS[OURS](weight).train() for _ in range(3)]
    turn = itertools.cycle(copies).__next__
    x, dy = torch.randn(4, 128).bfloat16(), torch.randn(4, 64).bfloat16()
    for kind in 3 * [*lora_gpu.KINDS]:
        for _ in copies:
            layers.CALLS[kind](turn, x, dy)
    assert not called
    assert siblings.groups(torch.nn.ModuleList(copies)) == []


@pytest.mark.usefixtures("few_copies")
def test_groups_have_a_table(monkeypatch, capsys):
    monkeypatch.setattr(lora_gpu, "QUICK", (TINY, KV))
    monkeypatch.setattr(layers, "installed", lambda package: False)
    *_, table, layer = lora_gpu.tables(QUICK)
    assert [(row["layers"], row["pass"], row["M"]) for row in table.rows] == [
        (QKV.name, text, M) for M in (1, 16) for text in ("forward", "forward and backward")
    ]
    for row in table.rows:
        for clock in NAMES:
            assert row[f"{timing.heading(clock)}: together / one by one"]["median"] > 0
            assert row[lora_gpu.ratio_of(clock, TORCH)] > 0
    assert not layer.rows  # of a model among BLOCKS alone
    assert Table(**json.loads(json.dumps(table.to_dict()))).markdown() == table.markdown()
    assert capsys.readouterr().out.count(f"of {groups.ONE_BY_ONE}") == 3 * len(table.rows)


def test_rivals_of_a_group_are_sums_of_their_layers():
    def row(shape, ours, **rivals):
        took = {OURS: Timing([ours]), **{name: Timing([seconds]) for name, seconds in rivals.items()}}
        return lora_gpu.Row(shape, 4, "both", {SATURATED: took}, 0.0)

    together = row(QKV, 3.0, **{groups.ONE_BY_ONE: 4.0})
    singles = [row(TINY, 9.0, torch=2.0, torchao=1.0), row(KV, 9.0, torch=1.5)]
    (found,) = lora_gpu.group_table([together], singles, [OURS, TORCH, TORCHAO], SATURATED_ONLY).rows
    assert found["saturated: together / one by one"]["median"] == 0.75
    assert found["saturated: ours / torch"] == 3 / 5
    assert found["saturated: ours / torchao"] is None  # k and v have no time
    (found,) = lora_gpu.group_table([together], singles[:1], [OURS, TORCH], SATURATED_ONLY).rows
    assert found["saturated: ours / torch"] is None


@pytest.mark.usefixtures("few_copies")
def test_a_wrong_answer_of_a_group_is_not_timed(monkeypatch):
    monkeypatch.setattr(lora_gpu, "timed", lambda *a: pytest.fail("timed"))
    right = siblings.lora_linear_group
    monkeypatch.setattr(siblings, "lora_linear_group", lambda x, of: [right(x, of)[i] for i in (0, 2, 1)])
    with pytest.raises(WrongAnswer, match="tiny q, k, v .*nf4lora, 1 tokens, forward 1: off by"):
        lora_gpu.rows_of_group(QKV, (1,), QUICK, lora_gpu.Budget(None))


@pytest.mark.usefixtures("few_copies")
def test_groups_on_a_cpu(monkeypatch):
    monkeypatch.setattr(lora_groups, "QUICK", (TINY, KV))
    table = lora_groups.table(QUICK)
    assert [(row["dtype"], row["M"]) for row in table.rows] == [
        (dtype, M) for dtype in ("float32", "bfloat16") for M in (1, 16)
    ]
    for row in table.rows:
        for text in lora_gpu.KINDS.values():
            assert row[f"{text}, ms"]["median"] > 0
            assert 0.1 < row[f"{text}: together / one by one"]["median"] < 10
    assert [group.name for group in lora_groups.measured()] == [
        "SmolLM2-135M q, k, v 576 + 192 + 192 x 576",
        "Llama-3.2-1B q, k, v 2048 + 512 + 512 x 2048",
        "Llama-3.2-1B gate, up 8192 + 8192 x 2048",
    ]
    right = siblings.lora_linear_group
    monkeypatch.setattr(siblings, "lora_linear_group", lambda x, of: [y + 2**-9 for y in right(x, of)])
    with pytest.raises(WrongAnswer, match="together, torch.float32, 1 tokens, forward 0"):
        lora_groups.rows_of(QKV, torch.float32, (1,), QUICK)


# ---- the layer, and what it is held to ----


def rows_of_a_block(ours, model="Llama-3.1-8B", M=2048, torch_seconds=1.0):
    """Rows in which each layer's forward pass takes ours(shape, kind) times as long as torch's."""
    made = []
    for shape in block_of(model):
        for kind in lora_gpu.KINDS:
            base = torch_seconds * shape.weights * (2 if kind == "both" else 1)
            took = {OURS: Timing([base * ours(shape, kind)]), TORCH: Timing([base])}
            made.append(lora_gpu.Row(shape, M, kind, {SATURATED: took}, 0.0))
    return made


SATURATED_ONLY = Settings(device="cuda", clocks=(SATURATED,))


def test_a_layer_is_the_sum_of_its_parts_by_their_count(card):
    card()
    rows = rows_of_a_block(lambda shape, kind: 2.0 if shape.layer == "k, v" else 1.0)
    table = lora_block.layer_table(rows, [OURS, TORCH], SATURATED_ONLY)
    share = 2 * 1024 * 4096 / 218_103_808  # k and v of all weights
    assert [row["pass"] for row in table.rows] == ["forward", "forward and backward", "with checkpointing"]
    for row in table.rows:
        assert row["saturated: ours / torch"] == pytest.approx(1 + share)
    forward, both, with_checkpointing = (row["saturated, ms"] for row in table.rows)
    assert forward + both == pytest.approx(with_checkpointing)
    claims = [claim for claim, met in table.targets if met]
    assert claims == [
        f"Llama-3.1-8B, the layer, {text}, 2048 tokens, saturated: at most {limit} of cuBLAS's bf16 products, got 1.04"
        for text, limit in (("forward", 1.25), ("forward and backward", 1.24), ("with checkpointing", 1.18))
    ]


def test_a_layer_has_groups_where_they_were_measured(card):
    card()
    rows = rows_of_a_block(lambda shape, kind: 1.0)
    qkv, gate_up = groups_of(block_of("Llama-3.1-8B"))

    def measured(group, kind, ratio):
        seconds = ratio * group.weights * (2 if kind == "both" else 1)
        took = {OURS: Timing([seconds]), groups.ONE_BY_ONE: Timing([9 * seconds])}
        return lora_gpu.Row(group, 2048, kind, {SATURATED: took}, 0.0)

    rows += [measured(gate_up, "forward", 0.5), measured(gate_up, "both", 0.25), measured(qkv, "forward", 0.1)]
    table = lora_block.layer_table(rows, [OURS, TORCH], SATURATED_ONLY)
    share = 2 * 14336 * 4096 / 218_103_808  # gate and up of all weights
    ratios = [1 - 0.5 * share, 1 - 0.75 * share, 1 - (0.5 + 2 * 0.75) / 3 * share]
    for row, ratio in zip(table.rows, ratios, strict=True):
        assert row["together"] == "gate, up"  # q, k and v lack the backward pass
        assert row["saturated: ours / torch"] == pytest.approx(ratio)
        assert row["saturated, ms"] == pytest.approx(ratio * row["saturated, single calls, ms"])
    assert [claim.split()[-1] for claim, _ in table.targets] == [f"{ratio:.2f}" for ratio in ratios]
    (*_, row) = lora_block.layer_table(rows_of_a_block(lambda *_: 1.0), [OURS, TORCH], SATURATED_ONLY).rows
    assert row["together"] is None
    assert row["saturated, ms"] == row["saturated, single calls, ms"]


def test_a_layer_that_lacks_a_part_has_no_sum():
    rows = rows_of_a_block(lambda shape, kind: 1.0)
    assert lora_block.sums_of(rows[:-1], "Llama-3.1-8B") == []
    del rows[0].took[SATURATED][TORCH]
    for text, _, _, sums in lora_block.sums_of(rows, "Llama-3.1-8B"):
        assert (TORCH in sums[SATURATED]) == (text == "forward and backward")
        assert OURS in sums[SATURATED]


@pytest.mark.parametrize(
    ("name", "capability", "ratio", "met"),
    [
        ("NVIDIA H200", (9, 0), 1.24, True),
        ("NVIDIA H200", (9, 0), 1.26, False),
        ("NVIDIA H100 80GB HBM3", (9, 0), 1.29, True),
        ("NVIDIA H100 80GB HBM3", (9, 0), 1.31, False),
        ("NVIDIA A100", (8, 0), 1.26, None),
    ],
)
def test_limits_of_an_h100_are_a_little_larger_and_other_cards_have_none(card, name, capability, ratio, met):
    card(name, capability)
    rows = rows_of_a_block(lambda shape, kind: ratio)
    limits = lora_block.layer_table(rows, [OURS, TORCH], SATURATED_ONLY).targets
    assert [met for claim, met in limits if ", forward, " in claim] == ([] if met is None else [met])
    quick = Settings(quick=True, device="cuda", clocks=(SATURATED,))
    assert lora_block.layer_table(rows, [OURS, TORCH], quick).targets == []
    assert targets.allowance("cpu") is None


def test_only_the_numbers_of_tokens_that_were_promised_are_targets(card):
    card()
    for M, count in ((512, 2), (1024, 0), (2048, 3), (8192, 3), (16384, 0)):
        rows = rows_of_a_block(lambda shape, kind: 1.0, M=M)
        assert len(lora_block.layer_table(rows, [OURS, TORCH], SATURATED_ONLY).targets) == count
        assert lora_block.layer_table(rows_of_a_block(lambda *_: 1.0, "Qwen2.5-7B", M), [OURS], SATURATED_ONLY).rows
        assert not lora_block.layer_table(
            rows_of_a_block(lambda *_: 1.0, "Qwen2.5-7B", M), [OURS, TORCH], SATURATED_ONLY
        ).targets


def alone(M, ours, rival, base, shape=TINY, kind="both"):
    took = {OURS: Timing([ours]), BITSANDBYTES: Timing([rival]), TORCH: Timing([base])}
    return lora_gpu.Row(shape, M, kind, {ALONE: took}, 0.0)


def test_latency_is_judged_by_the_worst_layer(card):
    card()
    settings = Settings(device="cuda")
    other = Shape("tiny", "down", 64, 64)
    rows = [
        alone(1, 3e-4, 1e-3, 2.5e-4), alone(512, 3e-4, 0.9e-3, 2.45e-4, other), alone(1024, 9.0, 1.0, 1.0),
        alone(2048, 0.6, 1.0, 0.1), alone(8192, 0.71, 1.0, 0.1, other), alone(1, 9.0, 1.0, 1.0, kind="forward"),
    ]  # fmt: skip
    assert lora_gpu.latency_targets(rows, settings) == [
        (f"one call, {span}, worst tiny down 64 x 64 at {M}: at most {limit}, got {got}", met)
        for span, M, limit, got, met in (
            ("1 to 512 tokens", 512, "0.35 of bitsandbytes + PEFT's time", "0.33", True),
            ("from 2048 tokens", 8192, "0.70 of bitsandbytes + PEFT's time", "0.71", False),
            ("1 to 512 tokens", 512, "60 us more than F.linear without LoRA", "55", True),
        )
    ]
    card("NVIDIA H100 80GB HBM3")
    assert [met for _, met in lora_gpu.latency_targets(rows, settings)] == [True, True, True]
    assert lora_gpu.latency_targets(rows, Settings(device="cpu")) == []


# ---- overhead ----


def test_overhead_is_measured_in_both_dtypes_and_of_the_layer():
    of_op, of_layer, *_ = overhead.run(QUICK)
    assert [row["dtype"] for row in of_op.rows] == ["bf16"] * 3 + ["float32"] * 3
    assert [row["way"] for row in of_layer.rows] == ["NF4Linear, without LoRA", *layers.present()]
    for row in (*of_op.rows, *of_layer.rows):
        times = [value["median"] for key, value in row.items() if key.endswith(", us")]
        assert len(times) == 3
        assert all(0 < microseconds < 1e6 for microseconds in times)


def test_overhead_on_a_card_has_three_times_of_each(monkeypatch):
    machine = SlowHost(monkeypatch, 3e-5, 1e-5)
    monkeypatch.setattr(steady, "steadily", lambda measure, device: (measure(lambda: None), 0.25))

    def call():
        machine.call()
        return torch.zeros(1, requires_grad=True) * 1

    x = torch.zeros(1, requires_grad=True)
    (row,) = overhead.rows_of({"a way": call}, [x], {"dtype": "bf16"}, Settings(device="cuda", quick=True), share=0.1)
    assert list(row)[:5] == [
        "dtype", "way", "without gradients, saturated, us", "without gradients, in a row, us",
        "without gradients, alone, us",
    ]  # fmt: skip
    for label in ("without gradients", "forward", "forward and backward"):
        for clock, microseconds in (("saturated", 10), ("in a row", 30), ("alone", 40)):
            assert row[f"{label}, {clock}, us"]["median"] == pytest.approx(microseconds, rel=0.05)
    assert row["host moved"] == "25 %, unsteady"


# ---- a step ----


@pytest.mark.parametrize("name", [OURS, RIVAL])
def test_random_model_is_packed_layer_by_layer(monkeypatch, name):
    if name == RIVAL:
        pytest.importorskip("bitsandbytes")
    drawn, counts, alive = random_model.drawn, [], []

    def watched(parameter, device):
        counts.append(1)
        if parameter.dim() == 2 and len(counts) > 16:  # the last layers: looking takes long
            alive.append(len(sixteen_bit_matrices()))
        return drawn(parameter, device)

    def sixteen_bit_matrices():
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        return {t.data_ptr() for t in tensors if t.dtype == torch.bfloat16 and t.dim() == 2 and not t.is_meta} - before

    gc.collect()
    before = set()
    before = sixteen_bit_matrices()
    monkeypatch.setattr(random_model, "drawn", watched)
    model = random_model.adapted(name, "tiny", "cpu")
    assert len(counts) == 1 + 2 * (7 + 2) + 1
    assert alive
    assert max(alive) <= 2  # the embedding, and the layer before, whose name still has its weight
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    adapters = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(adapters) == 2 * 2 * 7
    assert all("lora_" in key for key in adapters)


def test_contenders_of_a_random_model_have_the_same_weights():
    pytest.importorskip("bitsandbytes")
    ids = torch.arange(32)[None]
    found = []
    for name in (OURS, RIVAL):
        model = random_model.adapted(name, "tiny", "cpu")
        with torch.no_grad():
            found.append(model(input_ids=ids, labels=ids).loss.item())
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert abs(found[0] - math.log(256)) < 0.5


def test_large_shapes_are_those_of_the_models():
    for name, block, total in (("Llama-3.1-8B", "Llama-3.1-8B", 8.03e9), ("Llama-3.2-1B", "Llama-3.2-1B", 1.24e9)):
        options = random_model.SHAPES[name]
        linear = sum(shape.count * shape.weights for shape in block_of(block)) * options["num_hidden_layers"]
        embeddings = options["vocab_size"] * options["hidden_size"] * (1 if options["tie_word_embeddings"] else 2)
        assert linear + embeddings == pytest.approx(total, rel=0.01)


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(step_random, "Process", InProcess)


@pytest.mark.usefixtures("in_process")
def test_steps_of_a_tiny_model_on_a_cpu(capsys, tmp_path):
    (table,) = step.run(Settings(quick=True, model=tmp_path))  # without a real model there is no table by operator
    assert [(row["tokens"], row["checkpointing"]) for row in table.rows] == [(32, False), (32, True)]
    for row in table.rows:
        assert row["ours, tokens/s"] == pytest.approx(32 / row["ours, s"]["median"])
        assert row["our peak, MB"] > 10
        assert row["card busy, ours, %"] is None
        if step_random.installed("bitsandbytes"):
            assert row["time, ours / rival"]["median"] > 0
    assert capsys.readouterr().out.count("32 tokens, with") == 2


class Answers:
    """Contenders that answer from a list; "dies" ends the process."""

    def __init__(self, monkeypatch, by_name):
        self.by_name = {name: iter(answers) for name, answers in by_name.items()}
        self.asked = []
        monkeypatch.setattr(step_random, "Process", self.process)
        monkeypatch.setattr(step_random, "installed", lambda package: True)

    def process(self, module, *, name, **arguments):
        return contextlib.nullcontext(
            SimpleNamespace(
                start=lambda question=None: self.asked.append((name, question)), result=lambda: self.result(name)
            )
        )

    def result(self, name):
        answer = next(self.by_name[name])
        if answer == "dies":
            raise RuntimeError("step_random ended with -9:\nKilled")
        return answer


def answer(seconds=1.0, peak=1e9, busy=0.9, host=(1.0, 1.0), loss=11.8):
    return {"seconds": [seconds] * 5, "peak": peak, "busy": busy, "host": list(host), "loss": loss}


BUILT = {"built": 1.0}


def test_step_is_held_to_time_memory_and_a_busy_card(monkeypatch, card):
    card()
    monkeypatch.setattr(step_random, "MODELS", ("Llama-3.1-8B",))
    ours, theirs = [BUILT, answer(0.6, 0.9e9, 0.54)], [BUILT, answer(1.0)]
    nothing = [{"out_of_memory": True}] * 2
    ours += [answer(0.8, 1.1e9, 0.6)] * 3 + nothing
    theirs += [answer(1.0)] * 3 + nothing
    Answers(monkeypatch, {OURS: ours, RIVAL: theirs})
    table = step_random.table(Settings(device="cuda"))
    assert [row["tokens"] for row in table.rows] == [2048, 2048, 4096, 4096, 8192, 8192]
    assert table.rows[0]["card busy, ours, %"] == pytest.approx(90)
    assert table.rows[0]["ours, tokens/s"] == pytest.approx(2048 / 0.6)
    assert [table.rows[-1][key] for key in ("ours, s", "time, ours / rival", "peak, ours / rival")] == [None] * 3
    first, second = table.targets[:3], table.targets[3:6]
    assert first == [
        (f"Llama-3.1-8B, 2048 tokens, no checkpointing: at most 0.70 of {RIVAL}'s time, got 0.60", True),
        (f"Llama-3.1-8B, 2048 tokens, no checkpointing: at most 1.00 of {RIVAL}'s memory, got 0.90", True),
        ("Llama-3.1-8B, 2048 tokens, no checkpointing: the card busy 85 % of a step at least, got 90 %", True),
    ]
    assert [met for _, met in second] == [False, False, False]
    assert len(table.targets) == 12


def test_step_is_measured_again_while_the_host_moves(monkeypatch):
    monkeypatch.setattr(step_random, "MODELS", ("Llama-3.1-8B",))
    monkeypatch.setattr(step_random, "TOKENS", (2048,))
    monkeypatch.setattr(targets, "allowance", lambda device: None)
    moving, still = answer(host=(1.0, 2.0)), answer(0.5)
    contenders = Answers(
        monkeypatch, {OURS: [BUILT, moving, still, moving, moving, moving], RIVAL: [BUILT] + [still] * 5}
    )
    first, second = step_random.table(Settings(device="cuda")).rows
    assert first["host moved"] == "0 %"
    assert first["ours, s"]["median"] == 0.5
    assert "unsteady" in second["host moved"]  # three tries
    assert [name for name, question in contenders.asked if question] == [OURS, RIVAL] * 5


def test_a_rival_that_dies_is_named_and_we_go_on(monkeypatch):
    monkeypatch.setattr(targets, "allowance", lambda device: 0.0)
    Answers(monkeypatch, {OURS: [BUILT, answer(), answer()], RIVAL: [BUILT, "dies"]})
    table = step_random.table(Settings(quick=True, device="cuda"))
    assert [row["time, ours / rival"] for row in table.rows] == [None, None]
    assert [row["ours, s"]["median"] for row in table.rows] == [1.0, 1.0]
    assert f"{RIVAL} ended: Killed" in table.notes
    Answers(monkeypatch, {OURS: ["dies"], RIVAL: [BUILT]})
    with pytest.raises(RuntimeError, match="Killed"):
        step_random.table(Settings(quick=True, device="cuda"))


def test_steps_with_other_losses_are_no_rivals(monkeypatch):
    Answers(monkeypatch, {OURS: [BUILT, answer(loss=11.0)], RIVAL: [BUILT, answer(loss=15.0)]})
    with pytest.raises(WrongAnswer, match="losses of the first step"):
        step_random.table(Settings(quick=True))
    with pytest.raises(WrongAnswer):
        step_random.check_losses({OURS: answer(loss=float("nan")), RIVAL: answer()})


def test_a_budget_leaves_out_the_last_steps(monkeypatch, card):
    card()
    Answers(monkeypatch, {OURS: [BUILT] * 9, RIVAL: [BUILT] * 9})
    table = step_random.table(Settings(device="cuda", seconds=-1.0))
    assert table.rows == []
    assert "not measured, the time was spent: Llama-3.1-8B; Llama-3.2-1B" in table.notes


def test_no_memory_for_a_step_is_an_answer(monkeypatch):
    def measured(model, device, tokens, **rest):
        if tokens > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"tokens": tokens}

    monkeypatch.setattr(step_random, "measured", measured)
    steps = step_random.contender(OURS, "tiny", 1, "cpu")
    assert "built" in next(steps)
    assert steps.send({"tokens": 32}) == {"out_of_memory": True}
    assert steps.send({"tokens": 16}) == {"tokens": 16}


@pytest.mark.slow
def test_a_process_answers_what_it_is_asked():
    with Process("step_random", name=OURS, shape="tiny", layers=1, device="cpu") as process:
        assert next(process)["built"] > 0
        for tokens in (16, 24):
            found = process.ask(tokens=tokens, checkpointing=False, steps=1)
            assert len(found["seconds"]) == 1
            assert found["busy"] is None


# ---- a CPU that calls itself a card ----


class OnTheCpu(TorchFunctionMode):
    """Puts what is asked for on "cuda" on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def on_cpu(value):
            cuda = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
            return torch.device("cpu") if cuda else value

        if function is torch.device:  # its arguments are parts of a name
            return function(*args, **(kwargs or {}))
        return function(*map(on_cpu, args), **{key: on_cpu(value) for key, value in (kwargs or {}).items()})


class Events(SlowHost.Event):
    """The card works for 40 ms between two of them, so long that a sample has two calls at most."""

    def record(self):
        self.machine.work(0.04)
        super().record()


@pytest.fixture
def called_cuda(monkeypatch, card):
    """The device "cuda" is the CPU, its clock simulated; returns what was asked of the card."""
    card()
    asked = []
    machine = SlowHost(monkeypatch, 0, 0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Events(machine))
    for name, answer in (("synchronize", None), ("empty_cache", None), ("reset_peak_memory_stats", None),
                         ("max_memory_allocated", 1 << 30)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda name=name, answer=answer: asked.append(name) or answer)
    monkeypatch.setattr(timing, "last_cache", lambda device="cpu": 1 << 10)
    with OnTheCpu():
        yield asked


def test_lora_on_a_card(called_cuda, monkeypatch):
    monkeypatch.setattr(lora_gpu, "SHAPES", [Shape("Llama-3.1-8B", "q, k, v, o, gate, up, down", 128, 128)])
    for module in (lora_gpu, lora_block):
        monkeypatch.setattr(module, "block_of", lambda model: lora_gpu.SHAPES)
    monkeypatch.setattr(lora_gpu, "TOKENS", (1, 512))
    forward, both, together, layer = lora_gpu.tables(Settings(device="cuda", clocks=(SATURATED, ALONE)))
    for row in (*forward.rows, *both.rows):
        assert row["alone: ours / torch"]["median"] == pytest.approx(1)  # every sample takes as long
        assert (row["saturated, ms"]["median"], row["alone, ms"]["median"]) == pytest.approx((20, 40))
    # block_of gives each model these layers. Two groups, o and down are four calls in place of seven.
    assert {row["layer"] for row in layer.rows} == {f"{model}, the layer" for model in lora_gpu.BLOCKS}
    for row in layer.rows:
        assert row["together"] == "q, k, v; gate, up"
        assert row["saturated, ms"] / row["saturated, single calls, ms"] == pytest.approx(4 / 7)
        assert row["saturated: ours / torch"] == pytest.approx(4 / 7)
    assert len(together.rows) == 2 * 2 * 2  # groups, tokens, kinds
    for row in together.rows:
        assert row["alone: together / one by one"]["median"] == pytest.approx(1)
    assert [met for _, met in layer.targets] == [True, True]
    assert [met for _, met in both.targets] == [False] * layers.installed("bitsandbytes") + [True]
    assert not forward.targets
    assert "empty_cache" in called_cuda
    assert "synchronize" in called_cuda  # before the host's time is taken


def test_overhead_on_a_card(called_cuda):
    for table in overhead.run(Settings(device="cuda", quick=True))[:2]:  # the others have the host's part alone
        for row in table.rows:
            assert row["forward and backward, alone, us"]["median"] == pytest.approx(40e3)
            assert row["forward and backward, in a row, us"]["median"] == pytest.approx(20e3)
            assert "%" in row["host moved"]


def test_tune_on_a_card(called_cuda):
    times = tune.times_of(TINY, (1, 32), Settings(device="cuda", quick=True))
    assert [(time.direction, time.tokens) for time in times] == [
        (direction, tokens) for tokens in (1, 32) for direction in ("forward", "backward")
    ]
    for time in times:
        assert time.alone == pytest.approx(dict.fromkeys(time.alone, 0.04))
        assert time.in_a_step == pytest.approx(dict.fromkeys(time.alone, 0.02))


def test_step_on_a_card(called_cuda):
    steps = step_random.contender(OURS, "tiny", 1, "cuda")
    next(steps)
    found = steps.send({"tokens": 16, "checkpointing": True, "steps": 2})
    assert len(found["seconds"]) == 2
    assert len(found["host"]) == 3
    assert found["peak"] == 1 << 30
    assert found["busy"] is None  # this torch cannot trace a card
    assert called_cuda.count("reset_peak_memory_stats") == 1
    assert called_cuda[-1] == "empty_cache"


def test_card_is_busy_while_a_kernel_of_the_trace_runs(monkeypatch):
    stepped, kernels = [], [{"ph": "X", "cat": "kernel", "ts": start, "dur": 40.0} for start in (100.0, 120.0, 200.0)]

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            assert stepped == [1]

        def export_chrome_trace(self, path):
            with open(path, "w") as file:
                json.dump({"traceEvents": [*kernels, {"cat": "cuda_runtime", "ts": 0, "dur": 1e6}, {"ph": "M"}]}, file)

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.profiler, "supported_activities", lambda: {torch.profiler.ProfilerActivity.CUDA})
    events = step_random.trace_of(lambda: stepped.append(1), "cuda")
    assert step_random.busy_seconds(events) == pytest.approx(100e-6)
    assert step_random.seconds_by_part(events) == pytest.approx({"other kernels": 120e-6})
    monkeypatch.setattr(torch.profiler, "supported_activities", set)
    assert step_random.trace_of(lambda: pytest.fail("stepped"), "cuda") == []


@pytest.fixture
def replayed(monkeypatch):
    """CUDA graphs of a CPU that calls itself a card, and nothing else that needs one."""
    monkeypatch.setattr(step_options, "Process", InProcess)
    monkeypatch.setattr(step_options, "OPTIONS", ("none", "flash_attention_2", "cuda_graphs"))
    monkeypatch.setattr(step_options, "chosen", lambda settings: (("tiny",), (16,), 2))
    monkeypatch.setattr(graphs, "CudaRecorder", CpuRecorder)
    monkeypatch.setattr(attention, "find_spec", lambda name: None)


@pytest.mark.usefixtures("replayed")
def test_steps_with_options_on_a_card(called_cuda):
    before = CpuRecorder.replays
    options, parts = step_options.tables(Settings(device="cuda", quick=True))
    assert CpuRecorder.replays > before
    assert [row["option"] for row in options.rows] == ["none", "flash_attention_2", "cuda_graphs"]
    none, flash, replays = options.rows
    assert none["time, of none"]["median"] == 1
    assert none["peak, of none"] == 1
    assert "needs the package flash-attn, or kernels" in flash["why not"]
    assert [flash["a step, s"], flash["time, of none"], flash["card busy, %"]] == [None] * 3
    assert replays["time, of none"]["median"] > 0
    assert replays["why not"] == ""
    assert parts.rows == []  # this torch cannot trace a card
    assert "no trace of a card could be had" in parts.notes


@pytest.mark.usefixtures("replayed")
def test_an_option_that_computes_another_loss_is_not_timed(called_cuda, monkeypatch):
    losses = iter([5.0, 5.2])
    monkeypatch.setattr(step_options, "measured", lambda *a, **k: answer(loss=next(losses)) | {"parts": {}})
    with pytest.raises(WrongAnswer, match="cuda_graphs: the loss of the first step is 5.2, without it 5.0"):
        step_options.tables(Settings(device="cuda", quick=True))


@pytest.mark.usefixtures("replayed")
def test_parts_of_a_step_are_named_where_they_are_large(called_cuda, monkeypatch):
    parts = iter([{"attention": 0.5, "element by element": 0.47, "optimizer": 0.03}, {"attention": 0.6}])
    monkeypatch.setattr(step_options, "measured", lambda *a, **k: answer() | {"parts": next(parts)})
    _, table = step_options.tables(Settings(device="cuda", quick=True))
    assert [(row["option"], row["part"], row["share, %"]) for row in table.rows] == [
        ("none", "attention", 50), ("none", "element by element", 47), ("none", "optimizer", 3),
        ("cuda_graphs", "attention", 100),
    ]  # fmt: skip
    named = "over 5 % of the time on the card: none: attention, element by element; cuda_graphs: attention"
    assert named in table.notes


def test_an_option_whose_process_ends_is_named(monkeypatch):
    class Ends(InProcess):
        def ask(self, **question):
            raise RuntimeError("step_options ended with -9:\nKilled")

    monkeypatch.setattr(step_options, "Process", Ends)
    settings = Settings(quick=True)
    assert step_options.asked("tiny", 16, "cuda_graphs", 1, settings) == "ended: Killed"
    with pytest.raises(RuntimeError, match="Killed"):
        step_options.asked("tiny", 16, "none", 1, settings)


# ---- the command ----


def test_clocks_and_seconds_reach_the_case(monkeypatch):
    seen = []
    monkeypatch.setattr(__main__, "run", lambda name, settings, *rest: seen.append((name, settings)) or True)
    assert __main__.main(["lora", "--quick", "--device", "cpu"]) == 0
    assert __main__.main(["lora", "--clocks", "saturated", "--seconds", "90", "--quick", "--device", "cpu"]) == 0
    assert seen[0][1] == Settings(quick=True)
    assert seen[1][1] == Settings(quick=True, clocks=(SATURATED,), seconds=90.0)


def test_on_a_card_lora_shows_its_tables(monkeypatch):
    monkeypatch.setattr(lora_gpu, "tables", lambda settings: ["tables"])
    monkeypatch.setattr(lora, "small_adapters", lambda settings: "adapters")
    assert lora.run(Settings(device="cuda")) == ["tables", "adapters"]
    assert lora.run(Settings(device="cuda", seconds=9.0)) == ["tables"]
