"""Whole runs on a tiny model: what is trained, counted, saved, resumed, refused."""

import gc
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("rich", "trl", "datasets", "matplotlib", "yaml"):
    pytest.importorskip(package)

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import nf4lora  # noqa: E402
from nf4lora import cli  # noqa: E402
from nf4lora.train import optimizer, output, plot  # noqa: E402
from nf4lora.train import run as running  # noqa: E402
from nf4lora.train.config import parse_arguments  # noqa: E402
from nf4lora.train.errors import RunError, UsageError  # noqa: E402
from nf4lora.train.trainer import Trainer, check_gradients  # noqa: E402

from models import tiny_llama, tiny_tokenizer  # noqa: E402

PLOT_LOSS = plot.plot_loss
ROWS = [
    ("Say one", "one"),
    ("Say two twice", "two two"),
    ("Say three", "three"),
    ("Count to four", "one two three four"),
]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Trainer collects garbage before each run, matplotlib draws after it: together most of a tiny run's time."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nf4lora.train.plot.plot_loss", lambda *arguments: False)
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    return data_file(tmp_path)


def data_file(folder):
    path = folder / "train.jsonl"
    rows = [{"prompt": [user(q)], "completion": [{"role": "assistant", "content": a}]} for q, a in ROWS * 6]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def user(text):
    return {"role": "user", "content": text}


def options(base, data, folder, *more):
    return [
        "--model", base, "--data", data, "--output_dir", str(folder), "--max_steps", "6", "--logging_steps", "1",
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--dtype", "float32",
        "--learning_rate", "1e-2", "--lora_r", "4", "--warmup_steps", "0", "--device", "cpu", *more,
    ]  # fmt: skip


def train(*arguments):
    """-> exit code, what was printed"""
    console = Console(file=io.StringIO(), width=200)
    return running.train(parse_arguments(list(arguments)), console), console.file.getvalue()


def adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def logged(folder, *keys):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(key) for key in keys) for line in lines]


def losses(folder, *keys):
    """What was logged of training, without what was logged of evaluations."""
    return [row for row, (loss,) in zip(logged(folder, *keys), logged(folder, "loss"), strict=True) if loss is not None]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_run_learns_and_writes_what_it_promises(base, data, tmp_path, monkeypatch):
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


def use(said):
    """Run the three lines that a run ends with: the model and the tokenizer."""
    scope = {}
    lines = said[said.index("    model = ") :].strip().replace("\n    ", "\n")
    exec(f"import nf4lora, peft\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n{lines}", scope)
    return scope["model"].eval(), scope["tokenizer"]


