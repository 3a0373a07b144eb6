"""The sum of all linear layers of a block, a table of the case lora on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..harness import targets
from ..harness.case import Settings
from ..harness.layers import OURS, TORCH
from ..harness.shapes import block_of, groups_of
from ..harness.table import Table
from ..harness.timing import SATURATED, heading
from .lora_row import KINDS, Row, ratio_of

BLOCKS = ("Llama-3.1-8B", "Llama-3.2-1B", "Qwen2.5-7B")  # whose layers are added up


def layer_table(rows: Iterable[Row], names: Sequence[str], settings: Settings) -> Table:
    """The sums of all linear layers of a block, for each model and number of tokens at which all were measured."""
    rows = list(rows)
    cells, limits = [], []
    for model in BLOCKS:
        for text, M, together, sums in sums_of(rows, model):
            row: dict = {"layer": f"{model}, the layer", "pass": text, "M": M, "together": together or None}
            for clock in settings.clocks:
                row[f"{heading(clock)}, ms"] = 1e3 * sums[clock][OURS]
                row[f"{heading(clock)}, single calls, ms"] = 1e3 * sums[clock][SINGLE_CALLS]
            for rival in names[1:]:
                for clock in settings.clocks:
                    took = sums[clock]
                    row[ratio_of(clock, rival)] = took[OURS] / took[rival] if rival in took else None
            cells.append(row)
            if model == targets.LAYER_OF and SATURATED in sums:
                limits += layer_target(text, M, sums[SATURATED], settings)
    return Table(
        "The layer: q, k, v, o, gate, up and down of one block together",
        cells,
        [
            "sums of medians; with checkpointing: the forward pass twice and the backward pass, of all contenders",
            "together: the layers of ours that are counted as groups, as a model computes them; single calls: the sum "
            "of ours without groups; rivals are sums of single layers",
            "ours / torch: to cuBLAS's bf16 products of the base alone, without LoRA",
        ],
        limits,
    )


Sums = dict[str, dict[str, float]]  # seconds by clock and contender, and of SINGLE_CALLS
SINGLE_CALLS = f"{OURS}, single calls"


def sums_of(rows: Iterable[Row], model: str) -> list[tuple[str, int, str, Sums]]:
    """For each pass and number of tokens the times of all layers of the model's block together.

    Ours has groups where they were measured in all kinds; the third entry names their layers. A contender that one
    layer lacks has no sum; a number of tokens that one layer lacks has none for anybody.
    """
    of = {(row.shape, row.M, row.kind): row for row in rows}
    block = block_of(model)
    result = []
    for M in sorted({M for _, M, _ in of}):
        if not all((shape, M, kind) in of for shape in block for kind in KINDS):
            continue
        together = [group for group in groups_of(block) if all((group, M, kind) in of for kind in KINDS)]
        grouped = {layer for group in together for layer in group.layers}
        singles = [shape for shape in block for _ in shape.layers]  # one for each layer
        rest = [shape for shape in block for layer in shape.layers if layer not in grouped]
        names = "; ".join(", ".join(group.layers) for group in together)
        kinds = {"forward": ["forward"], "forward and backward": ["both"], "with checkpointing": ["forward", "both"]}
        for text, parts in kinds.items():
            sums = _sum([of[shape, M, kind] for kind in parts for shape in singles])
            ours = _sum([of[shape, M, kind] for kind in parts for shape in (*rest, *together)])
            for clock, took in sums.items():
                took[SINGLE_CALLS], took[OURS] = took[OURS], ours[clock][OURS]
            result.append((text, M, names, sums))
    return sorted(result, key=lambda entry: list(targets.LAYER).index(entry[0]))


def _sum(rows: Sequence[Row]) -> Sums:
    """The sums of the contenders that all rows have."""
    sums: Sums = {}
    for clock in rows[0].took:
        medians = [row.medians(clock) for row in rows]
        common = [name for name in medians[0] if all(name in of_row for of_row in medians)]
        sums[clock] = {name: sum(of_row[name] for of_row in medians) for name in common}
    return sums


def layer_target(text: str, M: int, took: dict[str, float], settings: Settings) -> list[tuple[str, bool]]:
    """The target of a pass of Llama-3.1-8B's layer at so many tokens, if it has one."""
    allowance, limit = targets.allowance(settings.device), targets.LAYER[text].get(M)
    if allowance is None or limit is None or settings.quick or TORCH not in took:
        return []
    claim = f"{targets.LAYER_OF}, the layer, {text}, {M} tokens, saturated: {{}} of cuBLAS's bf16 products"
    return [targets.at_most(claim, limit + allowance, took[OURS] / took[TORCH])]
