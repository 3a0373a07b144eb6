"""The guard in front of a packed weight: what may be done with codes, and that nothing takes them for numbers."""

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn

from nf4lora.nn.linear import NF4Linear

from support.bits import assert_same_bits


def packed(N=32, K=64):
    return NF4Linear.from_linear(nn.Linear(K, N, bias=False))


# Shapes that would fit: [N, K/2] codes of a [32, 64] layer beside 32 features.
WRONG = {
    "F.linear": lambda w: F.linear(torch.ones(2, 32), w),
    "matmul with the transpose": lambda w: torch.ones(2, 32) @ w.T,
    "matmul from the right": lambda w: w @ torch.ones(32),
    "einsum": lambda w: torch.einsum("bi,oi->bo", torch.ones(2, 32), w),
    "a product": lambda w: torch.ones(32) * w,
    "a product with a number": lambda w: w * 0.5,
    "a quotient": lambda w: w / 2,
    "a sum": lambda w: w + torch.ones(32, 32),
    "a cast": lambda w: w.to(torch.bfloat16),
    "float": lambda w: w.float(),
    "a cast to the dtype of another": lambda w: w.to(torch.ones(1)),
    "a cast of another to its dtype": lambda w: torch.ones(2, 32).to(w),
    "type_as": lambda w: torch.ones(2, 32).type_as(w),
    "a slice in a product": lambda w: w[:4] @ torch.ones(32),
    "data in a product": lambda w: w.data @ torch.ones(32),
    "a detached one in a product": lambda w: w.detach().view(32, 32) * torch.ones(32),
    "concatenation": lambda w: torch.cat([w, torch.ones(1, 32)]),
    "a copy in a product": lambda w: w.data.clone() @ torch.ones(32),
    "a copy that is cast": lambda w: w.data.clone().to(torch.float32),
    "a sum with another's codes": lambda w: w.data + torch.ones(32, 32).to(w.dtype),
    "a norm": lambda w: torch.linalg.norm(w.data.float()),
}
WRITES = {
    "add_": lambda w: w.add_(torch.ones(32, 32)),
    "add_ of a number": lambda w: w.add_(1),
    "data.add_": lambda w: w.data.add_(torch.ones(32, 32)),
    "copy_": lambda w: w.data.copy_(torch.ones(32, 32)),
    "assigned data": lambda w: setattr(w, "data", torch.ones(32, 64)),
    "an item": lambda w: w.data.__setitem__(0, torch.ones(32)),
    "zeros": lambda w: nn.init.zeros_(w),
    "a constant": lambda w: nn.init.constant_(w, 1.0),
    "random numbers": lambda w: w.data.random_(),
    "out=": lambda w: torch.add(torch.ones(32, 32), 1, out=w.data),
}


@pytest.mark.parametrize("name", WRONG)
def test_codes_are_not_taken_for_numbers(name):
    layer = packed()
    with pytest.raises(
        ValueError, match=r"NF4Linear: weight must not be an operand of \w+, .*dequantize.*modules_to_not"
    ):
        WRONG[name](layer.weight)


@pytest.mark.parametrize("name", WRITES)
def test_nothing_can_be_written_into_the_codes(name):
    layer = packed()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="NF4Linear: weight must not be an operand of"):
        WRITES[name](layer.weight)
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


