"""What the text of an option becomes: parsers that raise ValueError with the rule, `must be ...`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any


def boolean(value: Any) -> bool:
    """true/false and what YAML and shells make of them."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in words:
        raise ValueError("must be true or false")
    return words[str(value).lower()]


def boolean_or_auto(value: Any) -> bool | str:
    return "auto" if value == "auto" else boolean(value)


INFINITE = float("inf")
LARGEST = 2**31 - 1  # upper limit of numbers of steps and rows and of sizes, so that no library's integers overflow


def integer(low: int, high: int = LARGEST) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not low <= number <= high or number != int(number):
            most = f", {high} at most" if number > high else ""
            raise ValueError(f"must be a whole number, {low} or more{most}")
        return int(number)

    return parse


def step_limit(value: Any) -> int | None:
    return None if str(value) == "-1" else integer(1)(value)  # -1: transformers' way of saying none


def real(low: float, high: float = INFINITE, above: bool = False, below: bool = False) -> Callable[[Any], float]:
    """A number between low and high; `above` and `below` exclude the ends."""

    def parse(value: Any) -> float:
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = float("nan")
        inside = low <= number <= high and number != INFINITE
        if not inside or (above and number == low) or (below and number == high):
            least = f"above {low:g}" if above else f"at least {low:g}"
            most = f" and {'below' if below else 'at most'} {high:.10g}" if high < LARGEST or number > high else ""
            raise ValueError(f"must be a number {least}{most}")
        return number

    return parse


def positive(value: Any) -> float:
    """A number above 0; whole numbers stay whole, because other readers of an adapter expect them so."""
    number = real(0, LARGEST, above=True)(value)
    return int(number) if number == int(number) else number


def steps(value: Any) -> float:
    """A number of steps, or a share of all steps (transformers' rule)."""
    number = real(0, LARGEST, above=True)(value)
    if number >= 1 and number != int(number):
        raise ValueError("must be a whole number of steps, or a share of them below 1")
    return int(number) if number >= 1 else number


def share_or_count(value: Any) -> float:
    number = real(0, LARGEST)(value)
    if number >= 1 and number != int(number):
        raise ValueError("must be a whole number, or a share below 1")
    return int(number) if number >= 1 or number == 0 else number


def text(value: Any) -> str:
    if not isinstance(value, (str, int, float)) or isinstance(value, bool) or str(value).strip() == "":
        raise ValueError("must be a name or a path")
    return str(value)


def path(value: Any) -> str:
    """A path, with ~ for the home folder; what else the text may name (a Hub id, say) passes as it is."""
    expanded = os.path.expanduser(text(value))
    if expanded.startswith("~"):
        raise ValueError(f"must be a path; there is no user {expanded[1:].partition('/')[0]!r}")
    return expanded


def limit(value: Any) -> int:
    """A number of things to keep; 0 (or null, none, all, -1) keeps all of them."""
    return 0 if str(value).lower() in ("none", "null", "all", "-1") else integer(0)(value)


def one_of(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if "no" in choices and value in (False, "false", "off"):
            value = "no"
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value

    return parse


def names(value: Any) -> list[str] | None:
    """A YAML list, or a comma-separated string."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise ValueError("must be a list of names (in flags: separated by commas)")
    return value


def modules(value: Any) -> str | list[str]:
    """all-linear, or the names of modules; a single string with regex characters is PEFT's regex."""
    return "all-linear" if value in ("all", "all-linear", ["all"], ["all-linear"]) else names_or_regex(value)


def names_or_regex(value: Any) -> str | list[str]:
    """The names of modules; a single string with regex characters is PEFT's regex."""
    if isinstance(value, str) and any(character in value for character in r"*\[(|^$"):
        return value
    return names(value) or []


def dtype(value: Any) -> str:
    if isinstance(value, bool):  # bf16: true
        return "bfloat16" if value else "float32"
    yes, no = dict.fromkeys(("true", "yes", "on"), "bfloat16"), dict.fromkeys(("false", "no", "off"), "float32")
    short = {"bf16": "bfloat16", "fp32": "float32", "float": "float32", **yes, **no}  # bf16: true
    value = short.get(str(value).lower().removeprefix("torch."), str(value).lower().removeprefix("torch."))
    if value in ("float16", "fp16", "half"):
        raise ValueError("must be auto, bfloat16 or float32 (float16 would need loss scaling, which is not done here)")
    return one_of("auto", "bfloat16", "float32")(value)


def device(value: Any) -> str:
    kind, _, index = str(value).partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdecimal())):
        raise ValueError("must be auto, cpu, cuda or cuda:<number>")
    return str(value)


ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def attention(value: Any) -> str:
    """One of transformers' ways of computing attention, or a kernel on the Hub as owner/name, maybe with @version."""
    name = str(value)
    if name not in ATTENTIONS and not re.fullmatch(r"[\w.-]+/[\w.-]+(@[^/:\s]+)?(:[^/:\s]+)?", name):
        raise ValueError(f"must be one of {', '.join(ATTENTIONS)}, or a kernel on the Hub such as "
                         "kernels-community/flash-attn2")  # fmt: skip
    return name


def optimizer(value: Any) -> str:
    """One of ours, or the name that others have for it."""
    names = {
        "adamw": ("adamw_torch", "adamw_torch_fused", "adamw_hf"),
        "paged_adamw_32bit": ("paged_adamw",),
        "paged_adamw_8bit": ("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit"),
    }
    ours = next((name for name, others in names.items() if value in (name, *others)), None)
    return ours or one_of("auto", *names)(value)


def reports(value: Any) -> list[str]:
    chosen = [] if value in (None, "none", ["none"], []) else names(value) or []
    unknown = [name for name in chosen if name not in ("tensorboard", "wandb")]
    if unknown:
        raise ValueError("must be none, tensorboard or wandb (metrics.jsonl is always written)")
    return chosen


def resume(value: Any) -> str | None:
    if isinstance(value, bool) or str(value).lower() in ("true", "false", "yes", "no", "on", "off"):
        return "auto" if boolean(value) else None
    return path(value)


def template(value: Any) -> str | None:
    """A chat template by name, file or text; None where a name means the tokenizer's own."""
    name = text(value)
    if name in ("tokenizer_default", "tokenizer_default_fallback_chatml", "tokenizer", "default", "auto"):
        return None
    return path(name)


def tokens(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError("must hold names and tokens, like pad_token: <pad>")
    return {str(name): str(token) for name, token in value.items() if token is not None}


def compiling(value: Any) -> bool:
    """True, false, or Axolotl's `auto`: where torch is recent enough, as it is here."""
    return True if value == "auto" else boolean(value)


def checkpointing(value: Any) -> bool:
    """True, false, or a way of doing it that others have; here activations are recomputed."""
    return True if value in ("unsloth", "offload", "offload_disk", "legacy") else boolean(value)
