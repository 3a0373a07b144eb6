"""NF4Linear: what it computes, in which dtype, and that no copy, cast or file can part it from its scales."""

import copy
import importlib
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nf4lora.nn.linear import NF4Linear, blocksize_for
from nf4lora.ops import reference

from support.bits import assert_same_bits

LAYOUTS = [(True, 64), (False, 64), (True, 32), (True, 128), (False, 256)]


def random_linear(K=256, N=40, bias=True, dtype=torch.float32):
    linear = nn.Linear(K, N, bias=bias)
    return linear.to(dtype)


def reference_weight(linear, blocksize, double_quant, dtype):
    """The weight that the layer must compute with, by the plain-torch definition alone."""
    qweight, absmax = reference.nf4_quantize(linear.weight.detach(), blocksize)
    if double_quant:
        absmax = reference.absmax_dequantize(*reference.absmax_quantize(absmax))
    return reference.nf4_dequantize(qweight, absmax, blocksize, dtype)


def random_packed(blocksize=64, double_quant=True, **kwargs):
    return NF4Linear.from_linear(random_linear(**kwargs), blocksize, double_quant)


@pytest.mark.parametrize(("double_quant", "blocksize"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_computes_with_the_weight_of_the_definition(double_quant, blocksize, dtype, device):
    linear = random_linear(dtype=dtype)
    layer = NF4Linear.from_linear(copy.deepcopy(linear).to(device), blocksize, double_quant)
    x = torch.randn(3, 5, 256, dtype=dtype)
    W = reference_weight(linear, blocksize, double_quant, dtype)
    assert_same_bits(layer.dequantize(dtype).cpu(), W)
    expected = (x.double() @ W.double().T + linear.bias.double()).to(dtype)
    # one rounding of the result, and the order of 256 float32 additions
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(layer(x.to(device)).cpu(), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(("double_quant", "blocksize"), LAYOUTS)
def test_state_has_the_names_dtypes_and_shapes_of_the_format(double_quant, blocksize):
    layer = random_packed(blocksize, double_quant, dtype=torch.bfloat16)
    blocks = 256 // blocksize
    expected = {
        "weight": (torch.uint8, (40, 128)),
        "weight_absmax": (torch.uint8 if double_quant else torch.int32, (40, blocks)),
        "bias": (torch.bfloat16, (40,)),
    }
    if double_quant:
        expected["weight_nested"] = (torch.int32, (-(-40 * blocks // 256) + 1,))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in layer.state_dict().items()} == expected
    assert dict(layer.named_buffers()) == {}
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"bias"}
    empty = NF4Linear(256, 40, blocksize=blocksize, double_quant=double_quant, device="meta", dtype=torch.bfloat16)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in empty.state_dict().items()} == expected


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.double])
def test_no_cast_of_the_model_touches_weight_or_scales(cast, double_quant):
    layer = random_packed(double_quant=double_quant)
    before = layer.dequantize(torch.float32)
    assert_same_bits(cast(nn.Sequential(layer))[0].dequantize(torch.float32), before)


def test_absmax_is_the_scale_of_each_block():
    linear = random_linear()
    exact = linear.weight.view(40, 4, 64).abs().amax(-1)
    assert_same_bits(NF4Linear.from_linear(linear, double_quant=False).absmax(), exact)
    # 8 bits: half a step of the dynamic map near 1, 0.9 / 64 / 2, of the largest deviation from the mean
    deviation = (exact - exact.mean()).abs().max().item()
    torch.testing.assert_close(NF4Linear.from_linear(linear).absmax(), exact, rtol=0, atol=0.00704 * deviation)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("double_quant", [True, False])
def test_copy_and_pickle_keep_every_bit_and_every_option(copied, double_quant):
    layer = NF4Linear.from_linear(random_linear(), 32, double_quant, compute_dtype=torch.bfloat16)
    twin, x = copied(layer), torch.randn(2, 256)
    assert_same_bits(twin(x), layer(x))
    assert repr(twin) == repr(layer)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize(("double_quant", "blocksize"), LAYOUTS)
@pytest.mark.parametrize("assign", [True, False])
def test_state_dict_round_trip_through_a_file(double_quant, blocksize, assign):
    layer, file = random_packed(blocksize, double_quant), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = random_packed(blocksize, double_quant)
    twin.load_state_dict(torch.load(file), assign=assign)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), twin.parameters()))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("lost", ["weight", "weight_absmax", "weight_nested"])
