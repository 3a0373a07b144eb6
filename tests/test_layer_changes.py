"""Whatever is changed about a layer that has been used, its next call computes what PEFT does after the same change.

The layer looks everything up at each call and keeps nothing, so that nothing can be out of date; a call that went past
one of the changes below would return the result from before.
"""

import contextlib
import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from nf4lora import ops
from nf4lora.adapters import lora_layer
from nf4lora.adapters.lora_layer import NF4LoraLinear
from nf4lora.nn.linear import NF4Linear

from support.adapted import relative
from support.bits import assert_same_bits

K, N = 128, 64


def lora_config(**options):
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["fc"], "init_lora_weights": False}
    return LoraConfig(**{**defaults, **options})


class Side:
    """A model of one layer with the adapters "default" and "other": ours over NF4, or PEFT's over the same weights."""

    def __init__(self, packed, bias, **options):
        lora_layer.install()
        torch.manual_seed(0)
        linear = NF4Linear.from_linear(nn.Linear(K, N, bias))
        if not packed:
            plain = nn.Linear(K, N, bias)
            plain.weight.data, plain.bias = linear.dequantize(), linear.bias
            linear = plain
        torch.manual_seed(1)
        self.packed = packed
        self.model = get_peft_model(nn.Sequential(OrderedDict(fc=linear)), lora_config(**options))
        self.model.add_adapter("other", lora_config(r=8))
        assert isinstance(self.layer, NF4LoraLinear) is packed

    @property
    def layer(self):
        return self.model.get_base_model().fc

    def result(self):
        """Output, and gradients of x, A and B where they have one."""
        x = torch.linspace(-1, 1, 3 * K).sin().view(3, K).requires_grad_()
        with torch.no_grad():
            alone = self.model(x.detach())
        self.model.zero_grad()
        y = self.model(x)
        assert_same_bits(y.detach(), alone)
        y.square().sum().backward()
        adapters = [p.grad for name, p in self.model.named_parameters() if "lora_" in name and p.grad is not None]
        return [y.detach(), x.grad, *adapters]


def pair(bias=True, **options):
    return Side(True, bias, **options), Side(False, bias, **options)


def compare(ours, theirs):
    results = ours.result(), theirs.result()
    assert len(results[0]) == len(results[1])
    for value, expected in zip(*results, strict=True):
        # float32 sums in another order; bfloat16 where the change says so
        assert relative(value.float(), expected.float()) < (1e-5 if value.dtype == torch.float32 else 2e-2)
    return results[0]


def differ(a, b):
    return len(a) != len(b) or any(relative(x.float(), y.float()) > 1e-3 for x, y in zip(a, b, strict=True))


def new_weight(side, which):
    module = getattr(side.layer, which)["default"]
    module.weight = nn.Parameter(3 * module.weight.detach())


def new_data(side, which):
    module = getattr(side.layer, which)["default"]
    module.weight.data = 3 * module.weight.data


def in_place(side, which):
    with torch.no_grad():
        getattr(side.layer, which)["default"].weight.mul_(3)


def other_base(side, scale=2.0):
    """Another base layer with other codes and scales, the same for both sides."""
    torch.manual_seed(7)
    linear = NF4Linear.from_linear(nn.Linear(K, N))
    linear.weight_nested.data = (linear.weight_nested.data.view(torch.float32) * scale).view(torch.int32)
    if side.packed:
        return linear
    plain = nn.Linear(K, N)
    plain.weight.data, plain.bias = linear.dequantize(), linear.bias
    return plain


def replaced_base(side):
    side.layer.base_layer = other_base(side)


def loaded_base(side, assign):
    state = other_base(side).state_dict()
    side.layer.base_layer.load_state_dict(state, assign=assign)


def data_of_base(side):
    for name, value in other_base(side).named_parameters():
        dict(side.layer.base_layer.named_parameters())[name].data = value.data


def doubled_forward(module):
    forward = module.forward
    module.forward = lambda x, *args, **kwargs: 2 * forward(x, *args, **kwargs)


def hooked(side, which):
    module = {"layer": side.layer, "base": side.layer.base_layer, "A": side.layer.lora_A["default"]}[which]
    module.register_forward_hook(lambda module, inputs, output: 2 * output)


def hooked_backward(side):
    side.layer.base_layer.register_full_backward_hook(lambda module, given, got: (2 * given[0],))


def swapped(side):
    source = Side(side.packed, True)
    torch.manual_seed(9)
    for p in source.layer.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    state = {name: p for name, p in source.model.named_parameters() if "lora_" in name and "default" in name}
    hotswap_adapter_from_state_dict(side.model, state, "default", lora_config())


def reloaded(side):
    file = io.BytesIO()
    torch.save(side.model, file)
    file.seek(0)
    side.model = torch.load(file, weights_only=False)
    in_place(side, "lora_B")


