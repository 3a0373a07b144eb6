"""Packed weights from a file: moved to pages of 2 MB, with the same bytes, and nothing else changed."""

import copy
import mmap

import pytest
import torch
from transformers import AutoModelForCausalLM

from nf4lora import NF4Config, NF4Linear
from nf4lora.memory import pages

from support.bits import assert_same_bits
from support.models import tiny_llama


@pytest.fixture
def huge_pages(monkeypatch):
    """Pages that a small tensor fills, on a system that has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("no huge pages on this system")
    monkeypatch.setattr(pages, "has_huge_pages", lambda: True)
    monkeypatch.setattr(pages, "HUGE_PAGE", mmap.PAGESIZE)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bfloat16], ids=str)
def test_a_tensor_that_fills_a_page_is_copied_to_the_start_of_one(huge_pages, dtype):
    tensor = torch.arange(3 * mmap.PAGESIZE).view(3, -1).to(dtype)
    moved = pages.in_huge_pages(tensor)
    assert_same_bits(moved, tensor)
    assert moved.data_ptr() != tensor.data_ptr()
    assert moved.data_ptr() % mmap.PAGESIZE == 0
    assert moved.untyped_storage().nbytes() == tensor.nbytes, "whoever saves or copies it takes no more than it holds"
    assert_same_bits(copy.deepcopy(moved), tensor)


def test_a_copy_of_2_MB_and_more_begins_with_such_a_page():
    tensor = torch.zeros(pages.HUGE_PAGE + 100, dtype=torch.uint8)
    moved = pages.in_huge_pages(tensor)
    assert_same_bits(moved, tensor)
    assert moved is tensor if not pages.has_huge_pages() else moved.data_ptr() % pages.HUGE_PAGE == 0


def test_what_has_no_use_for_them_stays_where_it_is(huge_pages, monkeypatch):
    small, meta = torch.zeros(mmap.PAGESIZE - 1, dtype=torch.uint8), torch.zeros(1 << 20, device="meta")
    assert pages.in_huge_pages(small) is small
    assert pages.in_huge_pages(meta) is meta
    large = torch.zeros(mmap.PAGESIZE, dtype=torch.uint8)
    monkeypatch.setattr(pages, "has_huge_pages", lambda: False)
    assert pages.in_huge_pages(large) is large


@pytest.mark.parametrize(("setting", "expected"), [("[always] madvise never", True), ("always [madvise] never", True),
                                                   ("always madvise [never]", False), (None, False)])  # fmt: skip
def test_the_system_says_whether_it_has_any(setting, expected, tmp_path, monkeypatch):
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("no huge pages on this system")
    if setting:
        (tmp_path / "enabled").write_text(setting)
    monkeypatch.setattr(pages, "SETTING", tmp_path / "enabled")
    assert pages.has_huge_pages() is expected


def test_a_packed_checkpoint_is_loaded_into_them(huge_pages, tmp_path):
    tiny_llama(num_hidden_layers=1, dtype=torch.bfloat16).save_pretrained(tmp_path / "16-bit")
    config = NF4Config()
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "16-bit", quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    layers = {name: module for name, module in loaded.named_modules() if isinstance(module, NF4Linear)}
    moved = [layer for layer in layers.values() if layer._parameters["weight"].nbytes >= mmap.PAGESIZE]
    assert moved
    assert all(layer._parameters["weight"].data_ptr() % mmap.PAGESIZE == 0 for layer in moved)
    state = packed.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    loaded.save_pretrained(tmp_path / "again")
    first, second = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("packed", "again"))
    assert first == second
