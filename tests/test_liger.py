"""Liger's kernels over our layers: the same loss and gradients. Triton's interpreter runs the kernels on a CPU.

The kernels themselves run, and so do Liger's functions that launch them and their gradients. Two things stand in for
what the interpreter lacks: a float argument of a kernel becomes a float32, as the compiler makes it, and rsqrt and tanh
of CUDA's library are those of Triton's language. That the kernels compile for a card is not what is tested.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent


def interpreted():
    """Put the two stand-ins in place."""
    import liger_kernel.ops.geglu
    import liger_kernel.ops.rms_norm
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(argument):
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return convert(argument)

    def tanh(x):
        power = tl.exp(-2.0 * tl.abs(x))
        return tl.where(x < 0, -1.0, 1.0) * (1.0 - power) / (1.0 + power)

    interpreter._implicit_cvt = converted
    liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.rsqrt(x)
    liger_kernel.ops.geglu.tanh = tanh


def counted(calls):
    """Count calls of Liger's functions by name."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    for function in (LigerGELUMulFunction, LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction):
        for part in ("forward", "backward"):
            key, original = f"{function.__name__}.{part}", getattr(function, part)

            def call(*args, key=key, original=original, **kwargs):
                calls[key] = calls.get(key, 0) + 1
                return original(*args, **kwargs)

            setattr(function, part, staticmethod(call))


def compare(name, checkpointing):
    """Of one step with Liger's kernels and without: the losses, the largest relative distance of a gradient, and how
    often each of Liger's functions was called."""
    from test_compiled_blocks import prepared, step

    from nf4lora.adapters.lora_layer import NF4LoraLinear
    from nf4lora.train.speed.liger import liger_kernels

    from support.adapted import relative

    interpreted()
    calls = {}
    counted(calls)
    model = prepared(name, 2, lora_dropout=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, grads = step(model, 12)
    assert not calls
    with liger_kernels(model, list(range(3, 20))):
        calls.clear()
        got, gradients = step(model, 12)
    mlp = model.get_base_model().model.layers[0].mlp
    assert all(isinstance(layer, NF4LoraLinear) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    far = max(relative(gradients[key], grad) for key, grad in grads.items())
    return {"losses": [loss.item(), got.item()], "far": far, "calls": calls}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "checkpointing"), [("llama", False), ("qwen3", True), ("gemma3", False)])
def test_loss_and_gradients_are_those_of_the_model_as_it_was(name, checkpointing):
    for package in ("liger_kernel", "triton", "trl"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    program = f"import json, test_liger; print(json.dumps(test_liger.compare({name!r}, {checkpointing})))"
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    before, after = answer["losses"]
    assert after == pytest.approx(before, rel=1e-5)
    assert answer["far"] < 1e-4  # float32, summed in another order
    norms = {"llama": 2 * 2 + 1, "qwen3": 2 * 4 + 1, "gemma3": 2 * 6 + 1}[name]
    mlp = "LigerGELUMulFunction" if name == "gemma3" else "LigerSiLUMulFunction"
    again = 2 if checkpointing else 1  # blocks are computed again
    assert answer["calls"] == {
        "LigerRMSNormFunction.forward": (norms - 1) * again + 1,
        # The input of the first one wants no gradient, but where checkpointing has the embedding's output want one.
        "LigerRMSNormFunction.backward": norms if checkpointing else norms - 1,
        "LigerRopeFunction.forward": 2 * again, "LigerRopeFunction.backward": 2,
        f"{mlp}.forward": 2 * again, f"{mlp}.backward": 2,
    }  # fmt: skip


def test_the_stand_in_of_tanh_is_tanh():
    x = torch.linspace(-20, 20, 101, dtype=torch.float64)
    power = torch.exp(-2.0 * x.abs())
    stand_in = torch.where(x < 0, -1.0, 1.0) * (1.0 - power) / (1.0 + power)
    torch.testing.assert_close(stand_in, torch.tanh(x))
