"""The bench: what it measures with, what it prints, what it keeps. Its figures are not tested, its honesty is."""

import doctest
import importlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__
from bench.cases import absmax, adamw, converge, load, lora, nf4, optimizers, paging, perplexity, train
from bench.cases import eval as evaluation
from bench.harness import contenders, layers, prose, results, timing
from bench.harness.case import Settings, WrongAnswer, check_close, check_equal
from bench.harness.process import Process
from bench.harness.shapes import SHAPES, named
from bench.harness.table import Table, number, shown
from nf4lora import _C
from nf4lora.ops import reference
from nf4lora.ops.kernels import dispatch

from support.bits import assert_same_bits
from support.models import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parent.parent
QUICK = Settings(quick=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model of two layers and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def alone(monkeypatch):
    """A machine without bitsandbytes."""
    from bench.harness import case

    for module in (case, nf4, absmax, lora):
        monkeypatch.setattr(module, "installed", lambda package: False)


def bench(*arguments, cwd=ROOT, package="bench", **options):
    return subprocess.run(
        [sys.executable, "-m", package, *arguments], cwd=cwd, capture_output=True, text=True, check=False, **options
    )


# ---- timing ----


def test_contenders_take_turns_forwards_and_backwards(monkeypatch):
    called = []
    monkeypatch.setattr(timing, "timed", lambda call: call() or 0.1)
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    found = timing.alternate(calls, seconds=0, least=4)
    warming, rounds = called[:4], called[4:]
    assert warming == ["a", "b"] * 2
    assert rounds == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(timing_.seconds) for timing_ in found.values()] == [4, 4]


@pytest.mark.parametrize(("each", "rounds"), [(0.05, 10), (10.0, 5), (1e-6, 200)])
def test_rounds_fill_the_time_within_bounds(monkeypatch, each, rounds):
    monkeypatch.setattr(timing, "timed", lambda call: each)
    assert len(timing.alternate({"a": int, "b": int}, seconds=1.0)["a"].seconds) == rounds


class SlowHost:
    """A card in simulated time: a call takes the host `host` seconds to ask for, and the card `card` to do."""

    def __init__(self, monkeypatch, host, card):
        self.now, self.free_at, self.host, self.card = 0.0, 0.0, host, card
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: SlowHost.Event(self))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.work(cycles / 2e9))

    def work(self, seconds):
        self.free_at = max(self.free_at, self.now) + seconds

    def call(self):
        self.now += self.host
        self.work(self.card)

    class Event:
        def __init__(self, machine):
            self.machine = machine

        def record(self):
            self.at = max(self.machine.free_at, self.machine.now)

        def query(self):
            return self.machine.now >= self.at

        def synchronize(self):
            self.machine.now = max(self.machine.now, self.at)

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3


@pytest.mark.parametrize(("host", "card"), [(0.001, 0.0002), (0.0002, 0.001), (0.1, 0.001)])
def test_clocks_of_a_card(monkeypatch, host, card):
    found = {}
    for name, clock in timing.CLOCKS["cuda"].items():
        found[name] = clock(SlowHost(monkeypatch, host, card).call)
    assert found["alone"] == pytest.approx(host + card)
    assert found["in_a_row"] == pytest.approx(max(host, card), rel=0.11)  # of 50 calls the last, or the first
    assert found["saturated"] == pytest.approx(card)


@pytest.mark.parametrize(("name", "calls"), [("saturated", 8), ("in_a_row", 50), ("alone", 1)])
@pytest.mark.parametrize("card", [1e-5, 0.03])
def test_long_calls_are_called_less_often(monkeypatch, name, calls, card):
    machine, called = SlowHost(monkeypatch, 1e-6, card), []
    found = timing.alternate(
        {"a": lambda: called.append(1) or machine.call()},
        seconds=0, least=3, device="cuda", clock=timing.CLOCKS["cuda"][name],
    )["a"]  # fmt: skip
    a_sample = calls if card < 0.001 else min(calls, 2)
    assert len(called) == 2 + 3 * a_sample  # two calls warm up, whatever the clock
    assert found.median == pytest.approx(card, rel=0.2)


def test_rounds_count_the_calls_of_a_sample(monkeypatch):
    machine = SlowHost(monkeypatch, 1e-6, 1e-3)
    clock = timing.CLOCKS["cuda"]["in_a_row"]
    took = timing.alternate({"a": machine.call}, seconds=0.4, device="cuda", clock=clock)["a"]
    assert len(took.seconds) == 20  # of 20 calls and 20 ms each