def copied(side):
    side.model = copy.deepcopy(side.model)
    in_place(side, "lora_B")


def pickled(side):
    side.model = pickle.loads(pickle.dumps(side.model))
    in_place(side, "lora_A")


def offloaded(side):
    from accelerate import cpu_offload

    in_place(side, "lora_A")
    cpu_offload(side.model, execution_device="cpu")
    assert side.layer.base_layer.weight.is_meta


def without_dropout(side):
    side.layer.lora_dropout["default"] = nn.Identity()
    side.layer.set_scale("default", 3.0)


CHANGES = {
    "another adapter": lambda side: side.model.set_adapter("other"),
    "another adapter of the layer": lambda side: side.layer.set_adapter("other"),
    "both adapters": lambda side: side.layer.set_adapter(["default", "other"]),
    "an added adapter": lambda side: (
        torch.manual_seed(3), side.model.add_adapter("third", lora_config(r=16)), side.model.set_adapter("third")),
    "a deleted adapter": lambda side: (side.model.set_adapter("other"), side.model.delete_adapter("default")),
    "no adapters": lambda side: side.layer.enable_adapters(False),
    "a scale": lambda side: side.layer.set_scale("default", 5.0),
    "a scaled layer": lambda side: side.layer.scale_layer(0.25),
    "scaling as a number": lambda side: side.layer.scaling.update(default=7),
    "scaling as a tensor": lambda side: side.layer.scaling.update(default=torch.tensor(7.0)),
    "a new A": lambda side: new_weight(side, "lora_A"),
    "a new B": lambda side: new_weight(side, "lora_B"),
    "other data of A": lambda side: new_data(side, "lora_A"),
    "other data of B": lambda side: new_data(side, "lora_B"),
    "A in place": lambda side: in_place(side, "lora_A"),
    "B in place": lambda side: in_place(side, "lora_B"),
    "another layer for B": lambda side: (
        torch.manual_seed(4), side.layer.lora_B.__setitem__("default", nn.Linear(4, N, bias=False))),
    "a B with a bias": lambda side: (
        torch.manual_seed(4), side.layer.lora_B.__setitem__("default", nn.Linear(4, N))),
    "a base in its place": replaced_base,
    "a loaded base": lambda side: loaded_base(side, False),
    "an assigned base": lambda side: loaded_base(side, True),
    "other data of the base": data_of_base,
    "another bias": lambda side: nn.init.constant_(side.layer.base_layer.bias, 3.0),
    "a bias that is trained": lambda side: (
        side.layer.base_layer.bias.requires_grad_(), nn.init.constant_(side.layer.base_layer.bias, 3.0)),
    "a hook on the layer": lambda side: hooked(side, "layer"),
    "a hook on the base": lambda side: hooked(side, "base"),
    "a hook on A": lambda side: hooked(side, "A"),
    "a backward hook on the base": hooked_backward,
    "another forward of A": lambda side: doubled_forward(side.layer.lora_A["default"]),
    "a hot-swapped adapter": swapped,
    "a deep copy": copied,
    "a pickle": pickled,
    "a file": reloaded,
    "offloading": offloaded,
    "no dropout": without_dropout,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_used_layer_computes_what_peft_does_after_a_change(change):
    ours, theirs = pair()
    before = compare(ours, theirs)
    for side in (ours, theirs):
        CHANGES[change](side)
    assert differ(before, compare(ours, theirs))


def test_what_is_undone_is_as_before():
    ours, theirs = pair()
    before = compare(ours, theirs)
    undone = (
        lambda side: side.model.disable_adapter(),
        lambda side: changed(side.model.set_adapter, "other", "default"),
        lambda side: removed(side.layer.base_layer.register_forward_hook(lambda m, i, y: 2 * y)),
        lambda side: removed(side.layer.lora_A["default"].register_forward_pre_hook(lambda m, i: (2 * i[0],))),
        lambda side: removed(register_module_forward_hook(lambda m, i, y: 2 * y)),
    )
    for change in undone:
        with change(ours), change(theirs) if change is not undone[-1] else contextlib.nullcontext():
            assert differ(before, compare(ours, theirs) if change is not undone[-1] else ours.result())
        for value, expected in zip(compare(ours, theirs), before, strict=True):
            assert_same_bits(value, expected)


@contextlib.contextmanager
def changed(change, there, back):
    change(there)
    yield
    change(back)


@contextlib.contextmanager
def removed(handle):
    yield
    handle.remove()


def test_a_hook_for_all_modules_comes_and_goes_with_the_base_layer_called():
    side, called = Side(True, False), []
    x = torch.randn(2, K)
    for register in (register_module_forward_hook, register_module_forward_pre_hook):
        side.model(x)
        handle = register(lambda module, *args: called.append(type(module).__name__))
        side.model(x)
        handle.remove()
        side.model(x)
        assert called.count("NF4Linear") == 1
        called.clear()


def test_the_base_layer_is_called_where_its_call_does_more_than_its_forward():
    side, x, called = Side(True, False), torch.randn(2, K), []
    expected = side.model(x)
    base = side.layer.base_layer
    forward = base.forward
    base.forward = lambda x, **kwargs: (called.append(1), forward(x, **kwargs))[1]  # as accelerate does
    assert_same_bits(side.model(x), expected)
    assert called == [1]
    del base.forward
    base.compile(backend=lambda graph, inputs: (called.append(2), graph.forward)[1])
    side.model(x)
    assert 2 in called

    class Halved(NF4Linear):
        def forward(self, x, **kwargs):
            return super().forward(x, **kwargs) / 2

    base = Side(True, False).layer.base_layer
    base.__class__ = Halved
    side.layer.base_layer = base
    assert_same_bits(side.model(x), expected / 2)


def test_dropout_is_of_the_mode_and_of_its_probability_now():
    side = Side(True, False, lora_dropout=0.5)
    x = torch.randn(64, K)

    def kept(train):
        """Of the adapter's part in the output: whether it is that without dropout, and its size over that."""
        side.model.train(train)
        base = side.layer.base_layer(x)
        side.layer.lora_dropout["default"].training, mode = False, side.layer.lora_dropout["default"].training
        part = side.model(x) - base
        side.layer.lora_dropout["default"].training = mode
        drawn = side.model(x) - base
        return torch.equal(part, drawn), (drawn.norm() / part.norm()).item()

    assert kept(False) == (True, 1.0)
    same, size = kept(True)
    assert not same
    assert 1.2 < size < 1.7  # kept with probability 1/2 and doubled: about the root of 2
    side.layer.lora_dropout["default"].p = 0.9
    assert kept(True)[1] > 2.2  # about the root of 10
    assert kept(False) == (True, 1.0)
    side.layer.lora_dropout["default"].p = 0.0
    assert kept(True) == (True, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_is_that_of_the_call(dtype):
    ours, theirs = pair()
    x = torch.linspace(-1, 1, 3 * K).sin().view(3, K)
    expected = ours.model(x)
    with torch.autocast("cpu", dtype):
        assert ours.model(x).dtype == theirs.model(x).dtype == dtype
        assert relative(ours.model(x).float(), theirs.model(x).float()) < 2e-2
    assert_same_bits(ours.model(x), expected)
    ours.layer.base_layer.compute_dtype = dtype
    assert relative(ours.model(x), expected) > 1e-5
    ours.layer.base_layer.compute_dtype = None
    for side in (ours, theirs):
        side.model.to(dtype)  # adapters too
    assert ours.layer.lora_A["default"].weight.dtype == dtype
    y = ours.model(x.to(dtype))
    assert y.dtype == dtype
    assert relative(y.float(), theirs.model(x.to(dtype)).float()) < 2e-2
    ours.model.float()
    ours.layer.base_layer.bias.data.fill_(1.0)
    assert ours.model(x).dtype == torch.float32


def test_inference_mode_leaves_nothing_that_training_cannot_save():
    ours, theirs = pair()
    with torch.inference_mode():
        ours.model(torch.randn(2, K))
    compare(ours, theirs)


def test_a_compiled_model_sees_changes():
    ours, theirs = pair()
    compiled = torch.compile(ours.model, backend="eager")
    x = torch.linspace(-1, 1, 3 * K).sin().view(3, K)
    for change in (None, "another adapter", "B in place", "a scale", "no adapters"):
        for side in (ours, theirs) if change else ():
            CHANGES[change](side)
        assert relative(compiled(x), theirs.model(x)) < 1e-5


def test_fsdp_shards_and_gathers_what_the_layer_uses(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ours, theirs = pair(bias=False)
        x = torch.linspace(-1, 1, 3 * K).sin().view(3, K)
        assert relative(ours.model(x), theirs.model(x)) < 1e-5
        fully_shard(ours.model, mesh=init_device_mesh("cpu", (1,)))
        for _ in range(2):
            assert relative(ours.model(x), theirs.model(x)) < 1e-5
            for side in (ours, theirs):
                in_place(side, "lora_B")
    finally:
        torch.distributed.destroy_process_group()


def test_the_op_is_called_without_the_base_layers_call(monkeypatch):
    side, x = Side(True, True), torch.randn(2, K)
    calls = []
    call, linear = nn.Module.__call__, ops.lora_linear
    monkeypatch.setattr(ops, "lora_linear", lambda *a, **k: (calls.append("op"), linear(*a, **k))[1])
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *a, **k: (calls.append(type(self)), call(self, *a, **k))[1])
    side.model(x)
    assert calls == [PeftModel, *calls[1:-2], NF4LoraLinear, "op"]
