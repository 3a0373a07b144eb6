"""heuristics.json: a kernel for every card and shape, each with its reason; and bench.tune, which measures it."""

import itertools
import json
import math
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import __main__
from bench.cases import tune
from bench.cases.tune import Time, rules_from
from bench.harness import heuristics, results, timing
from bench.harness.case import Absent, Settings, WrongAnswer
from bench.harness.shapes import Shape
from nf4lora.ops.kernels import dispatch
from nf4lora.ops.kernels.dispatch import Rule, kernel_for

ROOT = Path(__file__).parent.parent
RULES = heuristics.read_rules(dispatch.HEURISTICS)
CARDS = sorted({rule.architecture for rule in RULES})
SMALL, LARGE = 2**22, 2**22 + 1
NONE = 10**9  # tokens: any number


@pytest.fixture(autouse=True)
def rules_of_the_library():
    """What a test hands over to the kernels goes with it."""
    yield
    dispatch.hand_over(dispatch.rules())


# ---- the table ----


@pytest.mark.parametrize("card", [*CARDS, "3.5"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_card_has_an_answer_for_every_shape(card, direction):
    for tokens, weights in itertools.product([0, 1, 16, 17, 127, 128, 2047, 2048, 2**20], [0, 1, SMALL, LARGE, 2**32]):
        assert kernel_for(card, direction, tokens, weights) in dispatch.KERNELS


@pytest.mark.parametrize(
    ("card", "fused"),
    [("8.0", 255), ("8.6", 511), ("8.9", 511), ("9.0", 63), ("10.0", 127), ("12.0", 511), ("3.5", 511)],
)
def test_limits_are_where_they_were_derived(card, fused):
    if (card if card in CARDS else "*") not in {r.architecture for r in RULES if r.why.startswith("derived")}:
        pytest.skip("measured since")
    for tokens, kernel in ((1, "few"), (16, "few"), (17, "fused"), (fused, "fused"), (fused + 1, "dense")):
        assert kernel_for(card, "forward", tokens, LARGE) == kernel
    for tokens, kernel in ((1, "fused"), (fused, "fused"), (fused + 1, "dense"), (NONE, "dense")):
        assert kernel_for(card, "backward", tokens, LARGE) == kernel
    assert kernel_for(card, "forward", 16, SMALL) == "few"
    assert kernel_for(card, "forward", fused, SMALL) == kernel_for(card, "backward", fused, SMALL) == "fused"
    assert kernel_for(card, "forward", NONE, SMALL) == kernel_for(card, "backward", NONE, SMALL) == "dense"


def test_table_names_what_cuda_can_take():
    assert set(dispatch.CHOICES["forward"]) | set(dispatch.CHOICES["backward"]) == set(dispatch.KERNELS)
    for rule in RULES:  # few takes no more; the others take any number
        assert rule.kernel != "few" or rule.most_tokens <= dispatch.FEW_ROWS
        limit = rule.most_tokens or 4096
        assert dispatch.fits(rule.kernel, rule.direction, limit, torch.bfloat16, 64)


def test_every_reason_has_a_figure():
    for rule in RULES:
        assert rule.why.startswith(("predicted: ", "derived: ", "measured: ")), rule
        assert any(letter.isdigit() for letter in rule.why), rule


def test_file_has_a_line_for_each_rule():
    text = dispatch.HEURISTICS.read_text()
    assert text == heuristics.text(RULES)
    assert len(text.splitlines()) == len(RULES) + 2


# ---- what is refused ----

GOOD = [
    Rule("*", "forward", "few", 16, None, "4 us"),
    Rule("*", "forward", "fused", None, 64, "5 us"),
    Rule("*", "forward", "dense", None, None, "6 us"),
    Rule("*", "backward", "fused", None, None, "7 us"),
]


def refused(change, match):
    with pytest.raises(ValueError, match=rf"^heuristics\.json: .*{match}"):
        heuristics.check_rules(change)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kernel": "fast"}, "kernel must be one of few, fused, dense forward, got 'fast'"),
        ({"direction": "sideways"}, "direction must be one of forward, backward, got 'sideways'"),
        ({"direction": "backward"}, "kernel must be one of fused, dense backward, got 'few'"),
        ({"architecture": "sm_90"}, r"architecture must be a compute capability as '9\.0', or '\*', got 'sm_90'"),
        ({"architecture": 9.0}, r"architecture must be .*, got 9\.0"),
        ({"most_tokens": 0}, "most_tokens must be a positive integer or null, got 0"),
        ({"most_tokens": True}, "most_tokens must be a positive integer or null, got True"),
        ({"most_weights": 1.5}, r"most_weights must be a positive integer or null, got 1\.5"),
        ({"most_tokens": None}, "most_tokens must be a number for few, got None"),
        ({"why": " "}, "why must give a reason, got ' '"),
        ({"why": None}, "why must give a reason, got None"),
    ],
)
def test_rule_that_says_nothing_sensible_is_refused(change, match):
    heuristics.check_rules(GOOD)
    refused([replace(GOOD[0], **change), *GOOD[1:]], match)


