"""lora_linear by a W that is unpacked into memory (csrc/cuda/lora_dense.cpp), on a card or by loops on the host."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

from nf4lora.ops import reference

from support import host
from support.bits import assert_same_bits
from support.drawn_layer import RANK as R
from support.drawn_layer import assert_makes_no_dx, assert_refuses_as_others, drawn_layer
from support.host import launches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Distance of two neighbours of the dtype, relative to the smaller; of float32 what sums in another order differ by.
STEP = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
M, N, K = 10, 200, 320


@pytest.fixture
def dense(device):
    return host.kernel("dense", device)


@pytest.fixture
def on_host(device):
    if torch.device(device).type != "cpu":
        pytest.skip("counts launchers, which are replaced for CPU tensors alone")


@pytest.fixture
def layer(device):
    """drawn_layer on the device."""
    return lambda dtype, N=N, K=K, **options: tree_map_only(
        torch.Tensor, lambda tensor: tensor.to(device), drawn_layer(dtype, N, K, **options)
    )


def assert_near(got, expected, dtype, through=0.0):
    """One step of the dtype; `through`: what intermediate results, which have 16 bits too, add to that."""
    assert got.dtype == expected.dtype
    atol = STEP[torch.float32] * largest(expected) + through
    torch.testing.assert_close(got, expected, rtol=STEP[dtype], atol=atol)


def largest(values):
    return values.float().abs().max().item() if values.numel() else 0.0


@pytest.fixture(params=[512 << 20, 1], ids=["one_slice", "many_slices"])
def slices(request):
    """The bytes of work space; 1 byte makes the smallest slices that there are, and no copies of x or dy."""
    with host.workspace(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        dict(), dict(bias=False), dict(lora=False), dict(lora=False, bias=False), dict(double_quant=False),
        dict(dropout=0.25), dict(dropout=0.9, double_quant=False, blocksize=32, K=480), dict(blocksize=32),
        dict(blocksize=256, K=512, lead=(2, 3)), dict(N=24, K=32, blocksize=32), dict(lead=()), dict(lead=(0,)),
        dict(lead=(2, 0), dropout=0.5), dict(lead=(0, 3), lora=False, bias=False),
    ],
    ids=str,
)  # fmt: skip
def test_equals_the_reference(dense, layer, dtype, options, slices):
    x, dy, arguments, bias = layer(dtype, **options)
    N, K = dy.shape[-1], x.shape[-1]
    A, B, scaling = arguments["lora_A"], arguments["lora_B"], arguments["scaling"]
    step, keep = STEP[dtype], 1.0 - arguments["dropout"]
    y, S = dense.lora_linear(x, bias=bias, **arguments)
    expected_y, expected_S = reference.lora_linear(x, bias=bias, **arguments)
    assert_near(S, expected_S, dtype)
    # S may be a step away; its term and the bias are rounded before W's product is added, by half a step of themselves.
    first, through = torch.zeros(1, N), 0.0
    if A is not None:
        first = scaling * expected_S.float() @ B.T
        through = step * scaling * largest(S.float().abs() @ B.abs().T)
    if bias is not None:
        first = first + bias
    assert_near(y, expected_y, dtype, through + step / 2 * largest(first))

    dx, dA, dB = dense.lora_linear_backward(dy, x, S, need_dx=True, **arguments)
    expected_dx, expected_dA, expected_dB = reference.lora_linear_backward(dy, x, S, **arguments)
    if A is None:
        assert dA.shape == dB.shape == (0,)
        assert_near(dx, expected_dx, dtype)
        return
    T = (dy.reshape(-1, N).float() @ B).abs()  # a step away as S is; dx's term is rounded by half a step once more
    assert_near(dx, expected_dx, dtype, 1.5 * step * scaling / keep * largest(T @ A.abs()))
    assert_near(dA, expected_dA, A.dtype, step * scaling / keep * largest(T.T @ x.reshape(-1, K).float().abs()))
    assert_near(dB, expected_dB, B.dtype)


def unpacked(call):
    """How often W was unpacked in a call, of CPU tensors."""
    launches()
    call()
    return launches().count("lora_slice")


@pytest.mark.parametrize(("scaling", "beside"), [(2.0, True), (1.75, False)])
def test_W_is_unpacked_whole_where_it_fits_and_else_in_slices(on_host, dense, layer, scaling, beside):
    x, dy, arguments, _ = layer(torch.bfloat16)
    arguments["scaling"] = scaling
    _, S = dense.lora_linear(x, bias=None, **arguments)
    width, height = (K + 8, N + 8) if beside else (K, N)  # rank 4 is padded to 8
    copied = 2 * M * width if beside else 0
    forward = lambda: dense.lora_linear(x, bias=None, **arguments)  # noqa: E731
    backward = lambda: dense.lora_linear_backward(dy, x, S, need_dx=True, **arguments)  # noqa: E731
    for most, wanted in ((200 * width * 2, 1), (128 * width * 2, 2), (64 * width * 2, 4), (1, 4)):
        with host.workspace(most + copied if most > 1 else 1):
            assert unpacked(forward) == wanted
    copied = 2 * M * height if beside else 0
    for most, wanted in ((320 * height * 2, 1), (192 * height * 2, 2), (128 * height * 2, 3), (1, 5)):
        with host.workspace(most + copied if most > 1 else 1):
            assert unpacked(backward) == wanted


def test_without_rows_W_is_not_unpacked(on_host, dense, layer):
    x, dy, arguments, bias = layer(torch.bfloat16, lead=(0,))
    _, S = dense.lora_linear(x, bias=bias, **arguments)
    assert unpacked(lambda: dense.lora_linear(x, bias=bias, **arguments)) == 0
    assert unpacked(lambda: dense.lora_linear_backward(dy, x, S, need_dx=True, **arguments)) == 0


# ---- the low-rank term beside W


@pytest.mark.parametrize("scaling", [2.0, 0.125, 1.0, -4.0])
@pytest.mark.parametrize(("N", "K"), [(200, 320), (160, 192), (24, 32), (192, 128)])
def test_a_power_of_two_is_multiplied_beside_W_and_rounded_once(dense, layer, N, K, scaling):
    x, dy, arguments, bias = layer(torch.bfloat16, N=N, K=K, blocksize=32)
    arguments["scaling"] = scaling
    y, S = dense.lora_linear(x, bias=bias, **arguments)
    expected_y, expected_S = reference.lora_linear(x, bias=bias, **arguments)
    assert_same_bits(S, expected_S)
    assert_near(y, expected_y, torch.bfloat16)  # both sum in float32 and round once
    dx, _, _ = dense.lora_linear_backward(dy, x, S, need_dx=True, **arguments)
    assert_near(dx, reference.lora_linear_backward(dy, x, S, **arguments)[0], torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("scaling", [2.0, 1.75])
def test_launches_are_few(on_host, dense, layer, dtype, dropout, scaling):
    x, dy, arguments, bias = layer(dtype, dropout=dropout)
    arguments["scaling"] = scaling
    launches()
    _, S = dense.lora_linear(x, bias=bias, **arguments)
    assert launches() == ["tall_skinny", "lora_slice"]  # two launches and one, and torch's product
    dense.lora_linear_backward(dy, x, S, need_dx=True, **arguments)
    assert launches() == ["tall_skinny", "tall_skinny", "lora_slice"]  # four and one, and torch's product


@pytest.mark.parametrize("lora", [True, False])
def test_without_out_features_the_gradient_is_zero(dense, layer, lora, slices):
    x, dy, arguments, _ = layer(torch.bfloat16, N=0, lora=lora, lead=(2, 3))
    y, S = dense.lora_linear(x, bias=None, **arguments)
    dx, dA, dB = dense.lora_linear_backward(dy, x, S, need_dx=True, **arguments)
    assert y.shape == (2, 3, 0)
    assert dx.shape == x.shape
    assert not dx.any()
    assert (dA.shape, dB.shape) == (((R, K), (0, R)) if lora else ((0,), (0,)))
    assert not dA.any()


def test_strides_of_the_arguments_do_not_matter(dense, layer, slices):
    x, dy, arguments, bias = layer(torch.float32)
    y, S = dense.lora_linear(x, bias=bias, **arguments)
    expected = dense.lora_linear_backward(dy, x, S, need_dx=True, **arguments)
    x, dy = x.T.contiguous().T, torch.stack([dy, dy], dim=2)[..., 0]
    for name in ("qweight", "absmax"):
        arguments[name] = torch.stack([arguments[name]] * 2, dim=2)[..., 0]
    assert_same_bits(dense.lora_linear(x, bias=bias, **arguments)[0], y)
    got = dense.lora_linear_backward(dy, x, S, need_dx=True, **arguments)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("share", [0.0003, 0.001, 0.01])
def test_a_small_adapter_is_not_lost_in_the_rounding_of_y(dense, layer, share, slices):
    # Far below a last place of y, a change is lost or becomes a whole one: on average it arrives. Added to a rounded
    # y, none of it would.
    x, _, arguments, _ = layer(torch.bfloat16, lead=(256,))
    B = arguments.pop("lora_B")
    y = dense.lora_linear(x, bias=None, lora_B=torch.zeros_like(B), **arguments)[0].double()
    S = dense.lora_linear(x, bias=None, lora_B=B, **arguments)[1].double()
    B = (B * (share * y.norm() / (1.75 * S @ B.double().T).norm())).bfloat16().float()
    term = 1.75 * S @ B.double().T
    got = dense.lora_linear(x, bias=None, lora_B=B, **arguments)[0].double()
    arrived = ((got - y) * term).sum() / term.norm() ** 2
    # Two roundings to steps of y, independent at worst: variance 1/12 each. The term's own rounding is 2^-8 of it.
    steps = torch.exp2(torch.frexp(y).exponent.double() - 8)
    noise = (steps * term).norm() / 6**0.5 / term.norm() ** 2
    assert abs(arrived - 1.0) < 5 * noise + 2**-8, (arrived, noise)


def test_dx_is_not_made_unless_wanted(on_host, dense):
    assert unpacked(lambda: assert_makes_no_dx(dense, torch.bfloat16, N, K)) == 0


def test_arguments_are_checked_in_the_words_of_the_other_kernels(dense):
    assert_refuses_as_others(dense)


# ---- W kept from a forward pass that is computed again for the backward pass


@pytest.fixture
def kept_dropped(on_host):
    yield
    host.drop_kept()


OF_LAYERS = [dict(), dict(lora=False), dict(dropout=0.25), dict(N=160, K=192), dict(N=96, K=320), dict(N=101)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OF_LAYERS, ids=str)
@pytest.mark.parametrize("scaling", [2.0, 1.75])
def test_a_W_that_is_kept_is_not_unpacked_again(kept_dropped, dense, layer, dtype, options, scaling):
    x, dy, arguments, bias = layer(dtype, **options)
    arguments["scaling"] = scaling
    y, S = dense.lora_linear(x, bias=bias, **arguments)
    expected = dense.lora_linear_backward(dy, x, S, need_dx=True, **arguments)
    host.keep_next()
    assert_same_bits(dense.lora_linear(x, bias=bias, **arguments)[0], y)
    launches()
    results = dense.lora_linear_backward(dy, x, S, need_dx=True, **arguments)
    factor_alone = launches().count("lora_slice")
    for got, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=STEP[dtype], atol=STEP[dtype] * largest(wanted) / 8)
    beside = dtype == torch.bfloat16 and scaling == 2.0 and options in (dict(), dict(N=160, K=192), dict(N=96, K=320))
    assert factor_alone == beside  # the rows of A below W, where the low-rank term is multiplied beside W
    assert unpacked(lambda: dense.lora_linear_backward(dy, x, S, need_dx=True, **arguments)) == 1  # once only


def test_a_kept_W_is_that_of_its_own_layer(kept_dropped, dense, layer):
    layers = [layer(torch.bfloat16, N=104), layer(torch.bfloat16, N=104)]
    expected = []
    for x, dy, arguments, _ in layers:
        S = dense.lora_linear(x, bias=None, **arguments)[1]
        expected.append(dense.lora_linear_backward(dy, x, S, need_dx=True, **arguments)[0])
    for x, _, arguments, _ in layers:
        host.keep_next()
        dense.lora_linear(x, bias=None, **arguments)
    for (x, dy, arguments, _), wanted in zip(layers, expected, strict=True):  # not in the reverse order
        S = dense.lora_linear(x, bias=None, **arguments)[1]
        got = dense.lora_linear_backward(dy, x, S, need_dx=True, **arguments)[0]
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-7)
    other = layers[0][2] | dict(qweight=layers[0][2]["qweight"].clone())
    x, dy = layers[0][:2]
    assert unpacked(lambda: dense.lora_linear_backward(dy, x, None, need_dx=True, **other)) == 1


@pytest.mark.parametrize("rank", [0, R, 300])
def test_a_kept_W_has_room_for_the_adapter_that_takes_it(kept_dropped, dense, layer, rank):
    """One weight under two adapters: the rows of A that are written below W must not be more than there is room for."""
    x, dy, arguments, _ = layer(torch.bfloat16)
    arguments["scaling"] = 2.0
    first = arguments | dict(lora_A=torch.zeros(rank, K), lora_B=torch.zeros(N, rank))
    if rank == 0:
        first["lora_A"] = first["lora_B"] = None
    second = arguments | dict(lora_A=torch.randn(17, K), lora_B=torch.randn(N, 17))
    S = dense.lora_linear(x, bias=None, **second)[1]
    expected = dense.lora_linear_backward(dy, x, S, need_dx=True, **second)
    host.keep_next()
    dense.lora_linear(x, bias=None, **first)
    results = dense.lora_linear_backward(dy, x, S, need_dx=True, **second)
    for got, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-10 * largest(wanted))
    # Without a factor below W nothing is unpacked where a kept W is taken, and a larger one has been.
    none = first | dict(lora_A=None, lora_B=None)
    assert unpacked(lambda: dense.lora_linear_backward(dy, None, None, need_dx=True, **none)) == (rank == 300)


def test_no_more_is_kept_than_may_be(kept_dropped, dense, layer):
    x, dy, arguments, _ = layer(torch.bfloat16, lora=False)
    backward = lambda: dense.lora_linear_backward(dy, None, None, need_dx=True, **arguments)  # noqa: E731
    for most, kept in ((2 * N * K, True), (2 * N * K - 1, False), (0, False)):
        host.keep_next(most)
        dense.lora_linear(x, bias=None, **arguments)
        assert unpacked(backward) == (not kept)
    with host.workspace(1):  # a W that is unpacked in slices is never whole
        host.keep_next()
        dense.lora_linear(x, bias=None, **arguments)
        assert unpacked(backward) == 5


def test_what_no_backward_pass_took_goes_when_the_next_part_is_computed_again(kept_dropped, dense, layer):
    x, dy, arguments, _ = layer(torch.bfloat16)
    frozen = layer(torch.bfloat16)
    for each in (frozen, (x, dy, arguments, None)):
        host.keep_next()
        dense.lora_linear(each[0], bias=None, **each[2])
    dense.lora_linear_backward(dy, x, None, need_dx=True, **arguments)  # that of the frozen layer is never asked for
    host.keep_next()
    dense.lora_linear(x, bias=None, **arguments)
    assert unpacked(lambda: dense.lora_linear_backward(frozen[1], None, None, need_dx=True, **frozen[2])) == 1


def test_only_the_next_forward_pass_keeps_its_W(kept_dropped, dense, layer):
    x, dy, arguments, _ = layer(torch.bfloat16, lora=False)
    host.keep_next()
    host.drop_kept()
    dense.lora_linear(x, bias=None, **arguments)
    host.drop_kept()
    dense.lora_linear(x, bias=None, **arguments)
    assert unpacked(lambda: dense.lora_linear_backward(dy, None, None, need_dx=True, **arguments)) == 1
