"""When a run waits for the device: never in a batch, at most once a step, and nothing that is not finite is saved.

A CPU waits for nothing, so the tests count the operations that would wait on a GPU. A step whose numbers are still
under way is imitated by `Reading.has_arrived`, which says so.
"""
# ruff: noqa: F811  (fixtures are imported)

import json
import sys
from collections import defaultdict

import pytest

pytest.importorskip("trl")
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nf4lora import PagedAdamW
from nf4lora.compat.transformers import known_batch
from nf4lora.train.batch import KNOWN, Known
from nf4lora.train.errors import RunError
from nf4lora.train.reading import Reading, read
from nf4lora.train.trainer import Trainer

from support.bits import assert_same_bits
from support.models import tiny_llama
from support.train_runs import adapter, base, data, equal, logged, options, quick, train  # noqa: F401

# What copies a value or a size that depends on values from a GPU to the host.
WAITS = {
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero",
    "aten::masked_select", "aten::masked_scatter", "aten::_unique2", "aten::unique_dim", "aten::repeat_interleave",
}  # fmt: skip
# Where tensors stay on the host whatever the device is: rows and batches before they are moved, counts of steps.
ON_THE_HOST = (
    *("torch/utils/data/", "trl/trainer/sft_trainer.py:torch_call"),
    *("train/batch.py:of", "optim/bucket.py:step"),
)


class Waits:
    """Counts reads of the device in a run, by the optimizer step and by whether a batch was being computed."""

    def __init__(self, monkeypatch):
        self.in_batch, self.in_step = [], defaultdict(list)  # what was read, and from where
        self.batch, self.step, self.running = False, 0, False
        waits = self

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                name = func._schema.name
                by_mask = name.startswith(("aten::index", "aten::_index_put")) and isinstance(args[1], (list, tuple))
                if name in WAITS or (by_mask and any(i is not None and i.dtype == torch.bool for i in args[1])):
                    waits.note(name)
                return func(*args, **(kwargs or {}))

        class Methods(TorchFunctionMode):  # those that read memory and call no operation
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if getattr(func, "__name__", "") in ("tolist", "numpy", "__array__"):
                    waits.note(func.__name__)
                return func(*args, **(kwargs or {}))

        self.modes = Operations, Methods
        training_step, gradient_norm, run = Trainer.training_step, Trainer.gradient_norm, Trainer._run_epoch

        def counted_batch(trainer, *args, **kwargs):
            self.batch = True
            try:
                return training_step(trainer, *args, **kwargs)
            finally:
                self.batch = False

        def counted_step(trainer, model):
            self.step += 1
            return gradient_norm(trainer, model)

        def counted_epoch(trainer, *args, **kwargs):
            self.running = True
            with Methods(), Operations():
                run(trainer, *args, **kwargs)
            self.running = False

        monkeypatch.setattr(Trainer, "training_step", counted_batch)
        monkeypatch.setattr(Trainer, "gradient_norm", counted_step)
        monkeypatch.setattr(Trainer, "_run_epoch", counted_epoch)

    def note(self, name):
        frame, stack, on_the_host = sys._getframe(2), [], False
        while frame is not None:
            stack.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")
            if stack[-1].endswith("transformers/trainer.py:_maybe_log_save_evaluate"):
                on_the_host = frame.f_locals["tr_loss"] is not frame.f_locals["self"].summed_loss
            frame = frame.f_back
        if not (on_the_host or any(place in line for line in stack for place in ON_THE_HOST)):
            entry = (name, *[line for line in stack if "site-packages/torch/" not in line][:3])
            (self.in_batch if self.batch else self.in_step[self.step]).append(entry)


DATA = {"padded": (), "packed": ("--packing", "--max_length", "64")}


