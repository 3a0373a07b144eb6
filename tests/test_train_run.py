"""Whole runs on a tiny model: what is trained, counted and saved."""
# ruff: noqa: F811  (a package may be missing; fixtures are imported)

import json
import sys
from importlib.util import find_spec

import pytest

pytest.importorskip("trl")
import torch

from nf4lora.cli import main
from nf4lora.compat import trl
from nf4lora.train import optimizer, plot
from nf4lora.train.arguments.parse import parse_arguments
from nf4lora.train.batch import KNOWN
from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.guard import arrivals, check_arrivals
from nf4lora.train.trainer import Trainer

from support.train_runs import ROWS, adapter, base, check_use, data, equal, logged, losses, options, quick, train, user  # noqa: F401

PLOT_LOSS = plot.plot_loss


def test_run_learns_and_writes_what_it_promises(base, data, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("nf4lora.train.plot.plot_loss", PLOT_LOSS)
    out = tmp_path / "out"
    code, said = train(*options(base, data, out, "--val_size", "4", "--eval_steps", "3", "--save_steps", "3"))
    assert code == 0
    for name in (
        "adapter_model.safetensors", "adapter_config.json", "nf4lora.json", "tokenizer.json", "chat_template.jinja",
        "trainer_state.json", "train_results.json", "eval_results.json", "metrics.jsonl", "loss.png", "config.yaml",
        "checkpoint-3/optimizer.pt", "checkpoint-6/trainer_state.json",
    ):  # fmt: skip
        assert (out / name).is_file(), name
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == (base, 4)
    results = json.loads((out / "eval_results.json").read_text())
    assert results["eval_loss"] < results["eval_loss_before"] - 0.2
    assert f"loss {results['eval_loss_before']:.4f} -> {results['eval_loss']:.4f}" in said
    evaluated = [step for step, loss in logged(out, "step", "eval_loss") if loss is not None]
    assert evaluated == [0, 3, 6]
    record = logged(out, "percentage", "elapsed_time", "remaining_time", "throughput", "peak_memory", "learning_rate")[
        -2
    ]
    assert record[0] == 100
    assert record[2] == 0
    assert all(value is not None for value in record)
    for words in ("kernels", "packed codes", "trainable", "6 steps of 4 rows", "step 6/6 100%", "tok/s", "peak", "ETA"):
        assert words in said


@pytest.mark.parametrize("more", [(), ("--double_quant", "false"), ("--load_in_4bit", "false")])
def test_three_lines_of_the_summary_load_what_was_trained(base, data, tmp_path, more):
    check_use(train(*options(base, data, tmp_path / "out", *more))[1])


def test_seed_decides_everything(base, data, tmp_path):
    runs = {}
    for name, more in {"a": (), "b": ("--gradient_checkpointing", "false"), "c": ("--seed", "7")}.items():
        train(*options(base, data, tmp_path / name, "--max_steps", "2", "--lora_dropout", "0.2", *more))
        runs[name] = adapter(tmp_path / name)
    assert equal(runs["a"], runs["b"])  # recomputing draws the same dropout masks
    assert not equal(runs["a"], runs["c"])


def test_accumulated_batches_weigh_by_trained_tokens(base, data, tmp_path):
    # answers differ in length: a mean of the batches' means would be another loss and another gradient
    shapes = {"one batch": ("4", "1"), "four batches": ("1", "4")}
    for name, (size, batches) in shapes.items():
        train(*options(base, data, tmp_path / name, "--per_device_train_batch_size", size,
                       "--gradient_accumulation_steps", batches, "--max_steps", "3"))  # fmt: skip
    a, b = ([loss for (loss,) in losses(tmp_path / name, "loss")] for name in shapes)
    assert a == pytest.approx(b, rel=1e-5)  # float32 sums in another order
    a, b = (adapter(tmp_path / name) for name in shapes)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2e-3, atol=2e-5)  # Adam divides small gradients by small ones


def test_packed_rows_score_as_they_do_alone(base, data, tmp_path):
    for name, more in {"packed": ("--packing", "--max_length", "512"), "alone": ()}.items():
        common = ("--per_device_train_batch_size", "30", "--gradient_accumulation_steps", "1", "--max_steps", "2")
        train(*options(base, data, tmp_path / name, *common, *more))
    (packed, counted), (alone, expected) = (
        zip(*losses(tmp_path / name, "loss", "num_tokens"), strict=True) for name in ("packed", "alone")
    )
    assert packed == pytest.approx(alone, rel=1e-5)
    assert counted == expected