def test_a_missing_companion_is_an_error_that_names_it(lost, strict):
    state = random_packed().state_dict()
    del state[lost]
    model = nn.ModuleDict({"proj": random_packed()})
    with pytest.raises(RuntimeError, match=rf"proj\.{lost} must come with proj\.weight"):
        model.load_state_dict({f"proj.{key}": value for key, value in state.items()}, strict=strict)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("weight", lambda t: torch.randn(t.shape)),
        ("weight_absmax", lambda t: t.to(torch.int32)),  # as without double quantisation
        ("weight_nested", lambda t: t.view(torch.float32)),
    ],
)
def test_a_companion_of_another_dtype_is_an_error_that_names_it(key, change):
    layer = random_packed()
    state = layer.state_dict()
    state[key] = change(state[key])
    with pytest.raises(RuntimeError, match=rf"{key} must be torch\.(uint8|int32), got torch\."):
        random_packed().load_state_dict(state, strict=False)


def test_a_companion_of_another_shape_is_an_error_that_names_it():
    with pytest.raises(RuntimeError, match="size mismatch for weight_absmax"):
        random_packed(64).load_state_dict(random_packed(32).state_dict())


def test_a_state_dict_of_adapters_alone_loads_beside_the_layer():
    model = nn.ModuleDict({"proj": random_packed(), "lora_A": nn.Linear(256, 4, bias=False)})
    loaded = model.load_state_dict({"lora_A.weight": torch.ones(4, 256)}, strict=False)
    assert "proj.weight" in loaded.missing_keys
    assert model["lora_A"].weight.sum() == 1024


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compute_dtype_rules_the_weight_and_autocast_the_result(compute_dtype, autocast, dtype):
    linear = random_linear()
    layer, x = NF4Linear.from_linear(linear, compute_dtype=compute_dtype), torch.randn(4, 256).to(dtype)
    plain = NF4Linear.from_linear(linear)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = layer(x)
        assert y.dtype == nn.Linear(256, 40, dtype=dtype)(x).dtype
    inside = compute_dtype or autocast or dtype
    assert_same_bits(y, plain(x.to(inside)).to(y.dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
def test_an_input_that_is_not_floating_point_is_refused_in_every_mode(dtype, autocast, compute_dtype, adapted):
    layer = NF4Linear.from_linear(random_linear(), compute_dtype=compute_dtype)
    lora = {"lora_A": torch.ones(4, 256), "lora_B": torch.ones(40, 4)} if adapted else {}
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(TypeError, match=rf"^NF4Linear: x must be float32, .*got {dtype}; .*modules_to_not_convert"),
    ):
        layer(torch.ones(2, 256).to(dtype), **lora)


def test_a_weight_without_a_dtype_is_that_of_the_layer_in_any_dtype():
    layer = random_packed()
    assert layer.dequantize().dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        assert_same_bits(layer.dequantize().to(dtype), layer.dequantize(dtype))
    layer.compute_dtype = torch.bfloat16
    assert_same_bits(layer.dequantize(), layer.dequantize(torch.bfloat16))


def test_lora_branch_is_added_and_differentiated():
    linear = random_linear()
    layer = NF4Linear.from_linear(linear)
    x = torch.randn(6, 256, requires_grad=True)
    A, B = torch.randn(4, 256, requires_grad=True), torch.randn(40, 4, requires_grad=True)
    dy = torch.randn(6, 40)
    y = layer(x, A, B, scaling=0.5)
    got = torch.autograd.grad(y, (x, A, B), dy)
    W = reference_weight(linear, 64, True, torch.float32)
    expected_y = x @ W.T + layer.bias + 0.5 * (x @ A.T) @ B.T
    expected = torch.autograd.grad(expected_y, (x, A, B), dy)
    torch.testing.assert_close(y, expected_y, rtol=1e-5, atol=1e-4)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-3)  # sums of up to 256 products of size 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_is_trained_when_asked_and_its_training_changes_no_bit(dtype):
    layer, x = random_packed(dtype=dtype), torch.randn(7, 256, dtype=dtype)
    trained = layer(x)
    trained.float().sum().backward()
    assert_same_bits(layer.bias.grad, torch.full((40,), 7, dtype=dtype))
    layer.bias.requires_grad_(False)
    assert_same_bits(layer(x), trained)