def test_direction_must_end_with_an_answer_for_everything():
    end = r"the last rule of {}, and no other, must hold for any tokens and weights, got {}"
    refused(GOOD[:2] + GOOD[3:], end.format(r"\* forward", "16 tokens, None weights; None tokens, 64 weights"))
    refused(GOOD[:3], end.format(r"\* backward", "no rule"))
    refused([], end.format(r"\* forward", "no rule"))
    refused([GOOD[2], *GOOD], end.format(r"\* forward", "None tokens, None weights; 16 tokens"))  # nobody gets further
    own = [replace(rule, architecture="9.0") for rule in GOOD]
    heuristics.check_rules([*own, *GOOD])
    refused([*own[:3], *GOOD], end.format(r"9\.0 backward", "no rule"))
    refused(own, end.format(r"\* forward", "no rule"))  # what would another card take?


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "the table must be a list of rules, got dict"),
        (["few"], "a rule must have architecture, direction, .*, why, got 'few'"),
        ([{"kernel": "few"}], "a rule must have architecture, direction, .*, why, got kernel"),
    ],
)
def test_file_that_is_no_table_is_refused(tmp_path, content, match):
    path = tmp_path / "heuristics.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"^heuristics\.json: {match}$"):
        heuristics.read_rules(path)


# ---- rewriting ----


def of(architecture, fused=64):
    return [
        Rule(architecture, "forward", "fused", fused, None, "5 us"),
        Rule(architecture, "forward", "dense", None, None, "6 us"),
        Rule(architecture, "backward", "dense", None, None, "7 us"),
    ]


def test_rewriting_keeps_the_others(tmp_path):
    path = tmp_path / "heuristics.json"
    path.write_text(heuristics.text([*of("10.0"), *of("9.0"), *of("*")]))
    heuristics.rewrite(path, "9.0", of("9.0", 512))
    assert heuristics.read_rules(path) == [*of("9.0", 512), *of("10.0"), *of("*")]  # by number, not by letter
    heuristics.rewrite(path, "8.6", of("8.6", 100))
    heuristics.rewrite(path, "*", of("*", 7))
    assert heuristics.read_rules(path) == [*of("8.6", 100), *of("9.0", 512), *of("10.0"), *of("*", 7)]
    once = path.read_text()
    heuristics.rewrite(path, "8.6", of("8.6", 100))
    assert path.read_text() == once


def test_what_is_refused_is_not_written(tmp_path):
    path = tmp_path / "heuristics.json"
    path.write_text(heuristics.text(of("*")))
    for rules in (of("9.0")[:2], of("8.0"), [replace(rule, why="") for rule in of("9.0")]):
        with pytest.raises(ValueError, match=r"^heuristics\.json: "):
            heuristics.rewrite(path, "9.0", rules)
        assert heuristics.read_rules(path) == of("*")


def test_what_is_rewritten_counts_at_once(tmp_path):
    path = tmp_path / "heuristics.json"
    path.write_text(heuristics.text(of("*")))
    dispatch.hand_over(of("*"))
    assert kernel_for("9.0", "forward", 65, 1) == "dense"
    heuristics.rewrite(path, "9.0", of("9.0", 65))
    assert kernel_for("9.0", "forward", 65, 1) == "fused"


# ---- rules from times ----

TOKENS = tune.TOKENS
SHAPES = [(shape.N, shape.K) for shape in tune.SHAPES]