def check_use(said):
    model, tokenizer = use(said)
    ids = tokenizer.apply_chat_template([user("Say one")], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        with_adapter = model(ids).logits
        with model.disable_adapter():
            without = model(ids).logits
    assert (with_adapter - without).abs().max() > 0.1


@pytest.mark.parametrize("more", [(), ("--double_quant", "false"), ("--load_in_4bit", "false")])
def test_three_lines_of_the_summary_load_what_was_trained(base, data, tmp_path, more):
    check_use(train(*options(base, data, tmp_path / "out", *more))[1])


# 24 rows, 4 held out, 4 a step: an epoch ends with step 5, where the checkpoint is written before the evaluation.
WHOLE = ("--lora_dropout", "0.2", "--val_size", "4", "--eval_strategy", "epoch", "--save_steps", "1",
         "--save_total_limit", "9", "--logging_steps", "2", "--max_steps", "7")  # fmt: skip


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run that nothing interrupted: its folder, and its data."""
    data = data_file(tmp_path_factory.mktemp("data"))
    folder = tmp_path_factory.mktemp("whole") / "out"
    train(*options(base, data, folder, *WHOLE))
    return folder, data


@pytest.mark.parametrize("step", [3, 5], ids=["within an epoch", "at the end of an epoch"])
def test_resumed_run_is_the_same_to_the_bit(base, whole, tmp_path, step):
    whole, data = whole
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    (parts / "adapter_model.safetensors").unlink()
    checkpoint = parts / f"checkpoint-{step}"
    code, said = train(*options(base, data, parts, *WHOLE, "--resume_from_checkpoint", str(checkpoint)))
    assert code == 0
    assert f"going on from {checkpoint}" in said
    assert "another run" not in said
    assert equal(adapter(whole), adapter(parts))
    keys = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "mean_token_accuracy")
    assert losses(whole, *keys) == losses(parts, *keys)
    assert logged(whole, "step", "eval_loss")[-1] == logged(parts, "step", "eval_loss")[-1]
    assert torch.equal(
        *(torch.load(f / "checkpoint-7/rng_state.pth", weights_only=False)["cpu"] for f in (whole, parts))
    )


def test_interrupt_saves_a_checkpoint_and_resumes_to_the_same_weights(base, whole, tmp_path, monkeypatch):
    whole, data = whole
    parts = tmp_path / "parts"
    step, batches = Trainer.training_step, itertools.count(1)
    before = signal.getsignal(signal.SIGINT)

    def interrupted(self, *args, **kwargs):
        if next(batches) == 3:  # the first batch of step 2
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        code, said = train(*options(base, data, parts, *WHOLE, "--save_steps", "500"))
    assert code == 130
    assert "stopped after step 2 of 7" in said
    assert f"nf4lora train {parts / 'config.yaml'} --resume_from_checkpoint" in said
    assert not (parts / "adapter_model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is before
    code, _ = train(str(parts / "config.yaml"), "--resume_from_checkpoint")
    assert code == 0
    assert equal(adapter(whole), adapter(parts))


def test_seed_decides_everything(base, data, tmp_path):
    runs = {}
    for name, more in {"a": (), "b": ("--gradient_checkpointing", "false"), "c": ("--seed", "7")}.items():
        train(*options(base, data, tmp_path / name, "--max_steps", "2", "--lora_dropout", "0.2", *more))
        runs[name] = adapter(tmp_path / name)
    assert equal(runs["a"], runs["b"])  # recomputing draws the same dropout masks
    assert not equal(runs["a"], runs["c"])


def test_second_interrupt_ends_at_once(base, data, tmp_path, monkeypatch, capsys):
    def twice(self, *args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "training_step", twice)
    assert cli.main(["train", *options(base, data, tmp_path / "out")]) == 130
    assert "interrupted at once" in capsys.readouterr().err


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
            logits = model(**{name: each for name, each in inputs.items() if name != "labels"}).logits
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
    monkeypatch.setattr("nf4lora.train.trainer.score", lambda *a: (torch.tensor([float("nan")]), torch.tensor([True])))
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
    trained, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    trained.grad, zero = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    zero.grad = torch.zeros(2)
    check_gradients([("a.lora_A.weight", zero), ("a.lora_B.weight", trained), ("experts.0.lora_B.weight", idle)])
    with pytest.raises(RunError, match=r"no gradient reaches b\.lora_B\.weight"):
        check_gradients([("a.lora_B.weight", trained), ("b.lora_B.weight", zero)])
    with pytest.raises(RunError, match=r"no gradient reaches b\.lora_A\.weight"):
        check_gradients([("b.lora_A.weight", idle)])


def test_folder_that_holds_a_run_is_kept_unless_told(base, data, tmp_path):
    out = tmp_path / "out"
    train(*options(base, data, out, "--max_steps", "1", "--save_steps", "1"))
    before = adapter(out)
    with pytest.raises(UsageError, match="holds a run; go on with --resume_from_checkpoint"):
        train(*options(base, data, out))
    with pytest.raises(UsageError, match="contradict each other"):
        train(*options(base, data, out, "--overwrite_output_dir", "--resume_from_checkpoint"))
    with pytest.raises(UsageError, match=r"lora_r 8 cannot go on from .*checkpoint-1, which has 4"):
        train(*options(base, data, out, "--resume_from_checkpoint", "--lora_r", "8"))
    with pytest.raises(UsageError, match="not a whole checkpoint"):
        train(*options(base, data, out, "--resume_from_checkpoint", str(out / "checkpoint-9")))
    assert equal(before, adapter(out))
    (out / "notes.txt").write_text("mine")
    code, _ = train(*options(base, data, out, "--overwrite_output_dir", "--max_steps", "2", "--seed", "7"))
    assert code == 0
    assert (out / "notes.txt").exists()
    assert not (out / "checkpoint-1").exists()
    assert not equal(before, adapter(out))


def test_broken_off_checkpoint_is_not_resumed_from(base, data, tmp_path):
    out = tmp_path / "out"
    train(*options(base, data, out, "--max_steps", "2", "--save_steps", "1"))
    (out / "checkpoint-2" / "trainer_state.json").unlink()
    assert output.checkpoints(out) == [out / "checkpoint-1"]


def test_resuming_without_a_checkpoint_starts_from_the_beginning(base, data, tmp_path):
    code, said = train(*options(base, data, tmp_path / "out", "--resume_from_checkpoint", "--max_steps", "1"))
    assert code == 0
    assert "no checkpoint yet" in said


def test_checkpoint_of_other_layers_is_refused(base, data, tmp_path):
    out = tmp_path / "out"
    train(*options(base, data, out, "--max_steps", "2", "--save_steps", "1"))
    with pytest.raises(
        RunError, match=r"4 tensors of its adapter are not those of the model.*k_proj.*lora_target_modules"
    ):
        train(*options(base, data, out, "--resume_from_checkpoint", "--lora_target_modules",
                       "q_proj,o_proj,up_proj,gate_proj,down_proj"))  # fmt: skip


def test_finished_run_can_be_resumed_and_has_nothing_left_to_do(base, data, tmp_path):
    out = tmp_path / "out"
    train(*options(base, data, out, "--max_steps", "2", "--val_size", "4"))
    before = adapter(out)
    (out / "adapter_model.safetensors").unlink()
    code, said = train(*options(base, data, out, "--max_steps", "2", "--val_size", "4", "--resume_from_checkpoint"))
    assert code == 0
    assert equal(before, adapter(out))
    assert "nothing is left to train" in said


def test_resuming_into_another_folder_leaves_the_first_alone(base, data, tmp_path):
    train(*options(base, data, tmp_path / "a", "--max_steps", "2", "--save_steps", "1"))
    train(*options(base, data, tmp_path / "b", "--max_steps", "2",
                   "--resume_from_checkpoint", str(tmp_path / "a" / "checkpoint-1")))  # fmt: skip
    assert equal(adapter(tmp_path / "a"), adapter(tmp_path / "b"))
    with pytest.raises(UsageError, match="holds a run"):
        train(*options(base, data, tmp_path / "b", "--resume_from_checkpoint", str(tmp_path / "a" / "checkpoint-1")))


def test_changed_options_are_named_when_resuming(base, data, tmp_path):
    out = tmp_path / "out"
    train(*options(base, data, out, "--max_steps", "2", "--save_steps", "1"))
    _, said = train(
        *options(base, data, out, "--max_steps", "3", "--resume_from_checkpoint", "--learning_rate", "1e-3")
    )
    assert "this is another run from here on: max_steps 3 (was 2), learning_rate 0.001 (was 0.01)" in said


def test_dry_run_writes_nothing_and_shows_a_sample(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("nf4lora.train.model.load_model", lambda *a: pytest.fail("a dry run loads no model"))
    out = tmp_path / "out"
    code, said = train(*options(base, data, out, "--dry_run"))
    assert code == 0
    assert not out.exists()
    assert "[[one<|im_end|>]]" in said
    assert "24 rows (prompt_completion)" in said


@pytest.mark.parametrize(
    ("more", "saved"),
    [
        (("--load_in_4bit", "false"), "lora_A"),
        (("--use_dora",), "lora_magnitude_vector"),
        (("--modules_to_save", "lm_head"), "lm_head"),
        (("--lora_target_modules", "q_proj,v_proj"), "v_proj"),
        (("--dtype", "bfloat16"), "lora_A"),
        (("--bnb_4bit_use_double_quant", "false"), "lora_A"),
    ],
)
def test_other_ways_to_train_learn_too(base, data, tmp_path, more, saved):
    out = tmp_path / "out"
    code, _ = train(*options(base, data, out, "--val_size", "4", *more))
    assert code == 0
    tensors = adapter(out)
    assert any(saved in name for name in tensors)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    results = json.loads((out / "eval_results.json").read_text())
    assert results["eval_loss"] < results["eval_loss_before"] - 0.1


def packed_folder(base, folder, config):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


def test_checkpoint_in_nf4_is_trained_on_as_it_is(base, data, tmp_path):
    packed = packed_folder(base, tmp_path / "packed", nf4lora.NF4Config())
    for name, folder in {"from 16 bits": base, "from 4 bits": packed}.items():
        _, said = train(*options(folder, data, tmp_path / name))
    assert equal(adapter(tmp_path / "from 16 bits"), adapter(tmp_path / "from 4 bits"))
    check_use(said)
    with pytest.raises(UsageError, match=r"quantised already \(nf4lora\)"):
        train(*options(packed, data, tmp_path / "out", "--load_in_4bit", "false"))


def test_checkpoint_of_bitsandbytes_is_trained_on_as_it_is(base, data, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    packed = packed_folder(base, tmp_path / "packed", config)
    code, said = train(*options(packed, data, tmp_path / "out"))
    assert code == 0
    assert "packed in NF4: 7 layers" in said
    check_use(said)


def test_unknown_quantisation_is_refused(base, data, tmp_path):
    folder = tmp_path / "gptq"
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((Path(base) / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(RunError, match="quantised with gptq"):
        train(*options(str(folder), data, tmp_path / "out"))


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        (("--model_name_or_path", "./nowhere"), UsageError, "is not a folder"),
        (("--max_length", "4096"), UsageError, "at most the model's 512 positions"),
        (("--lora_target_modules", "nothing_is_called_so"), RunError, "target_modules must match a module"),
        (("--report_to", "wandb"), UsageError, "pip install wandb"),
        (("--device", "cuda"), UsageError, "device cuda"),
    ],
)
def test_options_that_do_not_fit_are_refused(base, data, tmp_path, more, error, words):
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    arguments = options(base, data, tmp_path / "out")
    if more[0] == "--model_name_or_path":
        arguments = arguments[2:]
    with pytest.raises(error, match=words):
        train(*arguments, *more)
    assert not (tmp_path / "out").exists()


def test_errors_in_the_data_come_before_the_model(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nf4lora.train.model.load_model", lambda *a: pytest.fail("the model was loaded first"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n{"messages": 3}\n'
    )
    assert cli.main(["train", *options(base, str(bad), tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "bad.jsonl: line 2: messages must be a list" in captured.err
    assert "Traceback" not in captured.err


def test_role_data_without_a_chat_template_saves_the_installed_one(base, data, tmp_path):
    from transformers import AutoTokenizer

    bare = tmp_path / "bare"
    tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1).save_pretrained(bare)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    _, said = train(*options(str(bare), data, tmp_path / "out", "--max_steps", "1"))
    assert "ChatML was installed" in said
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_tensorboard_on_request(base, data, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    train(*options(base, data, out, "--max_steps", "1", "--report_to", "tensorboard"))
    assert list(out.glob("runs/*/events.out.tfevents.*"))


def test_nothing_is_reported_to_anyone(base, data, tmp_path, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *a, **k: pytest.fail("TRL sent telemetry"))
    assert train(*options(base, data, tmp_path / "out", "--max_steps", "1"))[0] == 0


@pytest.mark.slow
def test_process_stops_on_sigterm_with_130(base, data, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "nf4lora",
        "train",
        *options(base, data, out, "--max_steps", "5000", "--logging_steps", "1"),
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("step 2/"):
                process.send_signal(signal.SIGTERM)
                break
        said += process.stdout.read()
        assert process.wait() == 130, said
    assert "once more to stop at once" in said
    assert "Go on with" in said
    assert len(output.checkpoints(out)) == 1


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_a_paged_optimizer_trains_and_goes_on_bit_for_bit(base, data, tmp_path, name):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    more = ["--optim", name, "--save_steps", "3"]
    code, said = train(*options(base, data, whole, *more))
    assert code == 0 and f", {name}" in said
    bits = 8 if "8bit" in name else 32
    assert f"state    PagedAdamW, {bits} bits: " in said and "0 gradients skipped" in said
    train(*options(base, data, halves, *more))
    shutil.rmtree(halves / "checkpoint-6")
    (halves / "adapter_model.safetensors").unlink()
    code, said = train(*options(base, data, halves, *more, "--resume_from_checkpoint"))
    assert code == 0 and "another run" not in said
    assert equal(adapter(whole), adapter(halves))
    saved = torch.load(whole / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"]
    kinds = {state["exp_avg"].dtype for state in saved.values()}
    assert kinds == {torch.uint8 if bits == 8 else torch.float32}


def test_32_bits_end_where_torchs_adamw_ends(base, data, tmp_path):
    for name in ("adamw", "paged_adamw_32bit"):
        train(*options(base, data, tmp_path / name, "--optim", name))
    ours, torchs = adapter(tmp_path / "paged_adamw_32bit"), adapter(tmp_path / "adamw")
    for key, value in torchs.items():
        # torch's root errs by an ulp now and then; six steps of 1e-2 later that is far below a millionth
        assert (ours[key] - value).abs().max() < 1e-6


def test_the_optimizer_is_chosen_by_device_and_written_down(base, data, tmp_path):
    code, said = train(*options(base, data, tmp_path / "out"))
    assert code == 0 and ", adamw" in said
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
    assert code == 0 and ", paged_adamw_32bit" in said and "of state (file)" in said
    assert list(pages.iterdir()) == []
    with pytest.raises(UsageError, match="page_to .* is for the CPU"):
        optimizer.choose(parse_arguments(options(base, data, tmp_path, "--page_to", str(pages))), "cuda")


def test_a_change_of_optimizer_is_told_or_refused(base, data, tmp_path):
    out = tmp_path / "out"
    train(*options(base, data, out, "--save_steps", "3", "--optim", "paged_adamw_8bit"))
    shutil.rmtree(out / "checkpoint-6")
    again = [*options(base, data, out, "--save_steps", "3"), "--resume_from_checkpoint"]
    with pytest.raises(RunError, match="optim adamw cannot go on from .*checkpoint-3, whose optimizer has 8-bit"):
        train(*again, "--optim", "adamw")
    code, said = train(*again, "--optim", "paged_adamw_32bit")
    assert code == 0 and "optim paged_adamw_32bit (was paged_adamw_8bit)" in said
