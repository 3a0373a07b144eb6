"""Whatever is changed after siblings have been learned, or between their calls, every number is that of single calls.

Each change is made to two models: one has learned its groups, its twin has never computed layers together.
"""

import copy
import gc
import io
import itertools
import pickle
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from torch import nn
from torch.nn.modules import module as every_module
from torch.nn.utils import parametrize
from transformers import LlamaForCausalLM

from nf4lora import NF4Config, NF4Linear, load_adapter, prepare, save_adapter
from nf4lora.adapters import siblings

from support.models import tiny_llama
from support.siblings import (
    GROUP,
    REORDERED,
    SINGLE,
    K,
    Twins,
    alone,
    assert_same,
    calls_of,
    drawn,
    gradients,
    grouped,
    layer,
    layers,
    learned,
    loss_of,
    row,
    step,
)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(siblings, "DEVICES", {"cpu"})


def lora_config(**options):
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["a", "b", "c"], "init_lora_weights": False}
    return LoraConfig(**{**defaults, **options})


def weight(model, letter="b", part="lora_B", name="default"):
    return getattr(layer(model, letter), part)[name].weight


def in_place(model, letter="b", part="lora_B"):
    with torch.no_grad():
        weight(model, letter, part).mul_(3)


# --- what keeps a layer out of its group -----------------------------------------------------------------------------


def part_of(model, letter, which):
    module = layer(model, letter)
    return {
        "layer": module,
        "base": module.base_layer,
        "A": module.lora_A["default"],
        "B": module.lora_B["default"],
        "dropout": module.lora_dropout["default"],
    }[which]


HOOKS = {
    "forward": lambda module: module.register_forward_hook(lambda m, x, y: 2 * y),
    "pre": lambda module: module.register_forward_pre_hook(lambda m, x: (2 * x[0],)),
    "pre with keywords": lambda module: module.register_forward_pre_hook(
        lambda m, x, options: ((2 * x[0],), options), with_kwargs=True),
    "always": lambda module: module.register_forward_hook(lambda m, x, y: None, always_call=True),
    "backward": lambda module: module.register_full_backward_hook(lambda m, dx, dy: (2 * dx[0],)),
    "pre backward": lambda module: module.register_full_backward_pre_hook(lambda m, dy: (2 * dy[0],)),
}  # fmt: skip


@pytest.mark.parametrize("which", ["layer", "base", "A", "B", "dropout"])
@pytest.mark.parametrize("letter", ["a", "b", "c"])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_is_called_as_before(kind, letter, which):
    twins, handles = learned(), []
    twins.change(lambda model: handles.append(HOOKS[kind](part_of(model, letter, which))))
    for _ in range(2):
        calls = twins.compare(step(), REORDERED)
        assert calls[SINGLE] >= (which != "dropout")  # which one op that needs no dropout does not call
    for handle in handles:
        handle.remove()
    for _ in range(3):
        twins.compare(step(), REORDERED)


def test_a_hook_sees_each_call_once():
    twins = learned()

    def run(model):
        seen = []
        handles = [
            layer(model, letter).register_forward_hook(
                lambda m, x, y, letter=letter: seen.append((letter, x[0].detach().clone(), y.detach().clone()))
            )
            for letter in "ac"
        ]
        result = step()(model)
        for handle in handles:
            handle.remove()
        return seen, list(result.values())

    for _ in range(3):
        twins.compare(run, REORDERED)


GLOBAL_HOOKS = {
    "forward": lambda: every_module.register_module_forward_hook(
        lambda m, x, y: 2 * y if isinstance(m, NF4Linear) else None),
    "pre": lambda: every_module.register_module_forward_pre_hook(
        lambda m, x: (2 * x[0],) if isinstance(m, NF4Linear) else None),
    "backward": lambda: every_module.register_module_full_backward_hook(
        lambda m, dx, dy: (2 * dx[0],) if isinstance(m, NF4Linear) else None),
}  # fmt: skip


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_a_hook_for_all_modules_comes_and_goes(kind):
    twins = learned()
    plain = step()(twins.ours)
    handle = GLOBAL_HOOKS[kind]()
    try:
        assert GROUP not in twins.compare(step())
        assert not torch.equal(plain["dx"], step()(twins.ours)["dx"])
    finally:
        handle.remove()
    twins.compare(step())
    assert twins.compare(step())[GROUP] == 1