def test_the_card_waits_as_long_as_the_host_needs(monkeypatch):
    machine, waits = SlowHost(monkeypatch, 1e-3, 1e-6), []
    sleep = torch.cuda._sleep
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: waits.append(cycles) or sleep(cycles))
    timing.alternate({"a": machine.call}, seconds=0, device="cuda", clock=timing.CLOCKS["cuda"]["saturated"])
    assert len(waits) == 5  # one for each sample: none was too short, as the latency told


def test_what_happens_between_the_rounds(monkeypatch):
    order = []
    monkeypatch.setattr(timing, "timed", lambda call: call() or 0.1)
    calls = {"a": lambda: order.append("a")}
    timing.alternate(calls, seconds=0, least=2, between=lambda: order.append("look"))
    assert order == ["a", "a", "look", "a", "look", "a", "look"]


def test_a_host_that_never_gets_ahead_is_an_error(monkeypatch):
    machine = SlowHost(monkeypatch, 0.001, 0.001)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    with pytest.raises(RuntimeError, match="could not get ahead"):
        timing.CLOCKS["cuda"]["saturated"](machine.call)


def test_a_ratio_is_taken_within_a_round():
    # The machine slowed down threefold halfway: the ratio does not notice, the medians' would.
    ours, theirs = timing.Timing([1.0, 1.0, 3.0]), timing.Timing([2.0, 6.0, 6.0])
    assert theirs.over(ours)["median"] == 2.0
    assert theirs.median / ours.median == 6.0