def test_augmented_assignment_as_in_a_merge_changes_nothing():
    layer = packed()
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="must not be an operand of"):
        layer.weight.data += torch.ones(32, 32)
    for merged in (torch.ones(32, 32), torch.ones(32, 64, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"an assignment to \.data"):
            layer.weight.data = merged
    assert_same_bits(layer.weight, before)


def test_codes_may_be_asked_copied_moved_and_compared():
    layer = packed()
    plain, weight = layer._parameters["weight"], layer.weight
    assert isinstance(weight, nn.Parameter)
    assert weight is layer.weight
    assert weight.shape == (32, 32)
    assert weight.dtype == torch.uint8
    assert weight.device.type == "cpu"
    assert (weight.numel(), weight.element_size(), weight.nbytes, weight.dim(), len(weight)) == (1024, 1, 1024, 2, 32)
    assert not weight.requires_grad
    assert weight.is_leaf
    assert not weight.is_floating_point()
    assert weight.data_ptr() == plain.data_ptr() == weight.data.data_ptr()
    for copied in (weight.clone(), weight.cpu().clone(), weight.data.clone(), copy.deepcopy(weight)):
        assert_same_bits(copied, plain)
        assert copied.data_ptr() != plain.data_ptr()
    assert_same_bits(weight, plain)
    assert bool((weight == plain).all())
    assert np.array_equal(weight.numpy(), plain.numpy())
    assert weight[0, 0].item() == plain[0, 0].item()
    assert torch.empty_like(weight).shape == (32, 32)
    assert weight.new_zeros(3).dtype == torch.uint8
    assert torch.zeros_like(weight, dtype=torch.float32).sum() == 0
    assert int((weight >> 4).max()) < 16
    assert "tensor" in repr(weight)
    weight.data.copy_(torch.flip(plain, (0,)))
    weight.data[0, 0].bitwise_xor_(1)
    other = packed()
    other.weight.data = weight.data
    assert other.weight.data_ptr() == plain.data_ptr()
    assert_same_bits(other.weight, plain)
    assert_same_bits(pickle.loads(pickle.dumps(weight)), plain)


def test_what_is_noted_on_the_weight_is_noted_on_the_parameter():
    layer = packed()
    layer.weight._is_hf_initialized = True
    assert layer._parameters["weight"]._is_hf_initialized
    assert layer.weight._is_hf_initialized
    with pytest.raises(AttributeError):
        layer.weight.not_noted  # noqa: B018


def test_state_files_and_parameters_are_plain_tensors():
    layer = packed()
    assert all(type(parameter) is nn.Parameter for parameter in layer.parameters())
    assert type(layer.state_dict()["weight"]) is torch.Tensor
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert_same_bits(torch.load(file, weights_only=True)["weight"], layer.weight)
    assert_same_bits(load(save(layer.state_dict()))["weight"], layer.weight)


def test_a_shared_weight_stays_a_plain_parameter():
    first, second = packed(), packed()
    second.weight = first.weight
    assert second._parameters["weight"] is first._parameters["weight"]
    assert_same_bits(second.dequantize()[0] != 0, first.dequantize()[0] != 0)


def test_a_replaced_or_moved_parameter_is_the_one_that_is_seen():
    layer = packed()
    layer.weight  # noqa: B018
    layer.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.uint8), requires_grad=False)
    assert int(layer.weight.sum()) == 0
    layer.to("meta")
    assert layer.weight.is_meta
    assert layer.weight.shape == (32, 32)
    del layer.weight
    assert not hasattr(layer, "weight")


def test_the_guard_holds_no_memory_of_a_weight_that_was_moved():
    layer = packed()
    layer.weight  # noqa: B018
    parameter = weakref.ref(layer._parameters["weight"])
    layer.to("meta")
    gc.collect()
    assert parameter() is None


def test_a_weight_outlives_its_layer_as_every_tensor_does():
    layer = packed()
    codes, weight = layer.state_dict()["weight"].clone(), layer.weight
    del layer
    assert weight.shape == (32, 32)
    assert weight.dtype == torch.uint8
    assert weight.device.type == "cpu"
    assert_same_bits(weight, codes)
    assert_same_bits(copy.deepcopy(weight), codes)
    assert "tensor" in repr(weight)
    weight.noted = 1
    assert weight.noted == 1
    for refused in (lambda: torch.add(weight, 1), lambda: weight.dequantize(), lambda: weight.float(), *WRONG.values()):
        with pytest.raises(ValueError, match=r"NF4Linear: weight must not be an operand of \w+, .*dequantize"):
            refused(*[weight] * refused.__code__.co_argcount)