def test_attention_that_mixes_packed_rows_is_refused(base, data, tmp_path, monkeypatch):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling.torch_call

    def one_long_row(self, examples):
        batch = collate(self, examples)
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        return batch

    monkeypatch.setattr(DataCollatorForLanguageModeling, "torch_call", one_long_row)
    with pytest.raises(RunError, match="mixes the samples"):
        train(*options(base, data, tmp_path / "out", "--packing", "--max_length", "256"))


@pytest.mark.parametrize("plain_head", [True, False], ids=["ours", "TRL"])
def test_loss_counts_exactly_the_labelled_tokens(base, data, tmp_path, monkeypatch, plain_head):
    seen = []
    compute = Trainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        self.plain_head = plain_head
        with torch.no_grad():
            logits = model(**{name: each for name, each in inputs.items() if name not in ("labels", KNOWN)}).logits
            expected = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), inputs["labels"][:, 1:].flatten(), reduction="sum"
            )
        loss = compute(self, model, dict(inputs), *args, **kwargs)
        items = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        seen.append((loss.item() * int(items), expected.item()))
        text = self.processing_class.decode(inputs["input_ids"][inputs["labels"] != -100])
        assert set(text.split("<|im_end|>")) <= {"", *(answer for _, answer in ROWS)}
        return loss

    monkeypatch.setattr(Trainer, "compute_loss", spy)
    train(*options(base, data, tmp_path / "out", "--max_steps", "2"))
    assert len(seen) == 4
    for ours, expected in seen:
        assert ours == pytest.approx(expected, rel=1e-5)


def test_held_out_loss_is_the_mean_over_tokens(base, data, tmp_path):
    measured = []
    for size in ("1", "3"):
        out = tmp_path / size
        train(*options(base, data, out, "--val_size", "5", "--per_device_eval_batch_size", size, "--max_steps", "1"))
        measured.append(logged(out, "eval_loss")[0][0])
    assert measured[0] == pytest.approx(measured[1], rel=1e-6)


def test_loss_that_is_not_finite_stops_the_run(base, data, tmp_path, monkeypatch):
    def score(*arguments):
        return torch.full([1], float("nan"), requires_grad=True), torch.tensor([True])

    monkeypatch.setattr("nf4lora.train.trainer.score", score)
    with pytest.raises(RunError, match="the loss is nan in step 1"):
        train(*options(base, data, tmp_path / "out"))


