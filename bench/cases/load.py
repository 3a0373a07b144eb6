"""load: the memory and time for loading a 16-bit model in 4 bits."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from ..harness.case import Settings, without
from ..harness.contenders import OURS, RIVAL, load
from ..harness.process import Process, anonymous_bytes, peak_bytes
from ..harness.table import Table
from ..harness.timing import spread

QUESTION = "How much memory does it take to load a model in 4 bits, over what the model then needs?"

ROUNDS = 3
MB = 1e6
ALLOWED = 64 << 20  # target: bytes of the peak above the final memory and the largest tensor


def run(settings: Settings) -> list[Table]:
    names = [OURS, *([] if without("bitsandbytes") else [RIVAL])]
    with tempfile.TemporaryDirectory(prefix="nf4lora-bench-") as folder:
        print(f"writing a model of {'8 MB' if settings.quick else '1.2 GB'} to {folder}", flush=True)
        largest, total, shards = write_model(Path(folder), settings.quick)
        runs: dict[str, list[dict]] = {name: [] for name in names}
        for _ in range(1 if settings.quick else ROUNDS):
            for name in names:
                runs[name].append(measured(name, folder, settings.device))
    limit = largest + ALLOWED
    rows = [row(name, results) for name, results in runs.items()]
    over = rows[0]["peak - final, MB"] * MB
    claim = f"peak - final at most the largest tensor in 16 bits + 64 MiB = {limit / MB:.0f} MB, got {over / MB:.0f} MB"
    notes = [
        f"memory: anonymous pages (RssAnon) of a fresh process, Python and libraries included, read every millisecond "
        f"from outside; the largest peak of {len(runs[OURS])} loads, the median of the rest",
        "peak resident: pages of the mapped files included, which the system takes back when it needs them",
        f"the largest tensor has {largest / MB:.1f} MB; the files were just written and come from the page cache",
        *without("bitsandbytes"),
    ]
    title = f"A random Llama, {total / 1e9:.2f} GB of bf16 safetensors in {shards} files, to NF4, double quantisation"
    return [Table(title, rows, notes, [(claim, over <= limit)])]


def row(name: str, results: list[dict]) -> dict:
    def middle(key: str) -> float:
        return median(result[key] for result in results) / MB

    return {
        "contender": name,
        "load, s": spread([result["seconds"] for result in results]),
        "model, MB": middle("bytes"),
        "before, MB": middle("before"),
        "peak, MB": max(result["peak"] for result in results) / MB,
        "final, MB": middle("final"),
        "peak - final, MB": max(result["peak"] - result["final"] for result in results) / MB,
        "peak resident, MB": max(result["resident"] for result in results) / MB,
    }


def write_model(folder: Path, quick: bool) -> tuple[int, int, int]:
    """Write a random model; returns the bytes of its largest tensor and of all tensors, and the number of files.

    The linear layers are the largest tensors, so that holding two of them in 16 bits at once is visible.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    width, layers = (256, 2) if quick else (2048, 9)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 256),
        vocab_size=4 * width,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # else the model is created in float32 first
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder, max_shard_size="2MB" if quick else "250MB")
    sizes = [parameter.nbytes for parameter in model.parameters()]
    return max(sizes), sum(sizes), len(list(folder.glob("*.safetensors")))


def measured(name: str, folder: str, device: str) -> dict:
    """One load in a process of its own, whose memory this process measures from outside."""
    with Process("load", name=name, folder=folder, device=device) as loading:
        before = next(loading)["anonymous"]
        peak = before
        loading.start()
        while loading.running(0.001):
            peak = max(peak, anonymous_bytes(loading.child.pid))
        after = loading.result()
    return {**after, "before": before, "peak": max(peak, after["final"])}


def contender(name: str, folder: str, device: str):
    """Import everything, yield the memory, then load the model and yield the result."""
    import peft  # noqa: F401  # users import it; our quantizer imports it too, which must not count as loading
    import transformers  # noqa: F401

    if name == OURS:
        import nf4lora  # noqa: F401
    else:
        import bitsandbytes  # noqa: F401
    yield {"anonymous": anonymous_bytes()}
    start = time.perf_counter()
    model = load(name, folder, device)
    seconds = time.perf_counter() - start
    yield {"seconds": seconds, "final": anonymous_bytes(), "resident": peak_bytes(), "bytes": model_bytes(model)}


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, and of the scales that bitsandbytes keeps beside them."""
    total = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total
