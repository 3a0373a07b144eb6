"""The tall and skinny products of LoRA as their launcher makes them, executed without a GPU and held to float64."""

import ctypes
from pathlib import Path

import numpy as np
import torch

from nf4lora.ops import reference

from support.ptx.cudart import Launchers
from support.ptx.device import Buffer, Device
from support.ptx.grid import Launch
from support.ptx.nvcc import ARCHITECTURES, CSRC, compile_ptx
from support.ptx.tensors import bits

SOURCES = tuple(CSRC / "cuda" / name for name in ("lora_grad.cu", "lora_parts.cu"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMPY = [np.float32, np.uint16, np.uint16]
# Half a unit in the last place of a value just above a power of two; of float32 what its sums add.
HALF_ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SEED = torch.tensor([-(2**40) - 12345])
SEED_OF_OUT = torch.tensor([2**50 + 99])
UNTOUCHED = 0x7777
H200 = 1  # of the cards that cudart.cpp has


MOST_SIBLINGS = 4
NO_RANK = 2**63 - 1
Matrices = ctypes.c_void_p * MOST_SIBLINGS  # one of each adapter of a group
Ranks = ctypes.c_int64 * MOST_SIBLINGS


class Expansion(ctypes.Structure):
    """As in csrc/cuda/launch.h."""

    _fields_ = [
        *[("out", ctypes.c_void_p), ("E", Matrices), ("dtype_of_E", ctypes.c_int)],
        *[("E_is_transposed", ctypes.c_bool), ("bias", ctypes.c_void_p), ("seed", ctypes.c_void_p)],
        *[("threshold", ctypes.c_uint32), ("scale", ctypes.c_float), ("columns", ctypes.c_int64)],
    ]


class TallSkinny(ctypes.Structure):
    """As in csrc/cuda/launch.h."""

    _fields_ = [
        *[("dtype", ctypes.c_int), ("Z", ctypes.c_void_p), ("F", Matrices), ("dtype_of_F", ctypes.c_int)],
        *[("F_is_transposed", ctypes.c_bool), ("L", ctypes.c_void_p), ("seed", ctypes.c_void_p)],
        *[("threshold", ctypes.c_uint32), ("inner_scale", ctypes.c_float), ("outer_scale", ctypes.c_float)],
        *[("P", Matrices), ("G", Matrices), ("dtype_of_G", ctypes.c_int)],
        *[("G_is_transposed", ctypes.c_bool), ("workspace", ctypes.c_void_p)],
        *((name, ctypes.c_int64) for name in ("M", "D", "R")),
        *[("first_rank", Ranks), ("P_stride", ctypes.c_int64), ("most_inner", ctypes.c_int64)],
        *[("copy", ctypes.c_void_p), ("copy_stride", ctypes.c_int64), ("expansion", Expansion)],
        ("adds_as_both", ctypes.c_bool),
    ]

    def __init__(self, *, F=None, P=None, G=None, first_rank=(), **fields):
        """F, P and G: an address, or those of each adapter of a group."""
        matrices = {name: of(value) for name, value in (("F", F), ("P", P), ("G", G))}
        begins = (*first_rank, *[NO_RANK] * (MOST_SIBLINGS - len(first_rank))) if first_rank else (0, *[NO_RANK] * 3)
        super().__init__(**matrices, first_rank=Ranks(*begins), **fields)


def of(matrices) -> Matrices:
    """The address of one matrix, or those of several, as the launcher takes them."""
    return Matrices(*(matrices if isinstance(matrices, (list, tuple)) else [matrices]))


class Parts(ctypes.Structure):
    """As in csrc/cuda/lora_parts.h."""

    _fields_ = [
        *[("inner", ctypes.c_void_p), ("outer", ctypes.c_void_p)],
        *((name, ctypes.c_int64) for name in ("inner_parts", "outer_parts", "begin", "rows")),
        ("completes_G", ctypes.c_bool),
    ]


def threshold(dropout: float) -> int:
    return int(dropout * 2**32 + 0.5)


class Products:
    """tall_skinny on one architecture: `run` draws operands, checks what is written, and returns it."""

    def __init__(self, architecture=ARCHITECTURES[0], late_copies=True, card=0, sources=SOURCES):
        flags = (f"-I{CSRC / 'cuda'}",) if sources is not SOURCES else ()
        self.device = Device(*(compile_ptx(Path(source), architecture, *flags) for source in sources))
        self.device.late_copies = late_copies
        self.launchers = Launchers(self.device, card)

    def record(self) -> list[Launch]:
        """From now on launches are only noted down, in this list: of shapes that would take an hour."""
        launches: list[Launch] = []
        self.device.run = lambda kernel, arguments, launch: launches.append(launch)
        return launches

    def upload(self, tensor, offset=0) -> int:
        return self.device.upload(bits(tensor), offset).address

    def run(
        self,
        M,
        D,
        R,
        dtype=torch.bfloat16,
        which="both",
        dropout=0.0,
        F=(0, False),
        G=(0, False),
        offset=0,
        most_inner=64 << 20,
        copy=None,
        expansion=None,
        adds_as_both=False,
        ranks=None,
        P_stride=0,
    ):
        """P and G as tensors, or what the launcher said.

        ranks: those of each adapter of a group, R together; F and G then lie transposed. P_stride: of P's rows, more
        than R.

        F and G: a number of DTYPES and whether it lies transposed. copy: columns of zeros behind P; the copy is
        checked to the bit. expansion: arguments of `_expand`; the result then ends with out.
        """
        draw = torch.Generator().manual_seed(M + D + R)
        Z, L = (torch.randn(M, columns, generator=draw).to(dtype) for columns in (D, R))
        factor = (torch.randn(D, R, generator=draw) / max(D, 1) ** 0.5).to(DTYPES[F[0]])
        inner, outer = which != "outer", which != "inner"
        own = ranks or (R,)
        begins = [sum(own[:i]) for i in range(len(own))]
        Ps = [self.device.empty((M, count), np.uint16) for count in own]
        if P_stride:
            Ps = [self.device.upload(np.full((M, P_stride), UNTOUCHED, np.uint16)) for _ in own]
        gs = [self.device.empty(D * count, NUMPY[G[0]]) for count in own]
        factors = (factor.T if F[1] else factor).split(own, dim=0 if F[1] else 1)
        arguments = TallSkinny(
            dtype=DTYPES.index(dtype), Z=self.upload(Z, offset), F=[self.upload(each) for each in factors],
            dtype_of_F=F[0], F_is_transposed=F[1], L=self.upload(L), seed=self.upload(SEED) if dropout else None,
            threshold=threshold(dropout), inner_scale=1.25, outer_scale=0.5,
            P=[P.address for P in Ps] if inner else None, G=[g.address for g in gs] if outer else None,
            dtype_of_G=G[0], G_is_transposed=G[1], first_rank=begins,
            M=M, D=D, R=R, P_stride=P_stride, most_inner=most_inner, adds_as_both=adds_as_both,
        )  # fmt: skip
        rows = None
        if copy is not None:
            rows = self.device.empty((M, D + R + copy), np.uint16)
            arguments.copy, arguments.copy_stride = rows.address, D + R + copy
        expand = None if expansion is None else self._expand(arguments, draw, dtype, **expansion)
        floats = self.launchers.tall_skinny_workspace(ctypes.pointer(arguments), result=ctypes.c_int64)
        arguments.workspace = self.device.empty(floats, np.float32).address
        said = self.launchers.tall_skinny(ctypes.pointer(arguments), None)
        if said:
            return said
        z = Z.double() * (reference.dropout_mask(M, D, dropout, SEED) if dropout else 1)
        result = []
        # float32 sums in some order, 2^-18 of values of a few dozen at most, then one rounding.
        if inner:
            for P, count in zip(Ps, own, strict=True):
                assert (P.numpy()[:, count:] == UNTOUCHED).all()
            rows_of = [P.numpy()[:, :count] for P, count in zip(Ps, own, strict=True)]
            result.append(torch.from_numpy(np.ascontiguousarray(np.concatenate(rows_of, axis=1))).view(dtype))
            expected = 1.25 * (z @ factor.to(dtype).double())
            torch.testing.assert_close(result[-1].double(), expected, rtol=HALF_ULP[dtype], atol=1e-5)
        if outer:
            shapes = [(count, D) if G[1] else (D, count) for count in own]
            values = [torch.from_numpy(g.numpy()).view(DTYPES[G[0]]) for g in gs]
            parts = [part.reshape(shape) for part, shape in zip(values, shapes, strict=True)]
            result.append(torch.cat(parts, dim=0 if G[1] else 1))
            expected = 0.5 * (z.T @ L.double())
            expected = expected.T if G[1] else expected
            torch.testing.assert_close(result[-1].double(), expected, rtol=HALF_ULP[DTYPES[G[0]]], atol=1e-4)
        if rows is not None:
            zeros = np.zeros((M, copy), np.uint16)
            whole = [bits(Z).reshape(M, D), bits(result[0]).reshape(M, R), zeros]
            assert (rows.numpy() == np.concatenate(whole, axis=1)).all()
        if expand is not None:
            result.append(expand(result[0]))
        return result

    def expand(self, M, columns, ranks, dtype=torch.bfloat16, dtype_of_E=0, P_stride=0, bias=False, dropout=0.0):
        """`expand` of a P that is there, with a matrix E of each adapter: checked, and returned, or what it said."""
        draw = torch.Generator().manual_seed(M + columns)
        R = sum(ranks)
        P = torch.randn(M, P_stride or R, generator=draw).to(dtype)
        begins = [sum(ranks[:i]) for i in range(len(ranks))]
        arguments = TallSkinny(
            dtype=DTYPES.index(dtype), P=self.upload(P), M=M, R=R, P_stride=P_stride, first_rank=begins
        )
        check = self._expand(arguments, draw, dtype, columns, (dtype_of_E, False), bias, dropout, ranks=ranks)
        said = self.launchers.expand(ctypes.pointer(arguments), None)
        return said if said else check(P[:, :R])

    def _expand(
        self,
        arguments,
        draw,
        dtype,
        columns,
        E=(0, False),
        bias=True,
        dropout=0.0,
        offset=0,
        offset_of_E=0,
        ranks=None,
    ):
        """Asks for out, and returns what checks it, given P. Offsets in bytes put out and E off their alignment."""
        M, R = arguments.M, arguments.R
        factor = torch.randn(R, columns, generator=draw).to(DTYPES[E[0]])
        offsets = torch.randn(columns, generator=draw)
        factors = factor.split(ranks) if ranks else [factor.T if E[1] else factor]
        out: Buffer = self.device.empty((M, columns), np.uint16, offset)
        arguments.expansion = Expansion(
            out=out.address, E=of([self.upload(each, offset_of_E) for each in factors]), dtype_of_E=E[0],
            E_is_transposed=E[1], bias=self.upload(offsets) if bias else None,
            seed=self.upload(SEED_OF_OUT) if dropout else None, threshold=threshold(dropout), scale=0.75,
            columns=columns,
        )  # fmt: skip

        def check(P):
            got = torch.from_numpy(out.numpy()).view(dtype).reshape(M, columns)
            mask = reference.dropout_mask(M, columns, dropout, SEED_OF_OUT) if dropout else torch.ones(M, columns)
            expected = 0.75 * mask * (P.double() @ factor.to(dtype).double()) + (offsets.double() if bias else 0)
            torch.testing.assert_close(got.double(), expected, rtol=HALF_ULP[dtype], atol=2e-5)
            if not bias:
                assert not got[mask == 0].any()
            return got

        return check