def measured(seconds, shapes=SHAPES):
    """Times by a formula: seconds(kernel, tokens, weights)."""
    return [
        Time(direction, N, K, M, {name: seconds(name, M, N * K) for name in kernels if name != "few" or M <= 16})
        for direction, kernels in dispatch.CHOICES.items()
        for N, K in shapes
        for M in TOKENS
    ]


def least(crossing):
    """fused up to `crossing` tokens, then dense; few up to 16; by a factor that grows with the distance."""

    def seconds(name, M, weights):
        one = 1e-12 * weights * (M + 100)
        return one * {"few": 0.7 if M <= 4 else 1.2, "fused": 1.0, "dense": (crossing / M) ** 0.3}[name]

    return seconds


def worst(times, rules):
    """How many times as long as the fastest way the chosen one takes, at worst, at the measured points."""
    table = dispatch.by_direction(rules)
    found = []
    for time in times:
        kernel = dispatch.first(table, rules[0].architecture, time.direction, time.tokens, time.N * time.K).kernel
        found.append(time.seconds[kernel] / min(time.seconds.values()))
    return max(found)


@pytest.mark.parametrize(("crossing", "limit"), [(512, 512), (700, 512), (0.01, None), (1e9, None)])
def test_rules_take_the_fastest_at_every_measured_point(crossing, limit):
    times = measured(least(crossing))
    rules = rules_from(times, "*", "a card, abc")
    heuristics.check_rules(rules)
    assert worst(times, rules) == 1  # exactly: all layers agree
    fused = [rule.most_tokens for rule in rules if rule.kernel == "fused"]
    assert fused == ([] if crossing < 1 else [limit] * len(fused))
    assert any(rule.kernel == "dense" for rule in rules) == (crossing < 1e6)
    assert all(rule.most_weights is None for rule in rules)  # small layers need none of their own


def test_measured_rules_are_those_of_kernel_for(tmp_path):
    path = tmp_path / "heuristics.json"
    path.write_text(heuristics.text(of("*")))
    dispatch.hand_over(of("*"))
    times = measured(least(512))
    heuristics.rewrite(path, "9.0", rules_from(times, "9.0", "a card, abc"))
    for time in times:
        kernel = kernel_for("9.0", time.direction, time.tokens, time.N * time.K)
        assert time.seconds[kernel] == min(time.seconds.values())


def test_small_layers_have_rules_of_their_own():
    def seconds(name, M, weights):
        return least(1e9 if weights <= tune.SMALL else 512)(name, M, weights)

    times = measured(seconds)
    rules = rules_from(times, "9.0", "a card, abc")
    heuristics.check_rules([*rules, *GOOD])
    assert worst(times, rules) == 1
    assert {rule.most_tokens for rule in rules if rule.kernel == "fused" and rule.most_weights} == {None}
    assert {rule.most_tokens for rule in rules if rule.kernel == "fused" and not rule.most_weights} == {512}
    assert max(N * K for N, K in SHAPES[:3]) <= tune.SMALL < min(N * K for N, K in SHAPES[3:])


def test_noise_does_not_move_a_limit_far():
    generator = random.Random(0)

    def seconds(name, M, weights):  # each time is off by up to 5 %
        return least(512)(name, M, weights) * generator.uniform(0.95, 1.05)

    for _ in range(20):
        times = measured(seconds)
        rules = rules_from(times, "*", "a card, abc")
        # At 256 and 1024 tokens the ways differ by 23 %, which 5 % on both cannot hide; at 512 they are equal.
        assert worst(times, rules) <= 1.05 / 0.95
        for rule in rules:
            assert rule.kernel != "fused" or rule.most_tokens in (256, 512)


STEP = "host or card, the longer"


def test_rules_count_host_or_card_whichever_is_longer():
    # few keeps the host longer, fused the card: the longer one of each is 3 and 4 at 8 tokens, 3 and 2 at 16.
    early, late = dispatch.CHOICES["forward"][:2]
    times = [
        Time("forward", 4096, 4096, 8, {early: 3.0, late: 2.0}, {early: 1.0, late: 4.0}),
        Time("forward", 4096, 4096, 16, {early: 3.0, late: 2.0}, {early: 1.0, late: 1.0}),
        Time("backward", 4096, 4096, 8, {dispatch.CHOICES["backward"][0]: 1.0}),
    ]
    first, second, _ = rules_from(times, "9.0", "a card")
    assert (first.kernel, first.most_tokens, second.kernel) == (early, 8, late)
    assert first.why == f"measured: {late} takes 1.33 times as long for 8 tokens; {STEP}; a card"
    (row, _) = tune.table_of("forward", times, [first, second]).rows
    assert (row[f"{late}, in a row, ms"], row[f"{late}, saturated, ms"], row["chosen / fastest"]) == (2e3, 4e3, 1)