class Halved(NF4Linear):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) / 2


def replaced_forward(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def subclassed_layer(model):
    class Doubled(type(layer(model, "b"))):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    layer(model, "b").__class__ = Doubled


class Tripled(nn.Module):
    def forward(self, weight):
        return 3 * weight


def another_base(seed=7, **options):
    torch.manual_seed(seed)
    return NF4Linear.from_linear(nn.Linear(K, 64, bias=False), **options)


def loaded_base(model, assign):
    layer(model, "b").base_layer.load_state_dict(another_base().state_dict(), assign=assign)


def swapped(model):
    source = row()
    torch.manual_seed(9)
    for p in source.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    state = {name: p for name, p in source.named_parameters() if "lora_" in name}
    hotswap_adapter_from_state_dict(model, state, "default", lora_config())


def two_adapters(model):
    torch.manual_seed(3)
    model.add_adapter("other", lora_config(r=8))


def offloaded(model):
    from accelerate import cpu_offload

    cpu_offload(layer(model, "b"), execution_device="cpu")


def hooked_by_accelerate(model):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    add_hook_to_module(layer(model, "b").base_layer, Doubling())


def without(model):
    """The layer b is a plain one again."""
    model.get_base_model().b = layer(model, "b").base_layer


CHANGES = {
    "nothing": lambda model: None,
    "another forward": lambda model: replaced_forward(layer(model, "b")),
    "another forward of the first": lambda model: replaced_forward(layer(model, "a")),
    "another forward of the base": lambda model: replaced_forward(layer(model, "b").base_layer),
    "another forward of A": lambda model: replaced_forward(layer(model, "b").lora_A["default"]),
    "another class": subclassed_layer,
    "another class of the base": lambda model: setattr(layer(model, "b").base_layer, "__class__", Halved),
    "a compiled layer": lambda model: layer(model, "b").compile(backend="eager"),
    "a parametrized B": lambda model: parametrize.register_parametrization(
        layer(model, "b").lora_B["default"], "weight", Tripled()),
    "a hook of accelerate": hooked_by_accelerate,
    "offloading": offloaded,
    "a layer without adapters": lambda model: layer(model, "b").enable_adapters(False),
    "a first layer without adapters": lambda model: layer(model, "a").enable_adapters(False),
    "no adapters": lambda model: [each.enable_adapters(False) for each in layers(model)],
    "a layer that is none": without,
    "another adapter": lambda model: (two_adapters(model), model.set_adapter("other")),
    "another adapter of a layer": lambda model: (two_adapters(model), layer(model, "b").set_adapter("other")),
    "both adapters": lambda model: (two_adapters(model), model.base_model.set_adapter(["default", "other"])),
    "both adapters of a layer": lambda model: (
        two_adapters(model), layer(model, "b").set_adapter(["default", "other"])),
    "a second adapter, not used": two_adapters,
    "a deleted adapter": lambda model: (
        two_adapters(model), model.set_adapter("other"), model.delete_adapter("default")),
    "a hot-swapped adapter": swapped,
    "an adapter of another kind": lambda model: (
        torch.manual_seed(3), model.add_adapter("dora", lora_config(use_dora=True)), model.set_adapter("dora")),
    "an adapter with dropout": lambda model: (
        torch.manual_seed(3), model.add_adapter("dropped", lora_config(lora_dropout=0.5)),
        model.set_adapter("dropped"), model.train()),
    "dropout of a layer": lambda model: (
        layer(model, "b").lora_dropout.__setitem__("default", nn.Dropout(0.5)), model.train()),
    "dropout in eval": lambda model: (
        layer(model, "b").lora_dropout.__setitem__("default", nn.Dropout(0.5)), model.eval()),
    "a dropout of another kind": lambda model: layer(model, "b").lora_dropout.__setitem__("default", nn.Tanh()),
    "a scale of a layer": lambda model: layer(model, "b").set_scale("default", 5.0),
    "a scale": lambda model: [each.set_scale("default", 5.0) for each in layers(model)],
    "a scale of zero": lambda model: [each.set_scale("default", 0.0) for each in layers(model)],
    "scaling as a tensor": lambda model: [each.scaling.update(default=torch.tensor(3.0)) for each in layers(model)],
    "scaling as an integer": lambda model: layer(model, "b").scaling.update(default=2),
    "a new B": lambda model: setattr(layer(model, "b").lora_B["default"], "weight", nn.Parameter(drawn(64, 4))),
    "other data of B": lambda model: setattr(weight(model), "data", 3 * weight(model).data),
    "B in place": in_place,
    "A of the first in place": lambda model: in_place(model, "a", "lora_A"),
    "a B with a bias": lambda model: (
        torch.manual_seed(3), layer(model, "b").lora_B.__setitem__("default", nn.Linear(4, 64))),
    "an adapter in bfloat16": lambda model: layer(model, "b").lora_B["default"].bfloat16(),
    "adapters in bfloat16": lambda model: [each.lora_A.bfloat16() and each.lora_B.bfloat16() for each in layers(model)],
    "a frozen A": lambda model: weight(model, "b", "lora_A").requires_grad_(False),
    "a frozen adapter": lambda model: [
        weight(model, "b", part).requires_grad_(False) for part in ("lora_A", "lora_B")],
    "frozen adapters": lambda model: model.requires_grad_(False),
    "another base": lambda model: setattr(layer(model, "b"), "base_layer", another_base()),
    "a base of another blocksize": lambda model: setattr(layer(model, "b"), "base_layer", another_base(blocksize=32)),
    "a base with plain scales": lambda model: setattr(
        layer(model, "b"), "base_layer", another_base(double_quant=False)),
    "a base in 32 bits": lambda model: (
        torch.manual_seed(3), setattr(layer(model, "b"), "base_layer", nn.Linear(K, 64))),
    "a loaded base": lambda model: loaded_base(model, False),
    "an assigned base": lambda model: loaded_base(model, True),
    "a bias that is trained": lambda model: setattr(layer(model, "b").base_layer, "bias", nn.Parameter(drawn(64))),
    "a frozen bias": lambda model: setattr(
        layer(model, "b").base_layer, "bias", nn.Parameter(drawn(64), requires_grad=False)),
    "compute_dtype of a layer": lambda model: setattr(layer(model, "b").base_layer, "compute_dtype", torch.bfloat16),
    "compute_dtype": lambda model: [
        setattr(each.base_layer, "compute_dtype", torch.bfloat16) for each in layers(model)],
    "train": lambda model: model.train(),
    "eval": lambda model: model.eval(),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_learning_counts_in_the_next_call(change):
    twins = learned()
    twins.compare(step())
    twins.change(CHANGES[change])

    def run(model):
        torch.manual_seed(4)
        with torch.no_grad():
            before = model(drawn())
        torch.manual_seed(4)
        return before, list(step()(model).items())

    tolerance = REORDERED if "bfloat16" not in change and "dtype" not in change else 1e-2
    for _ in range(4):
        twins.compare(run, tolerance)
    twins.change(lambda model: siblings.forget(model))
    twins.compare(run, tolerance)


def test_adapters_go_and_come_back():
    twins = learned()

    def run(model):
        with model.disable_adapter():
            plain = model(drawn())
        return plain, list(step()(model).items())

    for _ in range(3):
        calls = twins.compare(run)
    assert calls[GROUP] == 1
    assert calls[f"{GROUP}_backward"] == 1


def test_the_mode_decides_on_dropout():
    """Learned without dropout, trained with it, and the other way round."""
    twins = Twins(row(lora_dropout=0.5).eval())
    assert twins.learn() == [["a", "b", "c"]]

    def run(model):
        torch.manual_seed(4)
        return step()(model)

    assert twins.compare(run)[GROUP] == 1
    twins.change(lambda model: model.train())
    for _ in range(2):
        assert GROUP not in twins.compare(run)
    twins.change(lambda model: model.eval())
    twins.compare(run)
    twins.compare(run)
    trained = Twins(row(lora_dropout=0.5).train())
    trained.compare(run)
    trained.compare(run)
    trained.change(lambda model: model.eval())
    trained.compare(run)
    assert trained.compare(run)[GROUP] == 1


def test_merging_is_refused_and_a_merged_model_is_merged():
    twins = learned()
    with pytest.raises(ValueError, match="merge: the base must be in 16 or 32 bits"):
        twins.ours.merge_adapter()
    twins.compare(step())

    def merge(model):
        for each in layers(model):
            plain = nn.Linear(K, each.out_features, bias=False)
            plain.weight.data = each.base_layer.dequantize()
            each.base_layer = plain
        model.merge_adapter()

    twins.change(merge)
    twins.compare(lambda model: model(drawn()))
    twins.change(lambda model: model.unmerge_adapter())
    twins.compare(lambda model: model(drawn()))


def test_another_adapter_from_a_folder(tmp_path):
    other = row(r=8)
    torch.manual_seed(9)
    for p in other.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    save_adapter(other, tmp_path)
    twins = learned()

    def load(model):
        model.load_adapter(tmp_path, "loaded", is_trainable=True)
        model.set_adapter("loaded")

    twins.change(load)
    for _ in range(2):
        twins.compare(step())
    with alone():
        twins.compare(lambda model: model(drawn()))
    expected = other(drawn())
    for value, wanted in zip(twins.ours(drawn()), expected, strict=True):
        torch.testing.assert_close(value, wanted)


def test_a_model_that_was_loaded_computes_together(tmp_path):
    tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1).save_pretrained(tmp_path / "base")

    def base():
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=NF4Config())

    torch.manual_seed(0)
    save_adapter(prepare(base(), r=4, init_lora_weights=False), tmp_path / "adapter")
    twins = Twins(load_adapter(base(), tmp_path / "adapter").eval())
    ids = torch.arange(12).view(2, 6)

    def run(model):
        model.zero_grad(set_to_none=True)
        model(ids).logits.sum().backward()
        return gradients(model)

    twins.compare(run, REORDERED)
    assert twins.compare(run, REORDERED)[GROUP] == 2