def test_gradient_that_is_not_finite_stops_before_the_step(base, data, tmp_path, monkeypatch):
    step = Trainer.training_step

    def poisoned(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 2:
            next(p for n, p in model.named_parameters() if "lora_B" in n).grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    with pytest.raises(RunError, match=r"the gradient of .*lora_B.* is not finite in step 3"):
        train(*options(base, data, tmp_path / "out", "--save_steps", "1"))
    assert all(tensor.isfinite().all() for tensor in adapter(tmp_path / "out" / "checkpoint-2").values())


def test_adapter_without_a_gradient_is_named():
    def check_gradients(trainable):
        check_arrivals(trainable, {name: arrived.item() for name, arrived in arrivals(trainable).items()})

    trained, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    trained.grad, zero = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    zero.grad = torch.zeros(2)
    check_gradients([("a.lora_A.weight", zero), ("a.lora_B.weight", trained), ("experts.0.lora_B.weight", idle)])
    with pytest.raises(RunError, match=r"no gradient reaches b\.lora_B\.weight"):
        check_gradients([("a.lora_B.weight", trained), ("b.lora_B.weight", zero)])
    with pytest.raises(RunError, match=r"no gradient reaches b\.lora_A\.weight"):
        check_gradients([("b.lora_A.weight", idle)])


def test_errors_in_the_data_come_before_the_model(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nf4lora.train.model.load_model", lambda *a: pytest.fail("the model was loaded first"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n{"messages": 3}\n'
    )
    assert main.main(["train", *options(base, str(bad), tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "bad.jsonl: line 2: messages must be a list" in captured.err
    assert "Traceback" not in captured.err


def test_tensorboard_on_request(base, data, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    train(*options(base, data, out, "--max_steps", "1", "--report_to", "tensorboard"))
    assert list(out.glob("runs/*/events.out.tfevents.*"))


def test_nothing_is_reported_to_anyone(base, data, tmp_path, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *a, **k: pytest.fail("TRL sent telemetry"))
    assert train(*options(base, data, tmp_path / "out", "--max_steps", "1"))[0] == 0


def test_32_bits_end_where_torchs_adamw_ends(base, data, tmp_path):
    for name in ("adamw", "paged_adamw_32bit"):
        train(*options(base, data, tmp_path / name, "--optim", name))
    ours, torchs = adapter(tmp_path / "paged_adamw_32bit"), adapter(tmp_path / "adamw")
    for key, value in torchs.items():
        # torch's root errs by an ulp now and then; six steps of 1e-2 later that is far below a millionth
        assert (ours[key] - value).abs().max() < 1e-6


def test_the_optimizer_is_chosen_by_device_and_written_down(base, data, tmp_path):
    code, said = train(*options(base, data, tmp_path / "out"))
    assert code == 0
    assert ", adamw" in said
    assert parse_arguments([str(tmp_path / "out" / "config.yaml")]).optim == "adamw"
    config = parse_arguments(options(base, data, tmp_path / "other"))
    assert optimizer.choose(config, "cuda") == "paged_adamw_8bit"
    assert optimizer.choose(parse_arguments(options(base, data, tmp_path, "--optim", "adamw")), "cuda") == "adamw"


def test_state_can_lie_in_a_folder(base, data, tmp_path):
    pages = tmp_path / "pages"
    with pytest.raises(UsageError, match="pages is not a folder"):
        train(*options(base, data, tmp_path / "out", "--page_to", str(pages)))
    pages.mkdir()
    code, said = train(*options(base, data, tmp_path / "out", "--page_to", str(pages)))
    assert code == 0
    assert ", paged_adamw_32bit" in said
    assert "of state (file)" in said
    assert list(pages.iterdir()) == []
    with pytest.raises(UsageError, match="page_to .* is for the CPU"):
        optimizer.choose(parse_arguments(options(base, data, tmp_path, "--page_to", str(pages))), "cuda")


def test_a_short_run_shows_its_loss(base, data, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("nf4lora.train.plot.plot_loss", lambda history, path: drawn.append(history))
    out = tmp_path / "out"
    _, said = train(*options(base, data, out, "--max_steps", "3", "--logging_steps", "10"))
    assert [step for (step,) in losses(out, "step")] == [1, 3]
    assert "step 1/3" in said
    assert "step 3/3" in said
    assert [entry["step"] for entry in drawn[0] if "loss" in entry] == [1, 3]


def test_every_step_of_a_warm_up_counts(base, data, tmp_path):
    out = tmp_path / "out"
    _, said = train(*options(base, data, out, "--max_steps", "4", "--warmup_steps", "3"))
    rates = [rate for (rate,) in losses(out, "learning_rate")]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert "longer than the run" not in said
    out = tmp_path / "longer"
    _, said = train(*options(base, data, out, "--max_steps", "2", "--warmup_steps", "9"))
    assert "the warm-up of 9 steps is longer than the run: its learning rate only reaches 0.002 of 0.01" in said
    assert [rate for (rate,) in losses(out, "learning_rate")] == pytest.approx([0.001, 0.002])


def test_the_parameter_whose_gradient_is_not_finite_is_the_one_named(base, data, tmp_path, monkeypatch):
    step, names = Trainer.training_step, []

    def poisoned(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        names[:] = [name for name, each in model.named_parameters() if each.requires_grad]
        dict(model.named_parameters())[names[-1]].grad[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    for norm in ("1", "0"):
        with pytest.raises(RunError, match="is not finite in step 1") as raised:
            train(*options(base, data, tmp_path / "out", "--max_grad_norm", norm))
        assert f"the gradient of {names[-1]} is" in str(raised.value)


@pytest.mark.parametrize("limit", ["1.0", "0"])
def test_one_norm_of_the_gradients_is_computed_a_step(base, data, tmp_path, monkeypatch, limit):
    calls = []
    for module, name in (
        (trl, "norms_in_groups"),
        (torch.nn.utils, "get_total_norm"),
        (torch.nn.utils, "clip_grad_norm_"),
    ):
        whole = getattr(module, name)
        counted = lambda *a, whole=whole, **k: (calls.append(1), whole(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(module, name, counted)
    train(*options(base, data, tmp_path / "out", "--max_steps", "2", "--max_grad_norm", limit))
    assert len(calls) == 2
    assert all(norm > 0 for (norm,) in losses(tmp_path / "out", "grad_norm"))


def test_without_matplotlib_a_run_has_no_picture_and_is_told_so(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("nf4lora.train.plot.plot_loss", PLOT_LOSS)
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("nf4lora.cli.train.find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    _, said = train(*options(base, data, tmp_path / "out", "--max_steps", "1"))
    assert "loss.png was not drawn" in said
    assert "pip install matplotlib" in said
    assert main.main(["train", "--no_such_option", "1"]) == 2