def test_a_spread_stays_within_what_was_measured():
    assert timing.spread([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
    found = timing.spread([1.0, 2.0])
    assert 1.0 <= found["low"] <= found["median"] <= found["high"] <= 2.0


def test_copies_exceed_the_cache_twice():
    for nbytes in (1 << 20, 5 << 20, 31 << 20):
        assert timing.copies(nbytes, 32 << 20) * nbytes > 64 << 20
    assert timing.copies(1 << 40, 32 << 20) == 2
    assert timing.copies(1, 32 << 20) == timing.MOST_COPIES
    turn = timing.rotation(lambda index: index, timing.last_cache())
    assert [next(turn) for _ in range(4)] == [0, 1, 2, 0]


def test_our_own_work_is_not_somebody_elses(monkeypatch):
    busy, own = iter([100.0, 100.5]), iter([10.0, 10.5])
    monkeypatch.setattr(timing, "busy_seconds", lambda: next(busy))
    monkeypatch.setattr(timing, "own_seconds", lambda: next(own))
    with timing.Watch() as watch:
        pass
    assert watch.record()["cores_used_by_others"] == 0
    assert timing.warning(watch.record()) is None


def test_somebody_elses_work_is_a_warning(monkeypatch):
    clock, busy = iter([0.0, 10.0]), iter([100.0, 115.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(timing, "busy_seconds", lambda: next(busy))
    monkeypatch.setattr(timing, "own_seconds", lambda: 10.0)
    with timing.Watch() as watch:
        pass
    assert watch.record()["cores_used_by_others"] == 1.5
    assert "1.5 of" in timing.warning(watch.record())


@pytest.mark.parametrize(("case", "warned"), [("train", True), ("converge", False), ("perplexity", False)])
def test_only_a_time_suffers_from_somebody_else(case, warned):
    record = {
        "case": case,
        "question": "?",
        "environment": {},
        "seconds": 1.0,
        "load_average": [1.0, 2.0],
        "cores_used_by_others": 0.5,
        "tables": [],
    }
    assert ("**Warning**" in results.case_text(record, {})) == warned


def test_a_high_load_before_anything_ran_is_a_warning(monkeypatch):
    monkeypatch.setattr(timing.os, "getloadavg", lambda: (3.2, 0, 0))
    assert "load average 3.2" in timing.warning_before()
    monkeypatch.setattr(timing.os, "getloadavg", lambda: (0.1, 0, 0))
    assert timing.warning_before() is None


# ---- tables and results ----


def test_table_renders():
    rows = [{"layer": "q", "ms": {"median": 1.0, "low": 0.5, "high": 2.0}}, {"layer": "k", "ms": None}]
    text = Table("Speed", rows, ["a note"], [("fast", True), ("faster", False)]).markdown()
    assert text.splitlines() == [
        "**Speed**",
        "",
        "| layer | ms                |",
        "|-------|-------------------|",
        "| q     | 1.00 (0.500-2.00) |",
        "| k     | -                 |",
        "",
        "- met: fast",
        "- **missed**: faster",
        "- a note",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (12.345, "12.3"),
        (123.45, "123"),
        (98765.4, "98765"),
        (-0.05, "-0.0500"),
        (0.000123, "0.000123"),
        (1.5e9, "1.5e+09"),
    ],
)
def test_numbers_have_three_significant_digits(value, text):
    assert number(value) == text
    assert shown(value) == text


def record(case="nf4", commit="abc", others=0.0):
    about = {
        **{"device": "Some CPU", "cpu": "Some CPU", "cuda": None, "instruction_set": "avx2", "threads": 2},
        **{"nf4lora": "1", "torch": "2", "transformers": "5", "peft": "0", "bitsandbytes": None, "commit": commit},
    }
    return {
        **{"case": case, "question": "How fast?", "quick": False, "environment": about, "seconds": 12.0},
        **{"load_average": [0.1, 1.9], "cores_used_by_others": others},
        "tables": [Table(f"Speed of {case}", [{"ms": 1.0}], ["warm"], [("fast", True)]).to_dict()],
    }


def test_keeping_a_case_leaves_the_others(tmp_path):
    for each in (record("nf4"), record("lora"), record("nf4", commit="def")):
        path = results.keep(each, tmp_path)
    assert path.name == "some-cpu-avx2-2-threads.json"
    kept = json.loads(path.read_text())["cases"]
    assert [(name, each["environment"]["commit"]) for name, each in kept.items()] == [("nf4", "def"), ("lora", "abc")]


def test_the_pages_are_written_anew(tmp_path):
    page, folder = tmp_path / "README.md", tmp_path / "results"
    page.write_text(f"before\n{results.START}\nold figures\n{results.END}\nafter\n")
    assert results.write(page, folder) == []
    assert "None recorded" in page.read_text()
    results.keep(record("nf4"), folder)
    (path,) = results.write(page, folder)[:1]
    results.keep(record("lora", others=1.2), folder)
    results.write(page, folder)
    text, of_device = page.read_text(), path.with_suffix(".md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old figures" not in text
    assert "None recorded" not in text
    assert [line.split("|")[2:5] for line in text.splitlines() if "Some CPU" in line] == [
        [" nf4  ", " fast   ", " met |".removesuffix("|")],
        [" lora ", " fast   ", " met |".removesuffix("|")],
    ]
    assert f"](results/{path.stem}.md)" in text
    assert of_device.index("Speed of nf4") < of_device.index("Speed of lora")
    assert of_device.count("**Warning**") == 1
    results.write(page, folder)
    assert page.read_text() == text


def test_a_target_that_is_missed_is_shown_as_such(tmp_path):
    page, missed = tmp_path / "README.md", record("nf4")
    page.write_text(f"{results.START}{results.END}")
    missed["tables"][0]["targets"] = [("fast, got slow", False)]
    results.keep(missed, tmp_path)
    results.write(page, tmp_path)
    assert "| fast, got slow | **missed** |" in page.read_text()


def test_what_is_committed_is_what_the_results_say(tmp_path):
    copied = shutil.copytree(ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    results.write(copied / "README.md", copied / "results")
    for page in (Path("README.md"), *(path.relative_to(copied) for path in copied.glob("results/*.md"))):
        assert (copied / page).read_text() == (ROOT / "bench" / page).read_text(), (
            f"run python -m bench --table: {page}"
        )
    text = (ROOT / "bench/README.md").read_text()
    assert len((text.split(results.START)[0] + text.split(results.END)[1]).splitlines()) < 100  # without the targets


def test_a_page_without_markers_is_refused(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("mine")
    with pytest.raises(ValueError, match="markers"):
        results.write(page, tmp_path)
    assert page.read_text() == "mine"


def test_the_readme_has_the_markers_and_every_case():
    text = results.README.read_text()
    assert text.count(results.START) == text.count(results.END) == 1
    for name in __main__.CASES:
        assert f"| {name} |" in text


# ---- cases ----


def test_list_of_cases_is_complete():
    modules = {path.stem for path in (ROOT / "bench/cases").glob("*.py") if "QUESTION =" in path.read_text()}
    cases = (*__main__.CASES, *__main__.EXPLICIT)
    assert set(cases) == modules
    assert len(cases) == len(modules)
    for name in cases:
        module = __main__.case(name)
        assert module.QUESTION.endswith("?")
        assert callable(module.run)


def test_bench_imports_itself_relatively():
    for path in (ROOT / "bench").rglob("*.py"):  # the same files are nf4lora.bench where they are installed
        for line in path.read_text().splitlines():
            assert not line.strip().startswith(("import bench", "from bench", "from nf4lora.bench")), path.name


def test_shapes_are_legal():
    assert all(shape.K % 64 == 0 for shape in SHAPES)
    assert named("Llama-3.1-8B gate, up")[0].weights == 14336 * 4096


@pytest.mark.slow
def test_quick_run_prints_tables_and_keeps_nothing():
    before = sorted(results.FOLDER.glob("*")) if results.FOLDER.is_dir() else []
    done = bench("nf4", "--quick", timeout=120)
    assert done.returncode == 0, done.stderr
    assert "**Packing bf16 to NF4 and back" in done.stdout
    assert "**Round trip of N(0, 1)" in done.stdout
    assert (sorted(results.FOLDER.glob("*")) if results.FOLDER.is_dir() else []) == before


@pytest.mark.slow
def test_it_runs_as_a_part_of_another_package(tmp_path):
    shutil.copytree(ROOT / "bench", tmp_path / "elsewhere/bench", ignore=shutil.ignore_patterns("__pycache__"))
    done = bench("absmax", "--quick", "--json", "out.jsonl", cwd=tmp_path, package="elsewhere.bench", timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.jsonl").read_text())["case"] == "absmax"


def test_json_line_holds_what_the_figures_depend_on(tmp_path, capsys):
    def not_json(constant):
        raise AssertionError(f"{constant} is no JSON")

    path = tmp_path / "out.jsonl"
    for _ in range(2):
        assert __main__.main(["absmax", "--quick", "--json", str(path), "--device", "cpu"]) == 0
    lines = [json.loads(line, parse_constant=not_json) for line in path.read_text().splitlines()]
    assert len(lines) == 2
    assert lines[0].keys() >= {"case", "question", "quick", "environment", "seconds", "load_average", "tables"}
    assert lines[0]["quick"] is True
    about = lines[0]["environment"]
    for key in ("device", "cpu", "instruction_set", "threads", "torch", "bitsandbytes", "nf4lora", "commit"):
        assert key in about
    printed = "\n\n".join(Table(**table).markdown() for table in lines[1]["tables"])
    assert printed in capsys.readouterr().out


def test_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["nf5"])
    assert stop.value.code == 2
    assert "case must be one of nf4, absmax" in capsys.readouterr().err


def test_a_wrong_answer_is_not_timed(monkeypatch, capsys):
    right = reference.nf4_quantize
    monkeypatch.setattr(reference, "nf4_quantize", lambda *a: (right(*a)[0] ^ 1, right(*a)[1]))
    monkeypatch.setattr(nf4, "alternate", lambda *a, **k: pytest.fail("timed"))
    assert __main__.main(["nf4", "--quick", "--device", "cpu"]) == 1
    assert "the answer is wrong" in capsys.readouterr().err


def test_comparisons_catch_what_they_are_for():
    check_equal("same", torch.arange(3), torch.arange(3))
    with pytest.raises(WrongAnswer, match="1 of 3"):
        check_equal("other", torch.tensor([0, 1, 3]), torch.arange(3))
    check_close("near", torch.tensor([1.0, 100.5]), torch.tensor([1.0, 100.0]), 0.01)
    for wrong in ([1.0, 102.0], [1.0, float("nan")]):
        with pytest.raises(WrongAnswer):
            check_close("far", torch.tensor(wrong), torch.tensor([1.0, 100.0]), 0.01)


def test_absent_rival_is_named(alone):
    for table in (nf4.speed(QUICK), absmax.run(QUICK)[0]):
        assert "bitsandbytes is absent: not compared with" in table.notes
        assert all(row[key] is None for row in table.rows for key in row if "bitsandbytes" in key)


def test_absent_model_is_no_failure(tmp_path, capsys):
    assert __main__.main(["train", "converge", "optimizers", "perplexity", "--quick", "--model", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("python examples/smollm2.py makes it") == 4


@pytest.mark.usefixtures("alone")
def test_layer_is_measured_forwards_and_backwards(monkeypatch):
    monkeypatch.setattr(timing, "last_cache", lambda device="cpu": 1 << 16)
    (row,) = lora.rows_of(SHAPES[1], (4,), QUICK)
    assert row["forward"]["GFLOP/s"] > 0
    assert row["both"]["torch / ours"]["median"] > 0
    assert row["both"]["bitsandbytes / ours"] is None


def test_layer_that_forgets_its_adapter_is_caught():
    weight = (torch.randn(192, 576) * 0.02).bfloat16()

    def layer():
        return layers.with_lora(lora.NF4Linear.from_linear(layers.linear(weight)))

    lora.check_answers(SHAPES[1], {"nf4lora": layer}, "both")
    right = reference.lora_linear
    with pytest.MonkeyPatch.context() as patch, pytest.raises(WrongAnswer):
        patch.setattr(reference, "lora_linear", lambda *a, lora_B, **k: right(*a, lora_B=2 * lora_B, **k))
        lora.check_answers(SHAPES[1], {"nf4lora": layer}, "forward")


def test_a_way_is_taken_for_its_own_call_only():
    seen = []

    def call(x):
        seen.append(dispatch.forced())
        return x + 1

    name = dispatch.KERNELS[-1]
    taken = layers.taking(name, call)
    assert taken(1) == 2
    assert seen == [name]
    assert dispatch.forced() is None
    with pytest.raises(TypeError):
        taken(None)  # fails within
    assert seen == [name, name]
    assert dispatch.forced() is None


@pytest.mark.parametrize(
    "name",
    [f"{path.parent.name}.{path.stem}" for path in sorted((ROOT / "bench").glob("*/*.py")) if path.stem[0] != "_"],
)
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"bench.{name}")
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


def test_all_of_a_small_adapter_arrives():
    (*_, large) = rows = lora.small_adapters(QUICK).rows
    assert large["arrives, nf4lora, %"] == pytest.approx(100, abs=1)
    assert rows[2]["arrives, nf4lora, %"] == pytest.approx(100, abs=5)
    if "arrives, bitsandbytes + PEFT, %" in large:
        assert large["arrives, bitsandbytes + PEFT, %"] == pytest.approx(100, abs=1)


# ---- whole models ----


@pytest.mark.slow
def test_processes_take_turns(tmp_path, tiny):
    common = {"folder": tiny, "checkpointing": False, "device": "cpu", "batch": 1, "length": 16}
    with Process("train", name=contenders.SIXTEEN, **common) as process:
        losses = [next(process)["loss"] for _ in range(3)]
        assert len(set(losses)) == 3
    assert process.child.returncode == 0


@pytest.mark.slow
def test_a_process_that_dies_says_why(tmp_path):
    with (
        pytest.raises(RuntimeError, match=r"(?s)perplexity\(name=nf4lora.*nowhere"),
        Process("perplexity", name=contenders.OURS, folder=tmp_path / "nowhere", device="cpu", quick=True) as process,
    ):
        next(process)


NAMES = [contenders.OURS, contenders.RIVAL, contenders.KBIT, contenders.IN_BF16, contenders.SIXTEEN]


def test_contenders_start_from_the_same_adapter(tiny):
    pytest.importorskip("bitsandbytes")
    found = {}
    for name in NAMES:
        model = contenders.adapted(name, tiny)
        found[name] = {key: value for key, value in model.named_parameters() if value.requires_grad}
        assert model.training
        assert all("lora_" in key for key in found[name])
        kinds = {value.dtype for value in found[name].values()}
        assert kinds == {torch.bfloat16 if name == contenders.IN_BF16 else torch.float32}
    for key, ours in found[contenders.OURS].items():
        for theirs in (found[contenders.RIVAL][key], found[contenders.SIXTEEN][key]):
            assert_same_bits(ours, theirs)
            assert bool(ours.any()) == ("lora_A" in key)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_step_trains(tiny, checkpointing):
    steps = train.contender(contenders.OURS, tiny, checkpointing, "cpu", batch=2, length=32)
    found = [next(steps) for _ in range(2)]
    assert found[0]["loss"] != found[1]["loss"]
    assert found[1]["peak"] > 1e8
    assert found[1]["seconds"] > 0


def test_another_loss_is_a_wrong_answer():
    class Fake:
        name = "fake"

        def __init__(self, loss):
            self.loss = loss

        def __next__(self):
            return {"loss": self.loss}

    with pytest.raises(WrongAnswer, match="loss of the first step"):
        train.taking_turns(Fake(3.0), Fake(11.0), 1)
    ours, theirs = train.taking_turns(Fake(3.0), Fake(3.01), 4)
    assert [len(ours), len(theirs)] == [4, 4]


def test_answers_alone_are_trained():
    tokenizer = tiny_tokenizer()
    path = ROOT / "examples/tickets/valid.jsonl"
    answer = json.loads(path.read_text().splitlines()[0])["messages"][-1]["content"]
    ids, labels = converge.encoded(path, tokenizer)[0]
    assert len(ids) == len(labels)
    trained = tokenizer.decode([token for token in labels if token != -100])
    assert trained == f"{answer}<|im_end|>\n"


def test_held_out_loss_does_not_depend_on_the_padding(tiny):
    model = contenders.load(contenders.SIXTEEN, tiny).float()
    rows = [([5, 6, 7, 8], [-100, 6, 7, 8]), ([9] * 40, [-100] * 20 + [9] * 20)]
    together = converge.held_out_loss(model, rows, "cpu")
    apart = [converge.held_out_loss(model, [row], "cpu") for row in rows]
    assert together == pytest.approx((3 * apart[0] + 20 * apart[1]) / 23, rel=1e-5)


def test_converging_is_measured(tiny):
    (found,) = converge.contender(contenders.OURS, tiny, ROOT / "examples/tickets", "cpu", evaluated=[0, 1])
    before, after = found["held_out"]
    assert len(found["losses"]) == 1
    assert after < before


def test_perplexity_of_a_model_that_knows_nothing_is_about_its_vocabulary(tiny):
    (found,) = perplexity.contender(contenders.SIXTEEN, tiny, "cpu", quick=True)
    for losses in found.values():
        assert len(losses) == 2 * 63
        assert 200 < math.exp(sum(losses) / len(losses)) < 350  # of 259 tokens


def test_difference_comes_with_its_standard_error():
    ours, theirs = [1.0, 1.1, 1.0, 1.1], [1.0, 1.0, 1.0, 1.0]
    percent, error = perplexity.beside(ours, theirs)
    assert percent == pytest.approx(100 * (math.exp(0.05) - 1))
    assert error == pytest.approx(100 * 0.0577350 / 2, rel=1e-4)


def test_the_story_is_long_enough_and_whole(tiny):
    ids = prose.tokens(tiny)
    assert tiny_tokenizer().decode(ids) == prose.TEXT.read_text(encoding="utf-8")
    assert len(prose.TEXT.read_text(encoding="utf-8").split()) > 3000
    assert prose.batches(tiny, 4, 256)[0].shape == (4, 256)


def test_model_to_load_has_its_largest_tensors_in_linear_layers(tmp_path):
    largest, total, shards = load.write_model(tmp_path, quick=True)
    assert shards > 1
    assert largest == 256 * 1024 * 2
    assert total == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) - sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little") for path in tmp_path.glob("*.safetensors")
    )


class InProcess:
    """Process without a process: the contender runs here."""

    def __init__(self, module, **arguments):
        self.name, self.steps = module, __main__.case(module).contender(**arguments)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.steps.close()

    def __next__(self):
        self.start()
        return self.result()

    def ask(self, **question):
        self.start(question)
        return self.result()

    def start(self, question=None):
        self.yielded = self.steps.send(question)

    def result(self):
        return json.loads(json.dumps(self.yielded))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "converge", "perplexity"])
def test_case_of_a_whole_model(name, tiny, monkeypatch):
    module = __main__.case(name)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "Process", InProcess)
    monkeypatch.setattr(module, "without", lambda package: [f"{package} is absent: not compared with"])
    for table in module.run(Settings(quick=True, model=tiny)):
        assert "bitsandbytes is absent: not compared with" in table.notes
        assert not table.targets
        assert any(contenders.OURS in row.values() or "ours, s" in row for row in table.rows)
        assert Table(**json.loads(json.dumps(table.to_dict()))).markdown() == table.markdown()


@pytest.mark.slow
def test_optimizers_begin_alike(tiny, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(converge, "Process", InProcess)
    (table,) = optimizers.run(Settings(quick=True, model=tiny))
    assert [row["optimizer"] for row in table.rows] == list(converge.OPTIMIZERS)
    assert len({row["held-out loss at 1"] for row in table.rows}) == 1  # no moment has been rounded yet
    assert not table.targets


def test_adamw_without_bitsandbytes_and_against_a_wrong_answer(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adamw, "installed", lambda package: False)
    step, sets, small, disk, drift = adamw.run(QUICK)
    assert drift.rows
    assert [row["bitsandbytes / ours"] for row in step.rows] == [None, None]
    assert [row["instruction set"] for row in sets.rows] == _C.cpu_instruction_sets()
    assert [row["tensors"] for row in small.rows] == [1, 64, 420]
    assert not step.targets + disk.targets  # quick sizes promise nothing
    monkeypatch.setattr(adamw.reference, "adamw_step", lambda *given, **numbers: given)
    with pytest.raises(WrongAnswer, match="adamw_step_, param: 5000 of 5000 values differ"):
        adamw.run(QUICK)


def test_what_adamw_is_held_to(monkeypatch):
    def row(ratio32, ratio8, rate32, rate8, state):
        found = {"dtype": "float32", "8 bits, state": state, "32 bits, GB/s": rate32, "8 bits, GB/s": rate8}
        return found | {f"{b} bits, fused / ours": {"median": r} for b, r in ((32, ratio32), (8, ratio8))}

    assert adamw.cpu_targets([row(1.0, 0.84, 0, 0, 2.05)]) == [
        ("float32, 32 bits: at most 1.0 of the time of torch's fused, got 1.00", True),
        ("float32, 8 bits: at most 1.2 of the time of torch's fused, got 1.19", True),
        ("8 bits: at most 2.05 bytes of state per value, got 2.05", True),
    ]
    assert [met for _, met in adamw.cpu_targets([row(0.99, 0.83, 0, 0, 2.06)])] == [False] * 3

    card = SimpleNamespace(memory_clock_rate=2_500_000, memory_bus_width=8 * 1000)  # 5 TB/s
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert adamw.card_targets([row(1, 1, 4250, 4240, 2)]) == [
        ("float32, 32 bits: at least 85 % of 5.00 TB/s, got 85.0%", True),
        ("float32, 8 bits: at least 85 % of 5.00 TB/s, got 84.8%", False),
    ]
    del card.memory_bus_width  # an older torch does not tell
    assert adamw.card_targets([row(1, 1, 4250, 4240, 2)]) == []


def test_what_a_file_is_held_to():
    met, missed = ({"bits": 8, "plain / ours": {"median": ratio}} for ratio in (1.0, 0.99))
    assert paging.of_disk(met) == ("8 bits: at least the speed of plain write and read, got 1.00", True)
    assert paging.of_disk(missed) == ("8 bits: at least the speed of plain write and read, got 0.99", False)


@pytest.mark.slow
def test_an_evaluation_changes_no_gradient_of_ours():
    (table,) = evaluation.run(QUICK)
    assert table.rows[0]["gradients that changed"] == 0
    assert table.rows[0]["adapter tensors"] == 28
    assert table.targets[0][1]


@pytest.mark.parametrize(
    ("sets", "repacked", "said"),
    [(["avx2"], 0, "this processor has no avx512bf16"), (["avx512bf16"], 14, "a gradient of zero to the layer's input"),
     (["avx512bf16"], 0, "repacked nothing")],
)  # fmt: skip
def test_what_an_evaluation_does_to_bitsandbytes_is_said_for_this_processor(monkeypatch, sets, repacked, said):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(_C, "cpu_instruction_sets", lambda: sets)
    (note,) = evaluation.notes_on_rival([{"contender": contenders.RIVAL, "layers repacked": repacked}])
    assert said in note
    assert evaluation.notes_on_rival([{"contender": contenders.OURS}]) == []


@pytest.mark.slow
def test_loading_is_watched_from_outside():
    (table,) = load.run(QUICK)
    ours = table.rows[0]
    assert ours["before, MB"] < ours["final, MB"] <= ours["peak, MB"]
    assert table.targets[0][1]
