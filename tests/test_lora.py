"""lora_linear, forward and backward: exact weights, tight tolerances, gradients, dropout, errors."""

import pytest
import torch
import torch._dynamo.testing
from hypothesis import example, given
from hypothesis import strategies as st

from nf4lora import ops
from nf4lora.ops import reference
from nf4lora.ops.kernels import dispatch

from support.bits import assert_same_bits
from support.lora_case import FLOAT_SUM, TERM, ULP, Case, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
raw = torch.ops.nf4lora


def assert_matches_reference(case):
    y, S = raw.lora_linear(*case.forward())
    expected_y, expected_S = reference.lora_linear(*case.forward())
    assert_close(S, expected_S, ULP[case.x.dtype], "S", least=TERM)
    # S itself may sit on a neighbour, which y then sees once more.
    assert_close(y, expected_y, 2 * ULP[case.x.dtype], "y", least=TERM)
    dx, dA, dB = raw.lora_linear_backward(*case.backward(expected_S), True)
    expected_dx, expected_dA, expected_dB = reference.lora_linear_backward(*case.backward(expected_S))
    assert_close(dx, expected_dx, 2 * ULP[case.x.dtype], "dx")
    if case.A is not None:
        # T is rounded to x's dtype before dA sums it: where it lands on a neighbour, so does one term of the sum, which
        # is all of it for one row of x and seldom half of it for more.
        assert_close(dA, expected_dA, FLOAT_SUM + ULP[case.x.dtype] / min(max(len(case.x), 1), 2), "dA")
        assert_close(dB, expected_dB, FLOAT_SUM, "dB", least=TERM)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 32, 1),
        (5, 3, 64, 0),
        (0, 8, 64, 4),
        (7, 33, 96, 5),
        (64, 192, 1056, 20),
        (1100, 70, 128, 8),
        (1550, 40, 64, 3),
    ],
    ids=str,
)
def test_matches_the_reference(instruction_set, dtype, shape):
    M, N, K, R = shape
    for double_quant in (False, True):
        assert_matches_reference(Case(M, N, K, R, 32, dtype, double_quant, bias=double_quant))
    assert_matches_reference(Case(M, N, K, R, 32, dtype, dropout=0.3))


@given(
    M=st.integers(1, 40),
    N=st.integers(1, 150),
    blocks=st.integers(1, 9),
    R=st.integers(1, 130),
    blocksize=st.sampled_from([32, 64, 128, 512]),
    dtype=st.sampled_from(DTYPES),
    dropout=st.sampled_from([0.0, 0.0, 0.1, 0.9]),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**29),
)
@example(M=1, N=1, blocks=1, R=88, blocksize=512, dtype=torch.float32, dropout=0.1, double_quant=False, seed=12402)
def test_matches_the_reference_at_any_shape(
    instruction_set, M, N, blocks, R, blocksize, dtype, dropout, double_quant, seed
):
    assert_matches_reference(
        Case(M, N, blocks * blocksize, R, blocksize, dtype, double_quant, dropout=dropout, seed=seed)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_weight_is_that_of_dequantize(instruction_set, dtype):
    # A row of the identity picks one column of W, one of dy picks one row: no sum, so every bit must agree.
    case = Case(N=150, K=192, R=0, bias=False, dtype=dtype)
    W = case.weight()
    case.x = torch.eye(192, dtype=dtype)
    y, S = raw.lora_linear(*case.forward())
    assert_same_bits(y, W.T)
    few = torch.cat([raw.lora_linear(row[None], *case.forward()[1:])[0] for row in case.x])
    assert_same_bits(few, W.T)
    case.dy, case.x = torch.eye(150, dtype=dtype), torch.zeros(150, 192, dtype=dtype)
    dx, _, _ = raw.lora_linear_backward(*case.backward(S.new_empty(150, 0)), True)
    assert_same_bits(dx, W)
    rows = [(dy[None], case.x[:1], S.new_empty(1, 0), *case.backward(S)[3:], True) for dy in case.dy]
    assert_same_bits(torch.cat([raw.lora_linear_backward(*each)[0] for each in rows]), W)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_gradients_are_those_of_autograd(device, double_quant, bias):
    case = Case(double_quant=double_quant, bias=bias, device=device)
    x, A, B = (t.clone().requires_grad_() for t in (case.x, case.A, case.B))
    y = ops.lora_linear(x, case.qweight, case.absmax, case.nested, case.bias, A, B, *case.options)
    y.backward(case.dy)
    W = case.weight().double()
    x2, A2, B2 = (t.detach().double().requires_grad_() for t in (x, A, B))
    expected = x2 @ W.T + case.options[0] * (x2 @ A2.T) @ B2.T
    if bias:
        expected = expected + case.bias.double()
    expected.backward(case.dy.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)  # float32 sums of 256 terms near 1
    for got, want in ((x, x2), (A, A2), (B, B2)):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-5, atol=2e-5)