@pytest.mark.parametrize(
    ("rows", "optim", "limit", "more"),
    [
        ("padded", "adamw", "1", ()),
        ("packed", "adamw", "0", ()),
        ("padded", "paged_adamw_32bit", "0", ("--gradient_checkpointing", "false")),
        ("packed", "paged_adamw_8bit", "1", ()),
        ("padded", "paged_adamw_8bit", "1", ("--lora_dropout", "0.1", "--dtype", "bfloat16")),
        ("packed", "paged_adamw_32bit", "0", ()),
    ],
)
@pytest.mark.parametrize("logging", ["1", "3"])
def test_a_step_waits_once_and_its_batches_never(base, data, tmp_path, monkeypatch, rows, optim, limit, more, logging):
    waits = Waits(monkeypatch)
    train(*options(base, data, tmp_path / "out", "--max_steps", "4", "--gradient_accumulation_steps", "4",
                   "--per_device_train_batch_size", "1", "--optim", optim, "--max_grad_norm", limit, "--logging_steps",
                   logging, *DATA[rows], *more))  # fmt: skip
    assert waits.in_batch == []
    assert {step: [name for name, *_ in reads] for step, reads in waits.in_step.items()} == {
        step: ["tolist"] for step in range(1, 5)
    }


def test_the_counter_sees_what_waits(base, data, tmp_path, monkeypatch):
    waits = Waits(monkeypatch)
    loss = Trainer.compute_loss

    def asking(trainer, model, inputs, *args, **kwargs):
        inputs["labels"][inputs["labels"] == -100].tolist()
        return loss(trainer, model, {name: each for name, each in inputs.items() if name != KNOWN}, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", asking)
    train(*options(base, data, tmp_path / "out", "--max_steps", "1", "--gradient_accumulation_steps", "1"))
    assert [entry[0] for entry in waits.in_batch] == ["aten::index", "tolist"]


# ---- numbers that arrive a step later, as on a GPU ------------------------------------------------------------------


@pytest.fixture
def late(monkeypatch):
    """The numbers of a step arrive late."""
    monkeypatch.setattr(Reading, "has_arrived", lambda self: False)


@pytest.mark.parametrize("optim", ["adamw", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_late_numbers_change_nothing_that_is_written(base, data, tmp_path, monkeypatch, optim):
    common = ("--optim", optim, "--logging_steps", "3", "--val_size", "4", "--eval_steps", "4", "--save_steps", "5")
    keys = ("step", "loss", "grad_norm", "mean_token_accuracy", "num_tokens", "learning_rate", "eval_loss")
    train(*options(base, data, tmp_path / "early", *common))
    monkeypatch.setattr(Reading, "has_arrived", lambda self: False)
    read_at, gradient_norm, values = [], Trainer.gradient_norm, Reading.values
    steps = []
    monkeypatch.setattr(Trainer, "gradient_norm", lambda *a: (steps.append(1), gradient_norm(*a))[1])
    monkeypatch.setattr(Reading, "values", lambda self: (read_at.append(len(steps)), values(self))[1])
    train(*options(base, data, tmp_path / "late", *common))
    assert equal(adapter(tmp_path / "early"), adapter(tmp_path / "late"))
    assert equal(adapter(tmp_path / "early" / "checkpoint-5"), adapter(tmp_path / "late" / "checkpoint-5"))
    assert logged(tmp_path / "early", *keys) == logged(tmp_path / "late", *keys)
    # Step 1 is checked and logged; 2 is read in 3, which is logged; 4 is evaluated, 5 saved, 6 the last. In between
    # come the evaluations before, after step 4 and at the end.
    assert read_at == [0, 1, 3, 3, 4, 4, 5, 6, 6]


POISONS = {"loss": "the loss is nan in step 3", "gradient": r"the gradient of .*lora_B.* is not finite in step 3"}


def poison(monkeypatch, what):
    """Make the loss or one gradient of the third step NaN or infinite."""
    step, loss = Trainer.training_step, Trainer._loss

    def of_gradient(trainer, model, *args, **kwargs):
        result = step(trainer, model, *args, **kwargs)
        if trainer.state.global_step == 2:
            next(p for n, p in model.named_parameters() if "lora_B" in n).grad[0, 0] = float("inf")
        return result

    def of_loss(trainer, *args):
        result = loss(trainer, *args)
        return result + float("nan") if trainer.state.global_step == 2 else result

    if what == "gradient":
        monkeypatch.setattr(Trainer, "training_step", of_gradient)
    else:
        monkeypatch.setattr(Trainer, "_loss", of_loss)


@pytest.mark.parametrize("what", POISONS)
@pytest.mark.parametrize("optim", ["adamw", "paged_adamw_32bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("limit", ["1", "0"])
def test_what_is_not_finite_is_refused_a_step_later_and_leaves_nothing(
    base, data, tmp_path, monkeypatch, what, optim, limit
):
    folders = {}
    for name in ("early", "late"):
        with monkeypatch.context() as patch:
            poison(patch, what)
            if name == "late":
                patch.setattr(Reading, "has_arrived", lambda self: False)
            folders[name] = tmp_path / name
            with pytest.raises(RunError, match=POISONS[what]):
                train(*options(base, data, folders[name], "--logging_steps", "10", "--save_steps", "10", "--optim",
                               optim, "--max_grad_norm", limit, "--lr_scheduler_type", "linear"))  # fmt: skip
    for folder in folders.values():  # the steps before were saved, as after any error, and nothing else
        assert [each.name for each in folder.glob("checkpoint-*")] == ["checkpoint-2"]
        assert not (folder / "adapter_model.safetensors").exists()
        assert max(logged(folder, "step")) == (1,)
    early, late = (folder / "checkpoint-2" for folder in folders.values())
    assert equal(adapter(early), adapter(late))
    assert all(tensor.isfinite().all() for tensor in adapter(late).values())
    states = [json.loads((each / "trainer_state.json").read_text()) for each in (early, late)]
    for key in ("global_step", "epoch"):
        assert states[0][key] == states[1][key], key
    assert states[0]["global_step"] == 2
    schedules = [torch.load(each / "scheduler.pt", weights_only=False) for each in (early, late)]
    assert schedules[0] == schedules[1]
    moments = [torch.load(each / "optimizer.pt", weights_only=False) for each in (early, late)]
    assert moments[0]["param_groups"] == moments[1]["param_groups"]
    for number, entry in moments[0]["state"].items():
        assert entry["step"] == moments[1]["state"][number]["step"] == 2
        if optim != "paged_adamw_8bit":  # whose codes are rounded once more
            for name, value in entry.items():
                assert_same_bits(value, moments[1]["state"][number][name])


@pytest.mark.parametrize("what", POISONS)
@pytest.mark.parametrize(
    "more",
    [("--save_steps", "3"), ("--max_steps", "3"), ("--logging_steps", "3"), ("--val_size", "4", "--eval_steps", "3")],
    ids=["saved", "last", "logged", "evaluated"],
)
def test_nothing_of_a_bad_step_is_written_where_it_would_be_saved_at_once(
    base, data, tmp_path, monkeypatch, late, what, more
):
    poison(monkeypatch, what)
    out = tmp_path / "out"
    with pytest.raises(RunError, match=POISONS[what]):
        train(*options(base, data, out, "--logging_steps", "10", "--save_steps", "10", *more))
    assert [each.name for each in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (out / "adapter_model.safetensors").exists()
    assert all(step < 3 for (step,) in logged(out, "step"))
    history = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert all(entry["step"] < 3 for entry in history)


def test_another_optimizer_waits_before_its_step(base, data, tmp_path, monkeypatch, late):
    monkeypatch.setattr("nf4lora.train.optimizer.can_leave_out", lambda used: False)
    poison(monkeypatch, "gradient")
    step, taken = torch.optim.AdamW.step, []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: (taken.append(1), step(*a, **k))[1])
    with pytest.raises(RunError, match="is not finite in step 3"):
        train(*options(base, data, tmp_path / "out", "--logging_steps", "10"))
    assert len(taken) == 2


def test_an_error_a_step_later_does_not_save_the_bad_step(base, data, tmp_path, monkeypatch, late):
    """What is under way when another error ends the run is read before anything is saved."""
    poison(monkeypatch, "gradient")
    poisoned = Trainer.training_step

    def failing(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise RuntimeError("the power fails")
        return poisoned(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", failing)
    with pytest.raises(RuntimeError, match="the power fails"):
        train(*options(base, data, tmp_path / "out", "--logging_steps", "10", "--save_steps", "10"))
    assert [each.name for each in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_scalars_of_several_dtypes_arrive_in_their_order():
    scalars = [torch.tensor(value) for value in (0.1, 1 << 40, [2.5], True)]
    scalars.append(torch.tensor(1e300, dtype=torch.float64))
    reading = Reading(scalars)
    assert reading.has_arrived()
    assert reading.values() == [torch.tensor(0.1).item(), float(1 << 40), 2.5, 1.0, 1e300]
    assert read([]) == []


def test_the_host_knows_what_a_batch_holds():
    labels = torch.tensor([[-100, 5, -100, 7], [3, -100, -100, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    known = Known.of({"labels": labels, "attention_mask": mask})
    assert known.positions.tolist() == [0, 2, 6]  # the token before each label; the first label of a row has none
    assert (known.seen, known.padded, known.packed) == (7, True, False)
    places = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]])
    known = Known.of({"labels": labels, "position_ids": places})
    assert (known.seen, known.padded, known.packed) == (8, False, True)
    assert not Known.of({"labels": labels, "position_ids": places[:1]}).packed
    assert not Known.of({"labels": labels, "attention_mask": torch.ones_like(mask)}).padded
    moved = known.to("meta", non_blocking=True)
    assert moved.positions.is_meta
    assert (moved.seen, moved.packed) == (8, True)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["full", "padded", "packed", "one sample"])
def test_known_masks_are_those_that_transformers_builds(implementation, kind):
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    ids = torch.arange(24).view(2, 12)
    inputs = {"input_ids": ids}
    if kind in ("full", "padded"):
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][1, 7:] = int(kind == "full")
    else:
        inputs["position_ids"] = torch.arange(12).expand(2, 12).clone()
        inputs["position_ids"][:, 5:] -= 5 if kind == "packed" else 0
    known = Known.of({**inputs, "labels": ids})
    expected = model(**inputs).logits
    with known_batch(ids.shape, known.padded, known.packed):
        assert_same_bits(model(**inputs).logits, expected)
    assert_same_bits(model(**inputs).logits, expected)


def test_transformers_has_the_functions_that_ask_the_device():
    from transformers import masking_utils

    for name in ("fast_all", "find_packed_sequence_indices", "is_tracing"):
        assert hasattr(masking_utils, name), name


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("bits", [32, 8])
def test_paged_adamw_leaves_a_step_out_where_found_inf_says_so(bits, max_grad_norm):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(300, generator=generator), torch.randn(4, 7, generator=generator)]
    grads = [[torch.randn(p.shape, generator=generator) for p in start] for _ in range(3)]

    def run(steps):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = PagedAdamW(params, lr=0.1, bits=bits, max_grad_norm=max_grad_norm)
        for number, left_out in steps:
            for p, grad in zip(params, grads[number], strict=True):
                p.grad = grad.clone()
            optimizer.found_inf = None if left_out is None else torch.tensor(float(left_out))
            before = [p.detach().clone() for p in params]
            optimizer.step()
            if left_out:
                for p, value in zip(params, before, strict=True):
                    assert_same_bits(p.detach(), value)
                optimizer.uncount_step()
        return params, optimizer

    params, optimizer = run([(0, 0), (1, 1), (2, 0)])
    expected, other = run([(0, None), (2, None)])
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0}
    for p, value in zip(params, expected, strict=True):
        if bits == 32:
            assert_same_bits(p.detach(), value.detach())
            for name in ("exp_avg", "exp_avg_sq"):
                assert_same_bits(optimizer.state[p][name], other.state[value][name])
        else:  # a block's largest moment decodes to 0.993 of it where it is negative, and to the whole where not
            torch.testing.assert_close(p.detach(), value.detach(), rtol=0, atol=0.1 * 0.1)
