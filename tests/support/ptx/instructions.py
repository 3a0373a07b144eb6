"""What instructions compute. Only IEEE forms exist here: .approx and .ftz are refused, as the contract does. The seeds
of a root and of a quotient are the exception: what a kernel corrects is exact again.

An instruction that a new kernel needs is a few lines more; until then the interpreter names it and stops.
"""

import numpy as np

from support.ptx.grid import GENERIC_SHARED, UNSIGNED, Grid, dtype_of, operation
from support.ptx.memory import PtxError
from support.ptx.parser import Instruction, Pack

IGNORED = set("rn uni sync aligned to nc ca cg cs lo L1::no_allocate relaxed gpu cta".split())
TWICE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def require_known(instruction: Instruction, *known: str) -> None:
    """Refuses a modifier whose meaning would be lost."""
    if unknown := [m for m in instruction.modifiers[:-1] if m not in IGNORED and m not in known]:
        raise PtxError(f"unsupported modifier .{unknown[0]}")


# ---- arithmetic


def _divide(x, y):
    if x.dtype.kind == "f":
        return x / y
    if (y == 0).any():
        raise PtxError("integer division by zero")
    return (x - np.fmod(x, y)) // y  # towards zero, as in C


def _remainder(x, y):
    if (y == 0).any():
        raise PtxError("integer division by zero")
    return np.fmod(x, y)