def test_meta_layer_holds_no_memory_and_can_be_filled():
    layer = NF4Linear(4096, 4096, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    small = NF4Linear(256, 40, device="meta")
    full = random_packed()
    small.load_state_dict(full.state_dict(), assign=True)
    assert_same_bits(small(torch.ones(1, 256)), full(torch.ones(1, 256)))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_a_layer_without_memory_gives_the_shape_of_its_result(compute_dtype):
    layer = NF4Linear(256, 40, compute_dtype=compute_dtype, device="meta", dtype=torch.float16)
    x = torch.empty(3, 5, 256, device="meta", dtype=torch.float16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.is_meta, y.shape, y.dtype, x.grad.shape) == (True, (3, 5, 40), torch.float16, x.shape)


def test_compiled_layer_is_one_graph_and_equal():
    layer, x = random_packed(), torch.randn(4, 256)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert_same_bits(compiled(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(compiled(x), layer(x))


def test_the_printed_layer_says_how_it_is_packed():
    layer = NF4Linear(256, 40, False, blocksize=32, double_quant=False, compute_dtype=torch.bfloat16, device="meta")
    assert repr(layer) == (
        "NF4Linear(in_features=256, out_features=40, bias=False, blocksize=32, double_quant=False, "
        "compute_dtype=torch.bfloat16)"
    )


@given(st.integers(1, 20000), st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]))
def test_blocksize_for_is_the_largest_legal_divisor(in_features, asked):
    legal = [size for size in (2**i for i in range(5, 13)) if size <= asked and in_features % size == 0]
    assert blocksize_for(in_features, asked) == (max(legal) if legal else None)


@pytest.mark.parametrize(
    ("kwargs", "kind", "text"),
    [
        ({"in_features": 100}, ValueError, r"in_features must be a multiple of blocksize 64, got 100"),
        ({"in_features": 96}, ValueError, r"got 96; blocksize_for\(96, 64\) is 32"),
        ({"blocksize": 48}, ValueError, r"blocksize must be a power of two between 32 and 4096, got 48"),
        ({"blocksize": 16}, ValueError, r"got 16"),
        ({"blocksize": 8192}, ValueError, r"got 8192"),
        ({"blocksize": 64.0}, TypeError, r"blocksize must be an int, got float"),
        ({"compute_dtype": torch.int8}, ValueError, r"compute_dtype must be float32, bfloat16 or float16"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(kwargs, kind, text):
    with pytest.raises(kind, match=text):
        NF4Linear(**{"in_features": 256, "out_features": 8, "device": "meta"} | kwargs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(bad):
    linear = random_linear()
    linear.weight.data[3, 70] = bad
    with pytest.raises(ValueError, match="finite"):
        NF4Linear.from_linear(linear)


def test_data_parallel_is_refused_with_what_to_do_instead(monkeypatch):
    """As nn.DataParallel does it, with the CPU in place of two GPUs: torch asks each module for a copy of itself."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, *_: device)
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [tensors] * 2)
    model = nn.Sequential(NF4Linear(64, 8))
    with pytest.raises(RuntimeError, match=r"^NF4Linear: .*one process a GPU.*CUDA_VISIBLE_DEVICES=0.*torchrun"):
        replicate.replicate(model, [0, 1])
