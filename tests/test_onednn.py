"""oneDNN's caches, in fresh processes: they take their size at their first use."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from nf4lora.loss import processor
from nf4lora.memory import onednn

from support.models import tiny_llama

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="torch was built without oneDNN, or without its linear layer",
)

SHAPES = 70


def compiled_again(first: str, **environment: str) -> int:
    """How many of 70 products oneDNN has forgotten when they are asked for a second time."""
    code = f"""
        import os
        import torch
        from nf4lora.memory import onednn
        {first}
        x, w = torch.zeros({SHAPES}, 8), torch.zeros(8, 8)
        def multiply():
            for rows in range(1, {SHAPES + 1}):
                torch.ops.mkldnn._linear_pointwise(x[:rows], w, None, "none", [], "")
        multiply()
        print("again", flush=True)
        multiply()
        assert not set(onednn.VARIABLES) & set(os.environ) or {bool(environment)}
    """
    plain = {name: value for name, value in os.environ.items() if name not in onednn.VARIABLES}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**plain, "ONEDNN_VERBOSE": "2", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.partition("\nagain\n")[2].count("create:cache_miss")


@pytest.mark.slow
def test_the_cache_forgets_what_it_has_no_room_for():
    assert compiled_again("") == 0, "without us 70 shapes fit"
    assert compiled_again("onednn.bound_caches()") == SHAPES > onednn.CAPACITY


@pytest.mark.slow
def test_the_size_that_the_user_gives_stands():
    assert compiled_again("onednn.bound_caches()", ONEDNN_PRIMITIVE_CACHE_CAPACITY="200") == 0


@pytest.mark.skipif(not processor.multiplies(torch.bfloat16), reason="torch multiplies bfloat16 without oneDNN here")
def test_products_of_many_lengths_hold_little_memory():
    code = """
        import sys, torch
        from nf4lora.memory import heap, onednn
        if sys.argv[1] == "bounded":
            onednn.bound_caches()
        x, w = torch.zeros(512, 64, dtype=torch.bfloat16), torch.zeros(64, 64, dtype=torch.bfloat16)
        before = heap.resident()
        for rows in range(32, 432):
            x[:rows] @ w
        print(heap.resident() - before)
    """
    grown = {}
    for how in ("bounded", "as it is"):
        command = [sys.executable, "-c", textwrap.dedent(code), how]
        env = {name: value for name, value in os.environ.items() if name not in onednn.VARIABLES}
        grown[how] = int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)
    assert grown["bounded"] < grown["as it is"] / 2


def test_preparing_and_loading_bound_the_caches(monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM

    import nf4lora

    calls = []
    monkeypatch.setattr(onednn, "bound_caches", lambda: calls.append(1))
    nf4lora.prepare(tiny_llama())
    assert calls
    calls.clear()
    tiny_llama().save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4lora.NF4Config())
    assert calls


def test_a_second_call_leaves_the_environment_alone(monkeypatch):
    monkeypatch.setattr(onednn, "_bounded", False)
    before = dict(os.environ)
    onednn.bound_caches()
    onednn.bound_caches()
    assert dict(os.environ) == before
    assert onednn._bounded
