"""What tests of whole runs share: a tiny model, a few rows, a call of `nf4lora train` and a look at what it left."""

import gc
import io
import json
from pathlib import Path

import pytest

for package in ("rich", "trl", "datasets", "yaml"):
    pytest.importorskip(package)

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from nf4lora.cli import train as running  # noqa: E402
from nf4lora.train.arguments.parse import parse_arguments  # noqa: E402

from support.models import tiny_llama, tiny_tokenizer  # noqa: E402

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


def use(said):
    """Run the lines that a run ends with, and nothing beside them: the model and the tokenizer."""
    scope = {}
    lines = [line for line in said[said.index("use it") :].splitlines() if line.startswith("    ")]
    exec("\n".join(line[4:] for line in lines), scope)
    assert not any(module.training for module in scope["model"].modules())
    return scope["model"], scope["tokenizer"]


def check_use(said):
    model, tokenizer = use(said)
    ids = tokenizer.apply_chat_template([user("Say one")], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        with_adapter = model(ids).logits
        with model.disable_adapter():
            without = model(ids).logits
    assert (with_adapter - without).abs().max() > 0.1
