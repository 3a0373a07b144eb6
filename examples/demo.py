"""The demo of `make demo`: SmolLM2-135M learns, in 4 bits, to answer a bicycle shop's customers with strict JSON.

    python examples/demo.py

The script gets the model, runs `nf4lora train examples/tickets.yaml`, and compares the answers to held-out messages
before and after training. "Before" is the same 4-bit model with its adapter switched off.
"""

import contextlib
import json
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import yaml
from smollm2 import smollm2

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))
from status import Status  # noqa: E402

CONFIG = ROOT / "examples" / "tickets.yaml"
CATEGORIES = ("billing", "booking", "complaint", "lost_property", "praise", "question", "repair")
URGENCIES = ("low", "normal", "high")
KEYS = ("category", "urgency", "summary", "reply")
BATCH = 48  # messages answered at once: a step for 48 takes little more time than one for 16
ANSWER = 96  # tokens; the longest answer in the data has 88


def parse(answer: str) -> dict | None:
    """The ticket in an answer; None if the shop's software would not accept it."""
    try:
        ticket = json.loads(answer)
    except ValueError:
        return None
    if "\n" in answer or not isinstance(ticket, dict) or tuple(ticket) != KEYS:
        return None
    fits = ticket["category"] in CATEGORIES and ticket["urgency"] in URGENCIES
    return ticket if fits and all(isinstance(ticket[key], str) for key in KEYS) else None


def load(base: str, adapter: Path):
    """The 4-bit model with the trained adapter, loaded as the last lines of the training show, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import nf4lora
    from nf4lora.train.device import choose_device

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between transformers and PEFT
    device = choose_device("auto").kind
    trained = yaml.safe_load((adapter / "config.yaml").read_text())
    model = AutoModelForCausalLM.from_pretrained(
        ROOT / base,
        dtype=getattr(torch, trained["dtype"]),
        quantization_config=nf4lora.NF4Config(),
        device_map=device,
    )
    model = nf4lora.load_adapter(model, adapter).eval()
    return model, AutoTokenizer.from_pretrained(adapter, padding_side="left")


def answers(model, tokenizer, conversations: list[list[dict]], tell: Callable[[str], None]) -> list[str]:
    """Greedy answers to conversations that end with the customer's message; `tell` is called with the progress."""
    import torch

    texts = [
        tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        for conversation in conversations
    ]
    ends = torch.tensor(model.generation_config.eos_token_id, device=model.device)
    replies: list[str] = []
    for start in range(0, len(texts), BATCH):
        inputs = tokenizer(texts[start : start + BATCH], return_tensors="pt", padding=True).to(model.device)
        rows, prompt = inputs["input_ids"].shape

        def progress(ids, scores, finished=start, rows=rows, prompt=prompt, **kwargs):
            """A stopping criterion, called by generate() after each token, that shows progress and stops no row."""
            finished += int(torch.isin(ids[:, prompt:], ends).any(1).sum())
            tell(f"{finished} of {len(texts)} are done, token {ids.shape[1] - prompt} of at most {ANSWER}")
            return ids.new_zeros(rows, dtype=torch.bool)

        tell(f"{start} of {len(texts)} are done, reading the next {rows}")
        output = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False, stopping_criteria=[progress])
        replies += tokenizer.batch_decode(output[:, prompt:], skip_special_tokens=True)
    return [reply.strip() for reply in replies]


def paragraph(label: str, text: str, width: int = 78) -> str:
    """A label and a text, wrapped to at most five lines."""
    indent = " " * 11
    return textwrap.fill(
        " ".join(text.split()) or "(nothing)",
        width,
        initial_indent=f"  {label:<9}",
        subsequent_indent=indent,
        max_lines=5,
        placeholder=" ...",
    )


def show_examples(rows: list[list[dict]], before: list[str], after: list[str]) -> None:
    """Print the first three held-out messages of different categories with both answers."""
    print("\nThree messages that were held out\n")
    shown: list[str] = []
    for row, old, new in zip(rows, before, after, strict=True):
        category = json.loads(row[-1]["content"])["category"]
        if category in shown or len(row) > 3:
            continue
        shown.append(category)
        print(paragraph("customer", row[-2]["content"]))
        print(paragraph("before", old))
        print(paragraph("after", new), end="\n\n")
        if len(shown) == 3:
            break


def summary(rows: list[list[dict]], before: list[str], after: list[str], output: Path) -> None:
    loss = json.loads((output / "eval_results.json").read_text())
    run = json.loads((output / "train_results.json").read_text())
    wanted = [json.loads(row[-1]["content"])["category"] for row in rows]
    old, new = [parse(answer) for answer in before], [parse(answer) for answer in after]
    right = sum(
        ticket is not None and ticket["category"] == category for ticket, category in zip(new, wanted, strict=True)
    )
    minutes, seconds = divmod(round(run["train_runtime"]), 60)
    for name, text in (
        ("held-out loss", f"{loss['eval_loss_before']:.3f} before, {loss['eval_loss']:.3f} after"),
        ("valid answers", f"{sum(map(bool, old))} of {len(rows)} before, {sum(map(bool, new))} of {len(rows)} after"),
        ("category", f"{right} of {len(rows)} right after"),
        ("speed", f"{run['train_tokens_per_second']:.0f} tokens/s in training, {minutes}:{seconds:02} in all"),
        ("peak memory", f"{run['peak_memory'] / 2**30:.2f} GiB"),
        ("plot", str(output / "loss.png")),
        ("adapter", str(output)),
    ):
        print(f"  {name:<15}{text}")


def main() -> int:
    config = yaml.safe_load(CONFIG.read_text())
    output = ROOT / config["output_dir"]
    try:
        smollm2(ROOT / config["model_name_or_path"])
    except (RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    command = ["train", str(CONFIG.relative_to(ROOT)), "--overwrite_output_dir"]
    print(f"$ nf4lora {' '.join(command)}\n", flush=True)
    training = subprocess.Popen([sys.executable, "-m", "nf4lora", *command], cwd=ROOT)
    while training.poll() is None:
        with contextlib.suppress(KeyboardInterrupt):  # the training gets it too, and prints what it saved
            training.wait()
    if training.returncode:
        return training.returncode

    rows = [json.loads(line)["messages"] for line in (ROOT / config["eval_file"]).read_text("utf-8").splitlines()]
    prompts = [row[:-1] for row in rows]
    print()
    with Status("Loading the model with its adapter", sys.stdout):
        model, tokenizer = load(config["model_name_or_path"], output)
    with Status(f"Answering {len(rows)} held-out messages without the adapter", sys.stdout) as status:
        with model.disable_adapter():
            before = answers(model, tokenizer, prompts, status)
    with Status(f"Answering {len(rows)} held-out messages with the adapter", sys.stdout) as status:
        after = answers(model, tokenizer, prompts, status)
    show_examples(rows, before, after)
    summary(rows, before, after, output)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
