"""The PTX interpreter itself: what instructions compute, and that it finds each mistake that planted.cu holds."""

from pathlib import Path

import numpy as np
import pytest

from support.ptx import ARCHITECTURES, Device, PtxError, compile_ptx, find_nvcc
from support.ptx.grid import Launch

PLANTED = Path(__file__).parent / "support" / "ptx" / "planted.cu"
BUGS = [
    "none", "read_past_end", "half_the_lanes", "no_syncwarp", "two_writers", "misaligned", "no_sync_after_wait",
    "waits_for_a_group_too_few", "no_sync_before_ldmatrix", "no_sync_before_reuse", "writes_row_past_end",
    "divergent_sync",
]  # fmt: skip
GEMM_SHARED = 2 * 32 * 24 * 2 + 8 * 24 * 2

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not on PATH")


def to_bf16(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) >> 16).astype(np.uint16)  # exact where the low half is zero


def run_peak(bug: str, architecture: str = "80", count: int = 64 * 9 - 5) -> None:
    x = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    device = Device(compile_ptx(PLANTED, architecture))
    out = device.empty(-(-count // 64), np.float32)
    device.launch("peak_kernel", 3, 128, [device.upload(x), out, count, BUGS.index(bug)])
    expected = [np.abs(x[i : i + 64]).max() for i in range(0, count, 64)]
    assert out.numpy().tolist() == expected


def run_gemm(bug: str, architecture: str = "80", late: bool = True, shared: int = GEMM_SHARED) -> None:
    rng, (M, K) = np.random.default_rng(0), (45, 64)
    a, b = (rng.integers(-8, 9, (rows, K)).astype(np.float32) for rows in (M, 8))  # every sum is exact
    device = Device(compile_ptx(PLANTED, architecture))
    device.late_copies = late
    y = device.empty((M, 8), np.float32)
    device.launch("gemm_kernel", 2, 64, [device.upload(to_bf16(a)), device.upload(b), y, M, K, BUGS.index(bug)], shared)
    assert (y.numpy() == a @ b.T).all(), "mismatch"


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_correct_kernels_pass(architecture):
    run_peak("none", architecture)
    run_gemm("none", architecture, late=True)
    run_gemm("none", architecture, late=False)


@needs_nvcc
@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("read_past_end", "out of bounds"),
        ("half_the_lanes", "divergence: .* wait for lanes of their warp forever"),
        ("no_syncwarp", "race: a read of shared memory"),
        ("two_writers", "race"),
        ("misaligned", "misaligned: 8 bytes"),
    ],
)
def test_planted_bug_of_a_warp_is_found(bug, message):
    with pytest.raises(PtxError, match=message):
        run_peak(bug)


@needs_nvcc
@pytest.mark.parametrize("late", [True, False], ids=["late_copies", "early_copies"])
@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("no_sync_after_wait", "race: a read of shared memory"),
        ("no_sync_before_ldmatrix", "race"),
        ("no_sync_before_reuse", "race"),
        ("writes_row_past_end", "out of bounds"),
        ("divergent_sync", "divergence: 40 threads of the block wait at a barrier forever, 0 have exited"),
    ],
)
def test_planted_bug_of_a_block_is_found(bug, message, late):
    with pytest.raises(PtxError, match=message):
        run_gemm(bug, late=late)


@needs_nvcc
def test_wait_for_too_few_groups_shows_when_copies_are_late():
    with pytest.raises(AssertionError, match="mismatch"):
        run_gemm("waits_for_a_group_too_few", late=True)


@needs_nvcc
def test_too_little_dynamic_shared_memory_is_found():
    with pytest.raises(PtxError, match=r"out of bounds: .* shared"):
        run_gemm("none", shared=GEMM_SHARED - 48)


@needs_nvcc
def test_atomics_do_not_race():
    device = Device(compile_ptx(PLANTED, "80"))
    total = device.upload(np.zeros(1, np.uint32))
    device.launch("count_kernel", 3, 40, [total])
    assert total.numpy() == 120


@needs_nvcc
def test_fast_math_is_refused():
    device = Device(compile_ptx(PLANTED, "80", "--use_fast_math"))
    x, out = device.upload(np.ones(64, np.float32)), device.empty(1, np.float32)
    with pytest.raises(PtxError, match=r"unsupported modifier \.ftz"):
        device.launch("peak_kernel", 1, 32, [x, out, 64, 0])


# ---- what instructions compute, without nvcc