def test_reason_states_what_was_measured():
    rules = rules_from(measured(least(512)), "9.0", "NVIDIA H100, abc123")
    few = next(rule for rule in rules if rule.kernel == "few")
    ratio = f"{1 / 0.7:.2f}"
    assert few.why == f"measured: fused takes {ratio} times as long for 1 to 4 tokens; {STEP}; NVIDIA H100, abc123"
    for rule in rules:
        assert rule.why.endswith("NVIDIA H100, abc123")
    last = next(rule for rule in rules if (rule.direction, rule.kernel) == ("backward", "dense"))
    low, high = (f"{(M / 512) ** 0.3:.2f}" for M in (1024, TOKENS[-1]))
    assert f"fused takes {low} to {high} times as long for 1024 to {TOKENS[-1]} tokens" in last.why


def test_a_kernel_outside_of_the_choices_is_measured_but_never_chosen(monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS", (*dispatch.KERNELS, "another"))
    times = [replace(time, seconds={**time.seconds, "another": 1e-12}) for time in measured(least(512))]
    assert rules_from(times, "9.0", "") == rules_from(measured(least(512)), "9.0", "")
    (forward,) = {
        table.title: table for table in [tune.table_of("forward", times, rules_from(times, "9.0", ""))]
    }.values()
    assert all(row["another, in a row, ms"] == 1e-9 and row["chosen / fastest"] == 1 for row in forward.rows)
    assert any(note.endswith("another") and "never chosen" in note for note in forward.notes)
    assert len(forward.rows) == len(SHAPES) * len(TOKENS)
    assert forward.rows[-1]["few, in a row, ms"] is None  # too many tokens
    assert "| chosen | chosen / fastest |" in forward.markdown()


# ---- the case ----


def test_tune_needs_a_gpu(capsys):
    with pytest.raises(Absent, match="^tune chooses .* CUDA device$"):
        tune.run(Settings())
    before = dispatch.HEURISTICS.read_text()
    assert __main__.main(["tune", "--quick", "--device", "cpu"]) == 0
    assert "not run: tune chooses between the kernels of a GPU" in capsys.readouterr().out
    assert dispatch.HEURISTICS.read_text() == before


def test_tune_runs_by_name_alone(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(__main__, "run", lambda name, *arguments: ran.append(name) or True)
    for arguments in ([], ["tune", "nf4"]):
        assert __main__.main([*arguments, "--quick", "--device", "cpu"]) == 0
    assert ran == [*__main__.CASES, "tune", "nf4"]
    assert "tune" not in __main__.CASES
    capsys.readouterr()
    assert __main__.main(["--list"]) == 0
    assert f"tune        {tune.QUESTION}" in capsys.readouterr().out


class Card:
    """A CPU that calls itself a card: everything runs but for the kernels, each of which is the CPU's."""

    def __init__(self, monkeypatch, folder):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
        monkeypatch.setattr(timing, "last_cache", lambda device="cpu": 1 << 16)
        monkeypatch.setattr(tune, "SHAPES", [Shape("tiny", "q", 64, 64), Shape("tiny", "down", 64, 128)])
        monkeypatch.setattr(tune, "TOKENS", (1, 16, 32))
        monkeypatch.setattr(tune, "times_of", self.times_of)
        monkeypatch.setattr(tune, "IN_REPOSITORY", True)
        monkeypatch.setattr(tune, "TOP", folder)
        self.path = folder / "python/nf4lora/ops/kernels/heuristics.json"
        self.path.parent.mkdir(parents=True)
        self.path.write_text(dispatch.HEURISTICS.read_text())
        monkeypatch.setattr(tune, "PATH", self.path)
        self.inner = TIMES_OF

    def times_of(self, shape, tokens, settings):
        return self.inner(shape, tokens, Settings(quick=True, device="cpu"))


TIMES_OF = tune.times_of


def test_what_was_measured_is_written_into_the_repository(monkeypatch, tmp_path):
    card = Card(monkeypatch, tmp_path)
    *times, rules = tune.run(Settings(device="cuda"))
    assert [table.title for table in times] == ["Forward", "Backward"]
    assert rules.title == "Rules of 9.0"
    assert rules.notes == ["written into python/nf4lora/ops/kernels/heuristics.json"]
    written = heuristics.read_rules(card.path)
    assert [Rule(**row) for row in rules.rows] == [rule for rule in written if rule.architecture == "9.0"]
    assert all("; A card, " in rule.why for rule in written if rule.architecture == "9.0")
    assert [r for r in written if r.architecture != "9.0"] == [r for r in RULES if r.architecture != "9.0"]


@pytest.mark.parametrize(("quick", "here"), [(True, True), (False, False)])
def test_nothing_is_written_without_a_repository_or_from_tiny_sizes(monkeypatch, tmp_path, capsys, quick, here):
    card = Card(monkeypatch, tmp_path)
    monkeypatch.setattr(tune, "QUICK", tune.SHAPES)
    monkeypatch.setattr(tune, "IN_REPOSITORY", here)
    *_, rules = tune.run(Settings(device="cuda", quick=quick))
    assert rules.notes[0].startswith("not written: ")
    assert card.path.read_text() == dispatch.HEURISTICS.read_text()
    printed = capsys.readouterr().out
    assert [Rule(**line) for line in json.loads(printed)] == [Rule(**row) for row in rules.rows]


def test_tune_is_kept_as_other_cases_are(monkeypatch, tmp_path):
    Card(monkeypatch, tmp_path)
    kept = []
    monkeypatch.setattr(results, "keep", lambda record: kept.append(record) or tmp_path)
    about = {"device": "A card", "commit": "abc"}
    assert __main__.run("tune", Settings(device="cuda"), about, None)
    (record,) = kept
    assert record["case"] == "tune"
    assert len(json.loads(json.dumps(record))["tables"]) == 3


def test_wrong_answer_is_not_timed(monkeypatch):
    monkeypatch.setattr(tune, "alternate", lambda *a, **k: pytest.fail("timed"))
    monkeypatch.setattr(timing, "last_cache", lambda device="cpu": 1 << 16)

    def taking(name, call):
        def taken(*arguments):
            first, *others = call(*arguments)
            return (first * (1.1 if name == "dense" else 1), *others)

        return taken

    monkeypatch.setattr(tune, "taking", taking)
    with pytest.raises(WrongAnswer, match="^dense, tiny q 64 x 64, 1 tokens, forward, result 0: off by"):
        tune.times_of(Shape("tiny", "q", 64, 64), (1,), Settings(quick=True))


def test_each_way_is_forced_while_it_is_timed(monkeypatch):
    monkeypatch.setattr(timing, "last_cache", lambda device="cpu": 1 << 16)
    seen = set()
    plain = torch.ops.nf4lora.lora_linear

    def watched(x, *arguments):
        seen.add((len(x), dispatch.forced()))
        return plain(x, *arguments)

    monkeypatch.setattr(torch.ops.nf4lora, "lora_linear", watched)
    times = tune.times_of(Shape("tiny", "q", 64, 64), (1, 32), Settings(quick=True))
    assert seen == {(1, name) for name in dispatch.KERNELS} | {(32, name) for name in dispatch.KERNELS if name != "few"}
    assert dispatch.forced() is None
    for time in times:
        assert set(time.seconds) == set(dispatch.KERNELS) - (
            {"few"} if time.tokens > 16 or "back" in time.direction else set()
        )
        for by_kernel in (time.seconds, time.saturated, time.alone):
            assert by_kernel.keys() == time.seconds.keys()
            assert all(math.isfinite(seconds) and seconds > 0 for seconds in by_kernel.values())


# ---- the wheel ----


def test_table_goes_where_the_library_goes():
    ignored = subprocess.run(
        ["git", "-C", str(ROOT), "check-ignore", "-q", "python/nf4lora/ops/kernels/heuristics.json"], check=False
    )
    if ignored.returncode == 0:
        pytest.fail("git ignores heuristics.json, and with it the wheel")
    assert (Path(dispatch.__file__).parent / "heuristics.json").is_file()