def test_dropout_gradients_are_those_of_autograd(device):
    case = Case(dropout=0.4, device=device)
    x, A, B = (t.clone().requires_grad_() for t in (case.x, case.A, case.B))
    ops.lora_linear(x, case.qweight, case.absmax, case.nested, case.bias, A, B, *case.options).backward(case.dy)
    mask = reference.dropout_mask(*case.x.shape, 0.4, case.options[2].cpu()).to(device)
    x2, A2, B2 = (t.detach().double().requires_grad_() for t in (x, A, B))
    dropped = x2 * mask / 0.6
    (x2 @ case.weight().double().T + case.options[0] * (dropped @ A2.T) @ B2.T).backward(case.dy.double())
    for got, want in ((x, x2), (A, A2), (B, B2)):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-5, atol=4e-5)


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("seed", [0, 7, 2**62 + 12345])
def test_dropout_mask_is_philox(instruction_set, dropout, seed):
    # W = 0 and A = identity make S the masked x itself.
    M, K = 50, 96
    case = Case(M, 4, K, K, 32, bias=False)
    case.x, case.A = torch.ones(M, K), torch.eye(K)
    case.options = (1.0, dropout, torch.tensor([seed]), 32)
    _, S = raw.lora_linear(*case.forward())
    assert_same_bits(S != 0, reference.dropout_mask(M, K, dropout, torch.tensor(seed)))
    kept = (S != 0).float().mean().item()
    assert abs(kept - (1 - dropout)) < 5 * (dropout * (1 - dropout) / (M * K)) ** 0.5 + 1e-3


def test_philox_gives_the_published_words():
    # Random123's known answers (kat_vectors): counter 0, key 0, and all ones.
    assert [hex(w) for w in reference.philox(0, 4).tolist()] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