def evaluate(instruction: str, result: type, *operands: np.ndarray) -> np.ndarray:
    """Runs `instruction result, operand...;` with one thread per element; operands are arrays of one length."""
    dtypes = [np.dtype(result), *(o.dtype for o in operands)]
    names = [f"%v{i}" for i in range(len(dtypes))]
    lines = [f".reg .b{8 * d.itemsize} {n};" for d, n in zip(dtypes, names, strict=True)]
    lines += [".reg .b64 %at<2>;", ".reg .b32 %t;", "mov.u32 %t, %tid.x;"]
    for i, (dtype, name) in enumerate(zip(dtypes, names, strict=True)):
        access = f"b{8 * dtype.itemsize}"
        step = f"mul.wide.u32 %at0, %t, {dtype.itemsize};"
        address = [step, f"ld.param.u64 %at1, [p{i}];", "add.s64 %at0, %at0, %at1;"]
        if i:
            lines += [*address, f"ld.global.{access} {name}, [%at0];"]
        else:
            last = [*address, f"st.global.{access} [%at0], {name};"]
    lines += [f"{instruction} {', '.join(names)};", *last, "ret;"]
    parameters = ",".join(f".param .u64 p{i}" for i in range(len(names)))
    newline = "\n"
    device = Device(f".visible .entry k({parameters})\n{{\n{newline.join(lines)}\n}}")
    out = device.empty(len(operands[0]), result)
    device.launch("k", 1, len(operands[0]), [out, *map(device.upload, operands)])
    return out.numpy()


def u32(*values) -> np.ndarray:
    return np.array(values, np.uint32)


def f32(*values) -> np.ndarray:
    return np.array(values, np.float32)


def test_integer_instructions():
    assert evaluate("bfi.b32", np.uint32, u32(0xFF), u32(0x12345678), u32(8), u32(4)).tolist() == [0x12345F78]
    assert evaluate("bfe.u32", np.uint32, u32(0x12345678), u32(8), u32(12)).tolist() == [0x456]
    assert evaluate("shl.b32", np.uint32, u32(3, 3), u32(31, 32)).tolist() == [0x80000000, 0]
    assert evaluate("shr.s32", np.int32, np.array([-8, -8], np.int32), u32(1, 99)).tolist() == [-4, -1]
    assert evaluate("mul.hi.u32", np.uint32, u32(0xD2511F53), u32(0xFFFFFFFF)).tolist() == [0xD2511F52]
    assert evaluate("mul.wide.u32", np.uint64, u32(2**31), u32(6)).tolist() == [6 * 2**31]
    assert evaluate("rem.s32", np.int32, np.array([-7], np.int32), np.array([3], np.int32)).tolist() == [-1]
    assert evaluate("div.s32", np.int32, np.array([-7], np.int32), np.array([3], np.int32)).tolist() == [-2]


def test_prmt_picks_bytes_and_signs():
    picked = evaluate("prmt.b32", np.uint32, u32(0x33221180, 0x33221180), u32(0x77665544, 0), u32(0x7502, 0x8888))
    assert picked.tolist() == [0x77558022, 0xFFFFFFFF]


def test_rounding_is_to_nearest_even():
    halfway = f32(1 + 2**-8, 1 + 3 * 2**-8, 3.3895314e38, -1e-40)
    assert evaluate("cvt.rn.bf16.f32", np.uint16, halfway).tolist() == [0x3F80, 0x3F82, 0x7F7F, 0x8001]
    packed = evaluate("cvt.rn.f16x2.f32", np.uint32, f32(1 + 2**-11, 2**-25), f32(65520.0, 6e-8))
    assert [hex(p) for p in packed] == ["0x3c007c00", "0x1"]
    assert evaluate("cvt.rn.f32.f64", np.float32, np.array([1 + 2.0**-24, 1 + 3 * 2.0**-24])).tolist() == [
        1.0,
        float(np.float32(1 + 2.0**-22)),
    ]


def test_fma_rounds_once():
    # The product is 1 + 2^-11 + 2^-24: rounding it first loses the last bit, with which the sum lies past halfway.
    x, z = f32(1 + 2**-12), f32(-(1 + 2**-11))
    assert evaluate("fma.rn.f32", np.float32, x, x, z).tolist() == [2**-24]
    # z + 2^-24 is halfway between two floats; the product lies below 2^-24 by less than float64 can tell beside z.
    x, y, z = f32(2**-12 * (1 + 2**-18)), f32(2**-12 * (1 - 2**-18)), f32(1 + 2**-23)
    assert evaluate("fma.rn.f32", np.float32, x, y, z).tolist() == [1 + 2**-23]


