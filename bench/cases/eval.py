"""eval: whether an evaluation in the middle of training changes the gradients after it."""

from __future__ import annotations

import tempfile
from importlib import metadata
from pathlib import Path

import torch

from nf4lora import _C

from ..harness.case import Settings, without
from ..harness.contenders import OURS, RIVAL, adapted
from ..harness.process import Process
from ..harness.table import Table
from .load import write_model

QUESTION = "Does an evaluation in the middle of training change the gradients of the next step?"

NEEDED = "avx512bf16"  # bitsandbytes repacks its weights only on processors with this instruction set
EVALUATIONS = {"1 token": 1, "16 tokens": 16, "64 tokens": 64}


def run(settings: Settings) -> list[Table]:
    names = [OURS, *([] if without("bitsandbytes") else [RIVAL])]
    with tempfile.TemporaryDirectory(prefix="nf4lora-bench-") as folder:
        write_model(Path(folder), quick=True)
        rows = [row(name, folder, settings.device) for name in names]
    ours = rows[0]
    changed = ours["gradients that changed"]
    notes = [
        "a random Llama of 2 layers in bf16, r = 16 on every linear layer, no dropout; two steps of AdamW, a backward "
        "pass, evaluations of " + ", ".join(EVALUATIONS) + " without gradients, model.train(), the same backward pass",
        "repacked: layers whose weight is laid out anew for evaluation",
        *notes_on_rival(rows),
        *without("bitsandbytes"),
    ]
    claim = f"no gradient of ours changes, got {changed} of {ours['adapter tensors']}"
    return [Table("Gradients of one batch before and after an evaluation", rows, notes, [(claim, changed == 0)])]


def row(name: str, folder: str, device: str) -> dict:
    with Process("eval", name=name, folder=folder, device=device) as process:
        return {"contender": name, **next(process)}


def notes_on_rival(rows: list[dict]) -> list[str]:
    """A note on the rival's row, which depends on the processor."""
    rival = next((cells for cells in rows if cells["contender"] == RIVAL), None)
    if rival is None:
        return []
    who = f"bitsandbytes {metadata.version('bitsandbytes')}"
    if NEEDED not in _C.cpu_instruction_sets():
        return [
            f"this processor has no {NEEDED}: {who} repacks nothing here, so what that does to gradients cannot show"
        ]
    if rival["layers repacked"]:
        return [
            f"{who} repacks a layer at the first forward pass in evaluation mode, and from then on its backward pass "
            f"gives a gradient of zero to the layer's input, so to everything below: load the model again after an "
            f"evaluation"
        ]
    return [f"{who} repacked nothing on this processor, which has {NEEDED}"]


def contender(name: str, folder: str, device: str):
    model = adapted(name, folder, device=device)
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    ids = torch.arange(64, device=device).reshape(2, 32) + 1

    def gradients() -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {key: parameter.grad.clone() for key, parameter in trained.items()}

    for _ in range(2):
        gradients()
        optimizer.step()
    before = gradients()
    model.eval()
    with torch.no_grad():
        for tokens in EVALUATIONS.values():
            model(input_ids=torch.ones(1, tokens, dtype=torch.long, device=device))
    model.train()
    after = gradients()
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    yield {
        "adapter tensors": len(trained),
        "gradients that changed": sum(not torch.equal(before[key], after[key]) for key in before),
        "gradients that became zero": sum(bool(before[k].any()) and not after[k].any().item() for k in before),
        "layers repacked": sum(bool(getattr(state, "packing_format_for_cpu", False)) for state in states),
    }
