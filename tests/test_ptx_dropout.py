"""The CUDA kernel of dropout alone, executed without a GPU: to the bit what the reference leaves."""

import ctypes

import numpy as np
import pytest
import torch

from nf4lora.ops import reference

from support.philox import kept
from support.ptx import ARCHITECTURES, Device, Launchers, PtxError, compile_ptx, find_nvcc
from support.ptx.nvcc import CSRC
from support.ptx.tensors import bits

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not on PATH")

SOURCE = CSRC / "cuda" / "dropout.cu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = torch.tensor([-(2**40) - 12345])


class Dropper:
    """The launcher on one architecture, as a function of a tensor."""

    def __init__(self, architecture=ARCHITECTURES[0]):
        self.device = Device(compile_ptx(SOURCE, architecture))
        self.launchers = Launchers(self.device)
        self.seed = self.device.upload(bits(SEED))

    def launch(self, source, target, dtype, count, dropout=0.3):
        arguments = ctypes.c_int(DTYPES.index(dtype)), self.seed, ctypes.c_uint32(int(dropout * 2**32 + 0.5)), count
        return self.launchers.dropout(source, target, *arguments, None)

    def check(self, count, dtype, dropout=0.3, in_place=False, offsets=(0, 0)):
        values = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
        source = self.device.upload(bits(values), offsets[0])
        target = source if in_place else self.device.empty(count, bits(values).dtype, offsets[1])
        assert self.launch(source, target, dtype, count, dropout) is None
        mask = reference.dropout_mask(1, count, dropout, SEED)[0].bool()
        assert 0 < mask.sum() < count
        assert (target.numpy() == bits(torch.where(mask, values, torch.zeros_like(values)))).all()
        if not in_place:
            assert (source.numpy() == bits(values)).all()


@pytest.fixture(scope="module")
def one():
    return Dropper()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_leaves_what_the_reference_leaves(architecture):
    dropper = Dropper(architecture)
    for dtype in DTYPES:
        dropper.check(3 * 1024 + 20, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [16, 20, 2044, 2048, 2052])  # 20 and 2044: four of the last eight 16-bit values
def test_any_multiple_of_four_in_place_or_not(one, count, dtype):
    one.check(count, dtype)
    one.check(count, dtype, in_place=True)


@pytest.mark.parametrize("off", [(1, 1), (1, 0), (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_tensors_take_the_slow_path_to_the_same_bits(one, dtype, off):
    one.check(100, dtype, offsets=tuple(dtype.itemsize * values for values in off))


@pytest.mark.parametrize("dropout", [1e-9, 0.999])
def test_the_threshold_is_that_of_the_probability(one, dropout):
    values = torch.ones(4096)
    target = one.device.empty(4096, np.float32)
    assert one.launch(one.device.upload(bits(values)), target, torch.float32, 4096, dropout) is None
    assert (target.numpy() == reference.dropout_mask(1, 4096, dropout, SEED)[0].numpy()).all()


def test_what_is_dropped_may_be_no_number(one):
    values = torch.full((64,), float("nan"))
    target = one.device.empty(64, np.float32)
    assert one.launch(one.device.upload(bits(values)), target, torch.float32, 64, 0.5) is None
    kept = reference.dropout_mask(1, 64, 0.5, SEED)[0].bool().numpy()
    assert (np.isnan(target.numpy()) == kept).all()


def test_a_count_off_four_is_refused_and_none_launches_nothing(one):
    one.launchers.launches.clear()
    for count in (6, -4):
        assert one.launch(None, None, torch.float32, count) == "a number of values that is no multiple of 4"
    assert one.launch(None, None, torch.float32, 0) is None
    assert one.launchers.launches == []


def test_launch_error_is_reported(one):
    one.launchers.fail_next(1)
    source = one.device.upload(np.zeros(4, np.float32))
    assert one.launch(source, source, torch.float32, 4) == "an error of the test"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_indices_are_64_bit(dtype):
    """The last block of 2^34 values: the pointers are moved back, so that only the end of each tensor is there."""
    dropper, count, last = Dropper(), 2**34 + 1020, 1020
    dropper.launchers.only_last_block = True
    values = torch.randn(last, generator=torch.Generator().manual_seed(0)).to(dtype)
    source, target = dropper.device.upload(bits(values)), dropper.device.empty(last, bits(values).dtype)
    addresses = (ctypes.c_void_p(b.address - dtype.itemsize * 2**34 & 2**64 - 1) for b in (source, target))
    assert dropper.launch(*addresses, dtype, count) is None
    # 2^34 is the begin of row 2^24 of a matrix with 1024 columns.
    mask = kept((1, 1024), 2**24, 0.3, SEED.item())[0, :last]
    assert (target.numpy() == bits(torch.where(mask, values, torch.zeros_like(values)))).all()


def test_a_buffer_one_value_short_is_noticed(one):
    """The control of all of the above: the interpreter would see an access past the end."""
    source, target = one.device.upload(np.zeros(15, np.float32)), one.device.empty(16, np.float32)
    with pytest.raises(PtxError, match="out of bounds"):
        one.launch(source, target, torch.float32, 16)


@pytest.mark.slow
def test_a_planted_mistake_is_noticed(tmp_path):
    """A word too far, where dropout is at work."""
    source, text = SOURCE.read_text(), "if (words.value[j] < threshold)"
    assert source.count(text) == 1
    planted = tmp_path / SOURCE.name
    planted.write_text(source.replace(text, "if (words.value[(j + 1) % kWords] < threshold)"))
    dropper = Dropper()
    dropper.device = Device(compile_ptx(planted, ARCHITECTURES[0], f"-I{CSRC / 'cuda'}"))
    dropper.launchers, dropper.seed = Launchers(dropper.device), dropper.device.upload(bits(SEED))
    with pytest.raises(AssertionError):
        dropper.check(64, torch.float32)