def test_thread_count_does_not_change_a_bit(device):
    case = Case(M=300, N=250, K=512, dtype=torch.bfloat16, dropout=0.2, device=device)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y, S = raw.lora_linear(*case.forward())
            results.append([y, S, *raw.lora_linear_backward(*case.backward(S), True)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


class Products(torch.utils.data.Dataset):
    """What a layer gives in whatever process asks for it."""

    def __init__(self, case):
        self.case = case

    def __len__(self):
        return 2

    def __getitem__(self, index):
        y, S = raw.lora_linear(*self.case.forward())
        return torch.cat([t.flatten().float() for t in (y, *raw.lora_linear_backward(*self.case.backward(S), True))])


@pytest.mark.parametrize("M", [3, 40])
def test_works_in_a_forked_data_loader(M):
    products = Products(Case(M=M, dtype=torch.bfloat16))
    here = products[0]  # the parent's threads have run
    loader = torch.utils.data.DataLoader(products, num_workers=2, multiprocessing_context="fork", timeout=60)
    for there in loader:
        assert_same_bits(there[0], here)


def test_rows_do_not_see_each_other(instruction_set):
    # A token's result does not depend on what else is in the batch.
    for M in (1, 2, 5, 16, 40):
        case = Case(M=M, N=65, K=1152, dtype=torch.bfloat16)
        whole, _ = raw.lora_linear(*case.forward())
        case.x[1:] = torch.randn_like(case.x[1:])
        assert_same_bits(raw.lora_linear(*case.forward())[0][0], whole[0])


def test_the_number_of_rows_does_not_matter_beyond_a_few(instruction_set):
    # Up to 16 rows another kernel sums in another order; from there on it is one order for all.
    case = Case(M=1600, N=65, K=1152, dtype=torch.bfloat16)
    whole, _ = raw.lora_linear(*case.forward())
    for rows in (slice(0, 17), slice(5, 118), slice(1000, 1600)):
        part, _ = raw.lora_linear(case.x[rows], *case.forward()[1:])
        assert_same_bits(part, whole[rows])


@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_small_number_of_rows_matches_the_reference(instruction_set, dtype, blocksize):
    # The widths cut a row of W into whole pieces, ragged pieces, and pieces that end within a block.
    for K in (blocksize, 3 * blocksize, 8192 + (blocksize if blocksize < 4096 else 0)):
        for M in range(1, 18):
            case = Case(M, 37, K, 20, blocksize, dtype, double_quant=M % 2 == 0, bias=M % 3 == 0)
            y, S = raw.lora_linear(*case.forward())
            expected_y, expected_S = reference.lora_linear(*case.forward())
            assert_close(S, expected_S, ULP[dtype], "S")
            assert_close(y, expected_y, 2 * ULP[dtype], f"y, {M} rows of {K}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_few_rows_match_the_reference_on_any_device(device, dtype):
    for M, K, blocksize in ((1, 64, 32), (2, 2048, 64), (8, 192, 64), (9, 4160, 64), (16, 512, 256), (17, 192, 64)):
        assert_matches_reference(
            Case(M, 161, K, 20, blocksize, dtype, bias=M > 2, dropout=0.2 * (M % 2), device=device)
        )


@pytest.fixture
def only():
    """only(kernel) takes this one of a card's kernels from then on; what goes backward after `few` takes fused."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    def take(kernel):
        backward = kernel if kernel in dispatch.CHOICES["backward"] else "fused"
        chosen = (("forward", kernel), ("backward", backward))
        dispatch.hand_over(dispatch.Rule("*", direction, name, None, None, "a test") for direction, name in chosen)

    yield take
    dispatch.hand_over(dispatch.rules())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", dispatch.KERNELS)
def test_every_kernel_of_a_card_matches_the_reference(kernel, dtype, only):
    only(kernel)
    for M in (1, 16) if kernel == "few" else (1, 16, 47, 64, 300):
        for shape in (dict(N=96, K=320, R=8), dict(N=1000, K=4096, R=40, double_quant=False), dict(N=8, K=32, R=0)):
            blocksize = 32 if shape["K"] % 64 else 64
            for dropout in (0.0, 0.3):
                assert_matches_reference(
                    Case(M=M, dtype=dtype, dropout=dropout, blocksize=blocksize, device="cuda", **shape)
                )


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "M"), [("few", 1), ("fused", 24), ("fused", 200), ("dense", 100)])
def test_every_kernel_can_be_captured_in_a_graph(kernel, M, only):
    only(kernel)
    case = Case(M=M, N=1024, K=1024, dtype=torch.bfloat16, device="cuda")

    def step():
        y, S = raw.lora_linear(*case.forward())
        return y, S, *raw.lora_linear_backward(*case.backward(S), True)

    step()  # loads the kernels, which must not happen while capturing
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        case.x.copy_(torch.randn_like(case.x))
        graph.replay()
        for got, expected in zip(captured, step()):
            assert_same_bits(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", dispatch.KERNELS)
def test_a_kernel_works_on_the_current_stream_and_repeats_bit_for_bit(kernel, only):
    only(kernel)
    case = Case(M=16, N=2048, K=2048, dtype=torch.bfloat16, dropout=0.1, device="cuda")
    expected = raw.lora_linear(*case.forward())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):
            for got, wanted in zip(raw.lora_linear(*case.forward()), expected):
                assert_same_bits(got, wanted)
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("lora_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [3, 40])
def test_adapters_of_any_dtype_are_rounded_once(instruction_set, lora_dtype, M):
    case = Case(M=M, R=20, dtype=torch.bfloat16, dropout=0.2)
    case.A, case.B = case.A.to(lora_dtype), case.B.to(lora_dtype)
    assert_matches_reference(case)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 0, 5), (4, 1, 1, 2)], ids=str)
def test_any_leading_shape(device, lead):
    case = Case(device=device)
    x = torch.randn(*lead, 256, device=device)
    y = ops.lora_linear(x, *case.forward()[1:])
    assert y.shape == (*lead, 100)
    flat, _ = raw.lora_linear(x.reshape(-1, 256), *case.forward()[1:])
    assert_same_bits(y.reshape(-1, 100), flat)


def test_strides_do_not_matter(device):
    case = Case(M=8, device=device)
    x = case.x.t().contiguous().t().requires_grad_()
    y = ops.lora_linear(x, case.qweight, case.absmax, case.nested, case.bias, case.A.t().contiguous().t(), case.B)
    plain = ops.lora_linear(case.x, case.qweight, case.absmax, case.nested, case.bias, case.A, case.B)
    assert_same_bits(y, plain)
    y.backward(torch.ones(1, 1, device=device).expand(8, 100))  # an expanded gradient has stride zero
    expected = case.x.clone().requires_grad_()
    ops.lora_linear(
        expected, case.qweight, case.absmax, case.nested, case.bias, case.A, case.B
    ).backward(torch.ones(8, 100, device=device))  # fmt: skip
    # On CUDA float32 is cuBLAS' affair, which adds in another order for a transposed operand.
    torch.testing.assert_close(x.grad, expected.grad, rtol=0, atol=1e-5 if device.type == "cuda" else 0)


def test_keeps_x_S_and_the_seed_and_nothing_else(device):
    case = Case(dtype=torch.bfloat16, device=device)
    A, B = case.A.requires_grad_(), case.B.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.lora_linear(case.x, case.qweight, case.absmax, case.nested, case.bias, A, B, *case.options)
    known = {t.data_ptr() for t in (case.x, case.qweight, case.absmax, case.nested, A, B, case.options[2])}
    new = [t for t in saved if t.data_ptr() not in known]
    assert [tuple(t.shape) for t in new] == [(13, 16)]


def test_x_that_needs_no_gradient_costs_none(device):
    case = Case(device=device)
    A = case.A.requires_grad_()
    y = ops.lora_linear(case.x, case.qweight, case.absmax, case.nested, case.bias, A, case.B, *case.options)
    y.sum().backward()
    assert case.x.grad is None
    assert A.grad.abs().sum() > 0
    _, S = raw.lora_linear(*case.forward())
    dx, _, _ = raw.lora_linear_backward(*case.backward(S.detach()), False)
    assert dx.shape == (0,)


def test_lora_that_is_frozen_still_passes_the_gradient_on(device):
    case = Case(device=device)
    x = case.x.clone().requires_grad_()
    y = ops.lora_linear(x, case.qweight, case.absmax, case.nested, case.bias, case.A, case.B, *case.options)
    y.backward(case.dy)
    assert x.grad.abs().sum() > 0
    assert case.A.grad is None


def test_the_op_itself_has_the_same_gradient(device):
    # ops.lora_linear brings its own in eager code; torch.compile sees the registered one.
    case = Case(dtype=torch.bfloat16, dropout=0.2, device=device)
    inputs = [tensor.clone().requires_grad_() for tensor in (case.x, case.A, case.B)]

    def call(op, x, A, B):
        return op(x, case.qweight, case.absmax, case.nested, case.bias, A, B, *case.options)

    y = call(ops.lora_linear, *inputs)
    expected = torch.autograd.grad(y, inputs, case.dy)
    registered, _ = call(raw.lora_linear, *inputs)
    assert_same_bits(registered, y)
    found = torch.autograd.grad(registered, inputs, case.dy)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_a_second_derivative_is_refused(device):
    case = Case(device=device)
    x = case.x.clone().requires_grad_()
    y = ops.lora_linear(x, case.qweight, case.absmax, case.nested, case.bias, case.A, case.B, *case.options)
    (dx,) = torch.autograd.grad(y, x, case.dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_nan_stays_in_its_row(device):
    case = Case(dtype=torch.bfloat16, device=device)
    case.x[3, 5] = float("nan")
    y, S = raw.lora_linear(*case.forward())
    assert y[3].isnan().all()
    assert S[3].isnan().all()
    assert not y[:3].isnan().any()
    assert not y[4:].isnan().any()


BAD = [
    ({"x": torch.zeros(2, 60)}, ValueError, r"the last dimension of x must be 64 \(in features of qweight\), got"),
    ({"x": torch.zeros(2, 64).double()}, TypeError, "x must be float32, bfloat16 or float16, got float64"),
    ({"qweight": torch.zeros(8, 32)}, TypeError, "qweight must be uint8, got float32"),
    ({"qweight": torch.zeros(256, dtype=torch.uint8)}, ValueError, r"qweight must be \[N, K/2\], got shape \[256\]"),
    ({"absmax": torch.zeros(8, 2)}, ValueError, r"absmax must hold 8 values \(one per 64 weights\), got shape"),
    ({"absmax": torch.zeros(8, 1, dtype=torch.uint8)}, TypeError, "absmax must be float32, or uint8 with nested"),
    ({"nested": torch.zeros(2)}, TypeError, "absmax must be uint8, got float32"),
    ({"bias": torch.zeros(7)}, ValueError, r"bias must be \[8\], got shape \[7\]"),
    ({"lora_A": torch.zeros(4, 64)}, ValueError, "lora_A and lora_B must come together, got only one"),
    ({"lora_A": torch.zeros(4, 60), "lora_B": torch.zeros(8, 4)}, ValueError, r"lora_A must be \[R, 64\] with R >= 1"),
    ({"lora_A": torch.zeros(4, 64), "lora_B": torch.zeros(8, 5)}, ValueError, r"lora_B must be \[8, 4\]"),
    ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1"),
    ({"dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\), got -0.1"),
    ({"scaling": float("nan")}, ValueError, "scaling must be finite in float32, also divided by 1 - dropout, got nan"),
    ({"scaling": -float("inf")}, ValueError, "scaling must be finite in float32, also .*, got -inf"),
    ({"scaling": 1e39}, ValueError, r"scaling must be finite in float32, also .*, got 1e\+39"),
    ({"scaling": 3e38, "dropout": 0.5}, ValueError, r"scaling must be finite .* divided by 1 - dropout, got 3e\+38"),
    ({"lora_A": torch.zeros(4, 64), "lora_B": torch.zeros(8, 4), "dropout": 0.5}, ValueError, "dropout > 0 needs"),
    ({"blocksize": 96}, ValueError, "blocksize must be a power of two"),
    ({"blocksize": 128}, ValueError, "qweight must have a multiple of blocksize / 2 = 64 columns"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_says_what_is_wrong(device, change, error, message):
    arguments = {"x": torch.zeros(2, 64), "qweight": torch.zeros(8, 32, dtype=torch.uint8), "absmax": torch.ones(8, 1)}
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in {**arguments, **change}.items()}
    with pytest.raises(error, match=f"^lora_linear: {message}"):
        ops.lora_linear(**arguments)


def test_backward_says_what_is_wrong(device):
    case = Case(device=device)
    _, S = raw.lora_linear(*case.forward())
    dy, x, *rest = case.backward(S)
    with pytest.raises(
        ValueError, match=r"^lora_linear_backward: dy must be \[13 tokens, 100\], got shape \[12, 100\]"
    ):
        raw.lora_linear_backward(dy[:12], x, *rest, True)
    with pytest.raises(TypeError, match="^lora_linear_backward: dy must be float32, got bfloat16"):
        raw.lora_linear_backward(dy.bfloat16(), x, *rest, True)
    with pytest.raises(ValueError, match=r"^lora_linear_backward: S must be \[13, 16\], got shape \[13, 3\]"):
        raw.lora_linear_backward(dy, x, S[:, :3], *rest[1:], True)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_opcheck(device, dropout):
    case = Case(device=device, dropout=dropout)
    x, A, B = (t.requires_grad_() for t in (case.x, case.A, case.B))
    torch.library.opcheck(raw.lora_linear.default, case.forward())
    _, S = raw.lora_linear(*case.forward())
    for t in (x, A, B):
        t.requires_grad_(False)
    torch.library.opcheck(raw.lora_linear_backward.default, (*case.backward(S.detach()), True))


def test_opcheck_without_lora(device):
    case = Case(device=device, R=0, bias=False)
    case.x.requires_grad_()
    torch.library.opcheck(raw.lora_linear.default, case.forward())


def test_compiles_whole_and_does_not_recompile_for_another_batch(device):
    case = Case(device=device)
    A, B = case.A.requires_grad_(), case.B.requires_grad_()

    def step(x):
        y = ops.lora_linear(x, case.qweight, case.absmax, case.nested, case.bias, A, B, *case.options)
        return torch.nn.functional.silu(y).sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    # Sizes that no weight has: under dynamic=True torch takes two equal sizes for the same symbol.
    for batch, tokens in ((7, 11), (5, 17), (9, 40)):
        x = torch.randn(batch, tokens, 256, device=device)
        grads = []
        for function in (compiled, step):
            A.grad = B.grad = None
            function(x).backward()
            grads.append((A.grad.clone(), B.grad.clone()))
        torch.testing.assert_close(grads[0], grads[1])
        first = first or counter.frame_count
        assert counter.frame_count == first


def test_error_keeps_its_kind_and_text_when_compiled():
    case = Case()
    compiled = torch.compile(lambda x: ops.lora_linear(x, *case.forward()[1:]), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="^lora_linear: the last dimension of x must be 256"):
        compiled(torch.zeros(2, 64))