def test_comparison_with_nan():
    lines = "setp.{0}.f32 p, {1}, {2}; selp.u32 {3}, 1, 0, p"
    for comparison, expected in {"lt": 0, "ne": 0, "neu": 1, "gtu": 1, "equ": 1}.items():
        text = lines.format(comparison, "%v1", "%v2", "%v0")
        kernel = f""".entry k(.param .u64 p0, .param .u64 p1)
        {{ .reg .b64 %a<2>; .reg .b32 %v<3>; .reg .pred p;
           ld.param.u64 %a0, [p0]; ld.param.u64 %a1, [p1]; ld.global.f32 %v1, [%a1]; mov.f32 %v2, 0f3F800000;
           {text}; st.global.u32 [%a0], %v0; ret; }}"""
        device = Device(kernel)
        out = device.empty(1, np.uint32)
        device.launch("k", 1, 1, [out, device.upload(f32(np.nan))])
        assert out.numpy().tolist() == [expected], comparison


def test_seeds_of_roots_and_quotients_are_the_nearest():
    x = f32(4, 3, 2.0**-126, 2.0**126)
    np.testing.assert_array_equal(
        evaluate("rsqrt.approx.ftz.f32", np.float32, x), np.float32(1 / np.sqrt(np.float64(x)))
    )
    np.testing.assert_array_equal(evaluate("rcp.approx.ftz.f32", np.float32, x), np.float32(1 / np.float64(x)))
    for extreme in (0, 2.0**-127, np.inf, np.nan, -1):
        with pytest.raises(PtxError, match="beyond the normal"):
            evaluate("rsqrt.approx.ftz.f32", np.float32, f32(extreme))


INEXACT = ["div.approx.f32", "add.rn.ftz.f32", "sin.approx.f32", "mul.rz.f32", "sqrt.approx.ftz.f32", "rcp.approx.f32"]


@pytest.mark.parametrize("instruction", [*INEXACT, "rsqrt.approx.f32"])
def test_inexact_and_unknown_instructions_are_refused(instruction):
    operands = [f32(1)] * (2 if instruction[:3] in ("div", "add", "mul") else 1)
    with pytest.raises(PtxError, match="unsupported"):
        evaluate(instruction, np.float32, *operands)


def test_reading_what_nobody_wrote_is_found():
    device = Device(
        """.entry k(.param .u64 p0, .param .u64 p1)
        { .reg .b64 %a<2>; .reg .b32 %v; ld.param.u64 %a0, [p0]; ld.param.u64 %a1, [p1];
          ld.global.u32 %v, [%a1]; st.global.u32 [%a0], %v; ret; }"""
    )
    with pytest.raises(PtxError, match="never written"):
        device.launch("k", 1, 1, [device.empty(1, np.uint32), device.empty(1, np.uint32)])
    with pytest.raises(PtxError, match="4 bytes of a buffer"):
        device.empty(1, np.uint32).numpy()


@pytest.mark.parametrize(
    ("waits", "load", "found"),
    [
        (True, "ld.global", None),
        (False, "ld.global", "race: .* without griddepcontrol.wait"),
        (True, "ld.global.nc", "ld.nc of global memory that the kernel before wrote, beside which this one started"),
    ],
)
def test_reading_beside_a_kernel_that_has_not_ended_is_found(waits, load, found):
    def text(name, body):
        return f""".entry {name}(.param .u64 p0)
        {{ .reg .b64 %a; .reg .b32 %v; ld.param.u64 %a, [p0]; {body} ret; }}"""

    wait = "griddepcontrol.wait;" if waits else ""
    writes = "mov.b32 %v, 7; griddepcontrol.launch_dependents; st.global.u32 [%a], %v;"
    device = Device(text("first", writes), text("second", f"{wait} {load}.u32 %v, [%a];"))
    buffer = device.empty(1, np.uint32)
    device.launch("first", 1, 1, [buffer])
    second = device.kernel("second")
    run = (second, buffer.address.to_bytes(8, "little"), Launch((1, 1, 1), (1, 1, 1), early=True))
    if found is None:
        device.run(*run)
    else:
        with pytest.raises(PtxError, match=found):
            device.run(*run)