def test_a_layer_that_was_asked_for_its_weight_is_freed_at_once():
    """Without the garbage collector: nothing of the layer may lead back to itself."""
    gc.collect()
    gc.disable()
    try:
        layer = packed()
        weight = layer.weight
        freed = [weakref.ref(each) for each in (layer, layer.weight_absmax)]
        codes = weakref.ref(layer._parameters["weight"])
        del layer
        assert all(each() is None for each in freed)
        assert codes() is not None
        del weight
        assert codes() is None
    finally:
        gc.enable()


def test_a_guard_that_is_held_is_not_handed_out_for_other_codes():
    def moved(layer):
        layer._apply(lambda tensor: tensor + 0)

    def replaced(layer):
        layer.weight = nn.Parameter(layer._parameters["weight"] ^ 1, requires_grad=False)

    def registered(layer):
        del layer.weight
        layer.register_parameter("weight", nn.Parameter(torch.ones(32, 32, dtype=torch.uint8), requires_grad=False))

    def loaded(layer):
        layer.load_state_dict(packed().state_dict(), assign=True)

    for change in (moved, replaced, registered, loaded):
        layer = packed()
        held, before = layer.weight, layer.weight.clone()
        change(layer)
        assert layer.weight.codes is layer._parameters["weight"], change
        assert layer.weight.data_ptr() == layer.state_dict()["weight"].data_ptr()
        assert_same_bits(held, before)
        if change is not moved:  # a parameter that is moved stays the same object, whoever holds it
            assert held is not layer.weight
    layer = packed()
    held = layer.weight
    layer.to("meta")
    assert layer.weight.is_meta
    assert layer.weight is not held


def test_a_layer_that_was_asked_for_its_weight_can_swap_its_parameters():
    layer = packed()
    x = torch.randn(2, 64)
    before, weight = layer(x), layer.weight
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.to(torch.bfloat16)
        assert_same_bits(layer(x), before)
        assert layer.weight.dtype == torch.uint8
        other = packed()
        layer.load_state_dict(other.state_dict())
        assert_same_bits(layer(x), other(x))
        layer.to("meta")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert layer.weight.is_meta
    assert weight.shape == (32, 32)


@pytest.mark.parametrize("to_disk", [False, True], ids=["in memory", "on disk"])
def test_a_layer_that_accelerate_offloads_computes_the_same_and_keeps_a_plain_parameter(to_disk, tmp_path):
    from accelerate import cpu_offload, disk_offload

    layer = packed()
    model = nn.Sequential(layer, nn.ReLU())
    x = torch.randn(2, 64)
    expected, weight = model(x), layer.weight.clone()
    if to_disk:
        disk_offload(model, tmp_path, execution_device="cpu")
    else:
        cpu_offload(model, execution_device="cpu")
    assert layer.weight.is_meta
    for _ in range(2):
        assert_same_bits(model(x), expected)
        assert layer.weight.is_meta
        assert type(layer._parameters["weight"]) is nn.Parameter
    with pytest.raises(ValueError, match="must not be an operand"):
        layer.weight * 1.0
    layer._hf_hook.detach_hook(layer)
    if not to_disk:
        assert_same_bits(layer.weight, weight)


def test_copies_and_pickles_of_a_layer_that_was_asked_hold_one_weight():
    layer = NF4Linear.from_linear(nn.Linear(1024, 256, bias=False))
    size = len(pickle.dumps(layer))
    layer.weight  # noqa: B018
    assert len(pickle.dumps(layer)) == size
    twin = copy.deepcopy(layer)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    assert_same_bits(twin.weight, layer.weight)
    with pytest.raises(ValueError, match="must not be an operand"):
        twin.weight * 1.0


def test_a_compiled_model_that_asks_for_the_dtype_stays_one_graph():
    layer = packed()

    def forward(x):
        return layer(x) if layer.weight.dtype == torch.uint8 else x

    x = torch.randn(2, 64)
    assert_same_bits(torch.compile(forward, backend="eager", fullgraph=True)(x), layer(x))