def test_samples_with_different_adapters():
    twins = learned()
    twins.change(lambda model: (two_adapters(model), model.eval()))
    names = ["default", "other", "default", "__base__", "other"]
    for _ in range(2):
        twins.compare(lambda model: model(drawn(), adapter_names=names))
        twins.compare(step())
    base = twins.ours.get_base_model()
    with alone():
        expected = twins.twin.get_base_model().b(drawn(), adapter_names=names)
    base.a(drawn())
    assert_same([base.b(drawn(), adapter_names=names)], [expected])


def test_parameters_that_are_lent_for_a_call():
    twins = learned()

    def run(model):
        lent = {name: (2 * p.detach()).requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
        results = torch.func.functional_call(model, lent, (drawn(),))
        loss_of(results).backward()
        return [y.detach() for y in results], [p.grad for p in lent.values()]

    for _ in range(3):
        twins.compare(run)
        twins.compare(step())


@pytest.mark.slow
def test_shards_are_gathered_for_each_call(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for parts in (["b"], ["a"], ["a", "b", "c"], []):
            twins = learned()

            def shard(model, parts=parts):
                for letter in parts:
                    fully_shard(layer(model, letter), mesh=mesh)
                fully_shard(model, mesh=mesh)

            twins.change(shard)

            def run(model):
                leaf = drawn().requires_grad_()
                results = model(leaf)
                loss_of(results).backward()
                grads = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
                model.zero_grad()
                return [y.detach() for y in results], leaf.grad, grads

            for _ in range(3):
                twins.compare(run, REORDERED)
                twins.change(lambda model: [p.data.mul_(0.5) for p in model.parameters() if p.requires_grad])
    finally:
        torch.distributed.destroy_process_group()


def test_distributed_data_parallel_gets_every_gradient(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        twins = learned()
        wrapped = {id(m): nn.parallel.DistributedDataParallel(m) for m in (twins.ours, twins.twin)}

        def run(model):
            model.zero_grad()
            loss_of(wrapped[id(model)](drawn())).backward()
            return gradients(model)

        for _ in range(3):
            assert twins.compare(run)[GROUP] == 1
    finally:
        torch.distributed.destroy_process_group()


# --- what is changed between the calls of siblings -------------------------------------------------------------------


OTHER_X = {
    "another x": lambda model, x: x + 1,
    "an equal x": lambda model, x: x.clone(),
    "a view of x": lambda model, x: x.view_as(x),
    "x without a graph": lambda model, x: x.detach(),
    "fewer rows of x": lambda model, x: x[:2],
    "another dtype": lambda model, x: x.bfloat16(),
}
BETWEEN = {
    "x in place": lambda model, x: x.detach().add_(1),
    "x through a view": lambda model, x: x.detach().view(-1)[3:70].mul_(-2),
    "x under no_grad": lambda model, x: torch.no_grad()(x.zero_)(),
    "no adapters": lambda model, x: layer(model, "b").enable_adapters(False),
    "B in place": lambda model, x: in_place(model),
    "A of the last in place": lambda model, x: in_place(model, "c", "lora_A"),
    "a scale": lambda model, x: layer(model, "b").set_scale("default", 5.0),
    "a hook": lambda model, x: layer(model, "b").register_forward_hook(lambda m, x, y: 2 * y),
    "a hook on the base": lambda model, x: layer(model, "b").base_layer.register_forward_hook(lambda m, x, y: 2 * y),
    "another base": lambda model, x: setattr(layer(model, "b"), "base_layer", another_base()),
    "a frozen adapter": lambda model, x: [
        weight(model, "b", part).requires_grad_(False) for part in ("lora_A", "lora_B")],
    "another adapter": lambda model, x: (two_adapters(model), layer(model, "b").set_adapter("other")),
    "the parameter of B": lambda model, x: setattr(
        layer(model, "b").lora_B["default"], "weight", nn.Parameter(2 * weight(model).detach())),
    "no groups": lambda model, x: siblings.forget(model),
}  # fmt: skip


@pytest.mark.parametrize("what", [*OTHER_X, *BETWEEN])
@pytest.mark.parametrize("trained", [True, False])
def test_what_changes_between_two_siblings_counts_for_the_second(what, trained):
    twins = learned()

    def run(model):
        with torch.set_grad_enabled(trained):
            x = drawn().requires_grad_(trained) * 1
            done = []

            def between(letter):
                if done:
                    return None
                done.append(letter)
                if what in OTHER_X:
                    return OTHER_X[what](model, x)
                BETWEEN[what](model, x)
                return None

            return [y.detach() for y in model(x, between=between)], [y.requires_grad for y in model(x)]

    twins.compare(run)
    twins.compare(step(), REORDERED)


def test_a_change_of_x_between_two_siblings_is_in_the_gradients():
    """x is written in place with a gradient, after a layer that does not need its old value."""
    twins = learned()
    for part in ("lora_A",):
        for letter in "abc":
            twins.change(lambda model, part=part, letter=letter: weight(model, letter, part).requires_grad_(False))
    twins.compare(step())

    def run(model):
        leaf = drawn().requires_grad_()
        x = leaf * 1

        def between(letter):
            x.mul_(2) if letter == "b" else None

        results = model(x, between=between)
        loss_of(results).backward()
        return [y.detach() for y in results], leaf.grad

    for _ in range(3):
        twins.compare(run, REORDERED)


MODES = {
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another autocast": lambda: torch.autocast("cpu", torch.float16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
}


@pytest.mark.parametrize(("first", "second"), itertools.permutations(MODES, 2))
def test_each_call_is_of_the_mode_it_is_made_in(first, second):
    twins = learned()

    def run(model):
        base = model.get_base_model()
        with torch.enable_grad():
            x = drawn().requires_grad_()
        with MODES[first]():
            results = [base.a(x)]
        with MODES[second]():
            results += [base.b(x)]
        results += [base.c(x)]
        return [(y.dtype, y.requires_grad, y.is_inference(), y.detach().clone()) for y in results]

    for _ in range(2):
        twins.compare(run)
    twins.compare(step(), REORDERED)


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_in_another_mode_than_the_one_that_was_watched(mode):
    twins = learned()

    def run(model):
        with MODES[mode]():
            return [(y.dtype, y.requires_grad, y.is_inference(), y.detach().clone()) for y in model(drawn())]

    for _ in range(3):
        twins.compare(run)
        twins.compare(step())
    siblings.forget(twins.ours)
    for _ in range(3):  # watched in this mode, then trained
        twins.compare(run)
    for _ in range(2):
        twins.compare(step())


def test_tensors_of_inference_mode_have_no_version():
    twins = learned()

    def run(model):
        with torch.inference_mode():
            x = drawn() * 1
            first = model(x)
            x.add_(1)
            second = model(x)

            def between(letter):
                x.mul_(2)

            third = model(x, between=between)
        with torch.no_grad():
            fourth = model(x)
        return [y.clone() for y in (*first, *second, *third, *fourth)]

    for _ in range(3):
        twins.compare(run)


# --- predictions that fail -------------------------------------------------------------------------------------------

ORDERS = ["abc", "acb", "bac", "cba", "ab", "a", "bc", "c", "aabbcc", "abab", "abcabc", "aba", "cabcb", ""]


@pytest.mark.parametrize("letters", ORDERS)
def test_another_order_of_calls_than_the_one_that_was_seen(letters):
    twins = learned()

    def run(model):
        if letters:
            return step(letters=letters)(model)
        return model(drawn(), letters=letters)

    for _ in range(12):
        twins.compare(run, REORDERED)
    assert twins.compare(step(), REORDERED)[GROUP] <= 1
    for _ in range(3):
        twins.compare(run, REORDERED)


def test_orders_that_never_repeat():
    twins = learned("abcd")
    for number, letters in enumerate(itertools.permutations("abcd")):
        twins.compare(step(drawn(seed=number), letters=letters[: 1 + number % 4] + letters), REORDERED)


def test_a_group_ends_when_it_is_predicted_wrongly_again_and_again():
    twins = learned()
    for _ in range(20):
        twins.compare(step(letters="a"))
    assert grouped(twins.ours) == []
    assert twins.compare(step(letters="a")) == {SINGLE: 1, f"{SINGLE}_backward": 1}


def test_one_wrong_prediction_does_not_end_a_group():
    twins = learned()
    twins.compare(step(letters="a"))
    twins.compare(step())
    assert twins.compare(step())[GROUP] == 1


def test_a_layer_that_is_called_twice_with_different_tensors():
    twins = learned()

    def run(model):
        base, leaves = model.get_base_model(), [drawn(seed=seed).requires_grad_() for seed in range(2)]
        results = []
        for letter in "abc":
            results += [getattr(base, letter)(leaf) for leaf in leaves]
        loss_of(results).backward()
        return [y.detach() for y in results], [leaf.grad for leaf in leaves], gradients(model)

    for _ in range(8):
        twins.compare(run, REORDERED)


def test_one_tensor_in_two_passes():
    """The second pass has results and a graph of its own, with the parameters of then."""
    twins = learned()

    def run(model):
        leaf = drawn().requires_grad_()
        first = model(leaf)
        loss_of(first).backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.01)
        second = model(leaf)
        loss_of(second).backward()
        return [y.detach() for y in (*first, *second)], leaf.grad, gradients(model)

    for _ in range(3):
        assert twins.compare(run)[GROUP] == 2


def test_a_result_that_waits_is_not_given_out_after_a_step():
    twins = learned()

    def run(model):
        x = drawn()
        first = layer(model, "a")(x)
        in_place(model, "b")
        in_place(model, "c", "lora_A")
        return first, layer(model, "b")(x), layer(model, "c")(x)

    for _ in range(3):
        twins.compare(run)


@torch.no_grad()  # a graph that waits with the result would keep x
def test_a_tensor_that_is_gone_is_not_taken_for_its_successor():
    """A new tensor is often an object at the address of the last one, with the same version."""
    twins = Twins(row())
    a, b = (layer(twins.ours, letter) for letter in "ab")
    reused = 0
    with torch.no_grad():
        for seed in range(20):
            x, other = drawn(), drawn(seed=seed + 1)
            address = id(x)
            a(x)
            del x
            x = other.view_as(other)
            reused += id(x) == address
            b(x)
    assert reused
    assert siblings.learn(twins.ours, lambda: None) == []


def test_tensors_that_follow_each_other_at_one_address_are_no_siblings():
    twins = Twins(row())
    values = [drawn(seed=seed) for seed in range(3)]

    def run(model):
        return [layer(model, letter)(x * 2) for letter, x in zip("abc", values, strict=True)]

    for _ in range(4):
        assert GROUP not in twins.compare(run)
    assert siblings.learn(twins.ours, lambda: run(twins.ours)) == []
    assert GROUP not in twins.compare(run)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("at", ["b", "c"])
@pytest.mark.parametrize("watched", [True, False])
def test_an_error_between_two_siblings(error, at, watched):
    twins = learned() if watched else Twins(row())

    def fail(letter):
        if letter == at:
            raise error("stopped")

    def run(model):
        leaf = drawn().requires_grad_()
        with pytest.raises(error, match="stopped"):
            model(leaf, between=fail)
        in_place(model, "b")  # the same tensor again, with other parameters
        results = model(leaf)
        loss_of(results).backward()
        return [y.detach() for y in results], leaf.grad, gradients(model)

    twins.compare(run, REORDERED)
    for _ in range(3):
        twins.compare(step(), REORDERED)
    assert twins.compare(step(), REORDERED)[GROUP] == 1


def test_a_wrong_input_raises_what_it_raised():
    twins = learned()
    for x in (torch.zeros(3, K, dtype=torch.int64), drawn(3, K + 64), drawn(3, 1), drawn(3, K).double(), None):

        def run(model, x=x):
            with pytest.raises(Exception) as error:  # the twin says which
                model(x)
            return type(error.value).__name__

        twins.compare(run)
        assert twins.compare(step())[GROUP] == 1


# --- two of everything -----------------------------------------------------------------------------------------------


def test_two_models_do_not_mix():
    first, second = learned(), learned()
    second.change(in_place)
    interleaved = []
    for twins in (first, second):
        with alone():
            interleaved.append([layer(twins.twin, letter)(drawn()) for letter in "abc"])
    x = drawn()
    got = [[], []]
    for letter in "abc":
        for number, twins in enumerate((first, second)):
            got[number].append(layer(twins.ours, letter)(x))
    assert_same(got, interleaved)
    for twins in (first, second):
        twins.compare(step(), REORDERED)


def test_models_that_share_a_layer():
    twins, others = learned(), learned()
    for mine, other in ((twins.ours, others.ours), (twins.twin, others.twin)):
        other.get_base_model().b = layer(mine, "b")
    for _ in range(6):
        twins.compare(step())
        others.compare(step(drawn(seed=1)))
    twins.change(in_place)
    for _ in range(2):
        others.compare(step())
        twins.compare(step())


def test_one_layer_under_two_names():
    twins = Twins(row("abc"))
    twins.change(lambda model: setattr(model.get_base_model(), "c", layer(model, "a")))
    for _ in range(6):
        twins.compare(step(), REORDERED)


def test_one_tensor_for_the_layers_of_two_models():
    twins, others = Twins(row("ab")), Twins(row("ab"))
    others.change(in_place)

    def run(model):
        other = {id(twins.ours): others.ours, id(twins.twin): others.twin}[id(model)]
        leaf = drawn().requires_grad_()
        results = [*model(leaf), *other(leaf)]
        loss_of(results).backward()
        grads = leaf.grad, gradients(model), gradients(other)
        model.zero_grad()
        other.zero_grad()
        return [y.detach() for y in results], *grads

    for _ in range(4):
        twins.compare(run, REORDERED)


def in_threads(*functions):
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("same_x", [True, False])
def test_two_threads(shared, same_x):
    """Both are between two siblings at the same time, in every round."""
    models = [learned() for _ in range(2)]
    if shared:
        models[1] = models[0]
    tensors = [drawn(seed=0 if same_x else seed) for seed in range(2)]
    if same_x:
        tensors[1] = tensors[0]
    with alone():
        expected = [m.twin(x) for m, x in zip(models, tensors, strict=True)]
    meeting, got = threading.Barrier(2, timeout=30), [[], []]

    def work(number):
        def run():
            for _ in range(10):
                results = models[number].ours(tensors[number], between=lambda letter: meeting.wait() and None)
                got[number].append([y.detach() for y in results])

        return run

    in_threads(work(0), work(1))
    for number in range(2):
        assert len(got[number]) == 10
        for results in got[number]:
            assert_same(results, [y.detach() for y in expected[number]])
    for twins in models:
        twins.compare(step(), REORDERED)


def test_threads_without_order():
    twins = learned()
    tensors = [drawn(seed=seed) for seed in range(4)]
    with alone(), torch.no_grad():
        expected = [twins.twin(x) for x in tensors]

    def work(number):
        def run():
            for _ in range(40):
                with torch.no_grad():
                    assert_same(twins.ours(tensors[number]), expected[number])

        return run

    in_threads(*(work(number) for number in range(4)))


def test_a_backward_pass_in_another_thread():
    def run(model):
        leaf = drawn().requires_grad_()
        loss = loss_of(model(leaf))
        in_threads(loss.backward)
        return leaf.grad, gradients(model)

    twins = learned()
    for _ in range(3):
        twins.compare(run)


def test_siblings_called_in_different_threads():
    twins = learned()

    def run(model):
        x, results = drawn(), []
        for letter in "abc":
            in_threads(lambda letter=letter: results.append(layer(model, letter)(x)))
        return [y.detach() for y in results]

    for _ in range(4):
        twins.compare(run)


# --- copies and files ------------------------------------------------------------------------------------------------


def written(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "file": lambda model: torch.load(io.BytesIO(written(model)), weights_only=False),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("waiting", [False, True])
def test_a_copy_is_a_model_of_its_own(how, waiting):
    """Even one that is made between the calls of two siblings, where a result waits for the second."""
    twins = learned()
    x = drawn().requires_grad_()
    if waiting:
        layer(twins.ours, "a")(x)
    ours, twin = COPIES[how](twins.ours), COPIES[how](twins.twin)
    for model in (ours, twin):
        in_place(model)
    with alone():
        expected = layer(twin, "b")(x)
    assert_same([layer(ours, "b")(x).detach()], [expected.detach()])
    copies = Twins(ours)
    copies.twin = twin
    for _ in range(3):
        copies.compare(step())
        twins.compare(step(), REORDERED)
    copies.compare(step())
    assert copies.compare(step())[GROUP] == 1
    del twins
    gc.collect()
    copies.compare(step())


def test_files_hold_what_they_held():
    twins = learned()
    step()(twins.ours)
    layer(twins.ours, "a")(drawn().requires_grad_())
    with alone():
        step()(twins.twin)
    twins.change(lambda model: model.zero_grad())
    ours, twin = twins.ours, twins.twin
    assert list(ours.state_dict()) == list(twin.state_dict())
    assert list(get_peft_model_state_dict(ours)) == list(get_peft_model_state_dict(twin))
    for names in ("named_modules", "named_parameters", "named_buffers"):
        assert [name for name, _ in getattr(ours, names)()] == [name for name, _ in getattr(twin, names)()]
    assert abs(len(written(ours)) - len(written(twin))) < 4096
    assert repr(ours) == repr(twin)


def test_a_state_dict_is_loaded():
    twins, source = learned(), row()
    torch.manual_seed(8)
    for p in source.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    for assign in (False, True):
        twins.change(lambda model, assign=assign: model.load_state_dict(source.state_dict(), assign=assign))
        assert twins.compare(step())[GROUP] == 1
    assert_same(twins.ours(drawn()), source(drawn()))


def test_a_model_that_is_unloaded_has_no_groups():
    twins = learned()
    plain = [copy.deepcopy(twins.ours).unload(), copy.deepcopy(twins.twin).unload()]
    assert siblings.groups(plain[0]) == []
    assert_same(plain[0](drawn()), plain[1](drawn()))
    assert calls_of(lambda: plain[0](drawn())) == {SINGLE: 3}