BINARY = {
    "add": np.add, "sub": np.subtract, "div": _divide, "rem": _remainder,
    "min": lambda x, y: np.fmin(x, y) if x.dtype.kind == "f" else np.minimum(x, y),
    "max": lambda x, y: np.fmax(x, y) if x.dtype.kind == "f" else np.maximum(x, y),
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
UNARY = {"abs": np.abs, "neg": np.negative, "not": np.invert, "rcp": lambda x: x.dtype.type(1) / x, "sqrt": np.sqrt}


@operation(*BINARY)
def binary(grid: Grid, instruction: Instruction) -> None:
    require_known(instruction)
    to, *operands = instruction.operands
    x, y = (grid.read(o, instruction.type) for o in operands)
    grid.write(to, BINARY[instruction.opcode](x, y))


# The card's are within an ulp of these. A kernel may use them for what nvcc makes of sqrt.rn and div.rn, which is
# correctly rounded with the card's seeds, whichever card it is, and with these.
SEEDS = {"rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x)}


@operation(*UNARY, "rsqrt")
def unary(grid: Grid, instruction: Instruction) -> None:
    to, operand = instruction.operands
    value = grid.read(operand, instruction.type)
    if instruction.opcode in SEEDS and instruction.modifiers == ("approx", "ftz", "f32"):
        if not ((value >= 2.0**-126) & (value <= 2.0**126)).all():
            raise PtxError(f"a seed of {instruction.opcode} beyond the normal numbers")
        grid.write(to, SEEDS[instruction.opcode](value.astype(np.float64)).astype(np.float32))
        return
    require_known(instruction)
    grid.write(to, UNARY[instruction.opcode](value))


def _product(instruction: Instruction, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if "wide" not in instruction.modifiers and "hi" not in instruction.modifiers:
        return x * y
    wide = dtype_of(TWICE[instruction.type])
    product = x.astype(wide) * y.astype(wide)
    return product if "wide" in instruction.modifiers else (product >> 8 * x.dtype.itemsize).astype(x.dtype)


@operation("mul", "mad")
def multiply(grid: Grid, instruction: Instruction) -> None:
    require_known(instruction, "wide", "hi")
    to, *operands = instruction.operands
    value = _product(instruction, *(grid.read(o, instruction.type) for o in operands[:2]))
    if instruction.opcode == "mad":
        kind = TWICE[instruction.type] if "wide" in instruction.modifiers else instruction.type
        value = value + grid.read(operands[2], kind)
    grid.write(to, value)


@operation("fma")
def fused_multiply_add(grid: Grid, instruction: Instruction) -> None:
    """One rounding: float32 products are exact in float64; their sum is rounded to odd there, which keeps enough."""
    require_known(instruction)
    if instruction.type != "f32":
        raise PtxError("unsupported type")
    to, *operands = instruction.operands
    x, y, z = (grid.read(o, "f32").astype(np.float64) for o in operands)
    product = x * y
    total = product + z
    virtual = total - product
    error = (product - (total - virtual)) + (z - virtual)
    even = total.view(np.int64) & 1 == 0
    inexact = even & (error != 0) & np.isfinite(total)
    total[inexact] = np.nextafter(total[inexact], np.copysign(np.inf, error[inexact]))
    grid.write(to, total.astype(np.float32))


@operation("shl", "shr")
def shift(grid: Grid, instruction: Instruction) -> None:
    to, value, amount = instruction.operands
    x, by = grid.read(value, instruction.type), grid.read(amount, "u32")
    bits = 8 * x.dtype.itemsize
    clamped = np.minimum(by, bits - 1).astype(x.dtype)
    shifted = x << clamped if instruction.opcode == "shl" else x >> clamped
    beyond = x >> (bits - 1) if instruction.opcode == "shr" and x.dtype.kind == "i" else np.zeros_like(x)
    grid.write(to, np.where(by < bits, shifted, beyond))


@operation("bfe")
def bit_field_extract(grid: Grid, instruction: Instruction) -> None:
    if instruction.type != "u32":
        raise PtxError("unsupported type")
    to, *operands = instruction.operands
    value, position, length = (grid.read(o, "u32").astype(np.uint64) for o in operands)
    grid.write(to, (value >> (position & 255) & (np.uint64(1) << (length & 255)) - 1).astype(np.uint32))


@operation("bfi")
def bit_field_insert(grid: Grid, instruction: Instruction) -> None:
    if instruction.type != "b32":
        raise PtxError("unsupported type")
    to, *operands = instruction.operands
    field, base, position, length = (grid.read(o, "u32").astype(np.uint64) for o in operands)
    mask = ((np.uint64(1) << (length & 255)) - 1 << (position & 255)) & 0xFFFFFFFF
    grid.write(to, (base & ~mask | field << (position & 255) & mask).astype(np.uint32))


@operation("prmt")
def permute_bytes(grid: Grid, instruction: Instruction) -> None:
    require_known(instruction)
    to, *operands = instruction.operands
    low, high, selector = (grid.read(o, "u32").astype(np.uint64) for o in operands)
    source, result = high << 32 | low, np.zeros(len(low), np.uint64)
    for i in range(4):
        choice = selector >> 4 * i & 15
        byte = source >> 8 * (choice & 7) & 255
        sign = np.where(byte & 128, np.uint64(255), np.uint64(0))
        result |= np.where(choice & 8, sign, byte) << 8 * i
    grid.write(to, result.astype(np.uint32))


# ---- predicates

COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "ls": np.less_equal, "hs": np.greater_equal,
    # the forms that also hold where an operand is NaN, as what their opposites are not
    "equ": lambda x, y: ~((x < y) | (x > y)), "neu": lambda x, y: ~(x == y), "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y), "gtu": lambda x, y: ~(x <= y), "geu": lambda x, y: ~(x < y),
}  # fmt: skip


@operation("setp")
def set_predicate(grid: Grid, instruction: Instruction) -> None:
    to, *operands = instruction.operands
    comparison, kind = instruction.modifiers[0], instruction.type
    x, y = (grid.read(o, kind) for o in operands[:2])
    unequal = x.dtype.kind == "f" and comparison == "ne"
    holds = (x < y) | (x > y) if unequal else COMPARE[comparison](x, y)  # .ne is false where an operand is NaN
    if isinstance(to, Pack):
        raise PtxError("unsupported: a second predicate")
    if len(instruction.modifiers) == 3:
        holds = BINARY[instruction.modifiers[1]](holds, grid.read(operands[2], "pred"))
    grid.write(to, holds)


@operation("selp")
def select(grid: Grid, instruction: Instruction) -> None:
    to, yes, no, condition = instruction.operands
    kind = instruction.type
    grid.write(to, np.where(grid.read(condition, "pred"), grid.read(yes, kind), grid.read(no, kind)))


# ---- moving and converting


@operation("mov")
def move(grid: Grid, instruction: Instruction) -> None:
    to, source = instruction.operands
    kind = instruction.type
    if kind == "pred":
        grid.write(to, grid.read(source, kind))
        return
    width = dtype_of(kind).itemsize
    if isinstance(source, Pack):
        part = 8 * width // len(source.elements)
        parts = [grid.read(e, f"u{part}").astype(f"u{width}") << part * i for i, e in enumerate(source.elements)]
        grid.write(to, np.bitwise_or.reduce(parts))
    elif isinstance(to, Pack):
        part = 8 * width // len(to.elements)
        value = grid.read(source, f"u{8 * width}")
        for i, e in enumerate(to.elements):
            grid.write(e, (value >> part * i).astype(UNSIGNED[str(part)]))
    else:
        grid.write(to, grid.read(source, f"u{8 * width}"))


@operation("cvta")
def convert_address(grid: Grid, instruction: Instruction) -> None:
    to, source = instruction.operands
    value = grid.read(source, instruction.type)
    if "shared" in instruction.modifiers:
        value = value - GENERIC_SHARED if "to" in instruction.modifiers else value + GENERIC_SHARED
    grid.write(to, value)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def to_float16(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


NARROW = {"bf16": to_bfloat16, "f16": to_float16}


@operation("cvt")
def convert(grid: Grid, instruction: Instruction) -> None:
    *_, target, source = instruction.modifiers
    require_known(instruction, target)
    to, *operands = instruction.operands
    if target in ("bf16x2", "f16x2"):
        high, low = (NARROW[target[:-2]](grid.read(o, "f32")).astype(np.uint32) for o in operands)
        grid.write(to, high << 16 | low)
    elif target in NARROW:
        grid.write(to, NARROW[target](grid.read(operands[0], source)))
    elif source == "bf16":
        grid.write(to, (grid.read(operands[0], "u16").astype(np.uint32) << 16).view(np.float32))
    else:
        x, dtype = grid.read(operands[0], source), dtype_of(target)
        rounds = x.dtype.kind == "f" and (dtype.kind != "f" or dtype.itemsize < x.dtype.itemsize)
        if rounds and (dtype.kind != "f" or "rn" not in instruction.modifiers):
            raise PtxError("unsupported rounding")
        grid.write(to, x.astype(dtype))
