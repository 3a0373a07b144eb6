"""PagedAdamW over the pager of CUDA, on a fake device: whatever the paging, the result is that of an arena in RAM."""

import copy
import ctypes
import weakref
from types import SimpleNamespace

import pytest
import torch

from nf4lora import PagedAdamW
from nf4lora.optim import arena_cuda, dtensor, paged_adamw

from support import cudart
from support.bits import assert_same_bits

PAGES = 64 << 10
SIZES = [(300, 70), (5,), (64, 64), (1,), (41_000,), (16, 16), (0,), (9, 1000)]
NEVER, SOMETIMES = 3, 5  # indices of parameters without gradients


@pytest.fixture(params=["managed", "streamed"])
def fake(request, monkeypatch):
    """The fake device, on which PagedAdamW now puts the state of parameters on the CPU."""
    device = cudart.load(13000)
    device.reset()

    class FakeCard(arena_cuda.Card):
        def pager(self, size, paging):
            return device.Pager(0, size, request.param if paging == "auto" else paging)

        def stream(self):
            return 0

        def bytes_at(self, address, size, owner):
            array = (ctypes.c_uint8 * size).from_address(address)
            array.owner = owner
            return torch.frombuffer(array, dtype=torch.uint8)

    monkeypatch.setattr(arena_cuda.CudaArena, "chunk_bytes", PAGES)
    monkeypatch.setattr(
        paged_adamw,
        "arena_of",
        lambda where, size, page_to, paging: arena_cuda.cuda_arena(FakeCard(where), size, paging),
    )
    device.mode = request.param
    yield device
    assert device.wrongs() == []
    assert device.alive() == {"blocks": 0, "streams": 0, "events": 0}


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]


def train(params, optimizer, steps=range(4)):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if i == NEVER or (i == SOMETIMES and step % 2) else grad
        optimizer.step()


def in_ram(monkeypatch, bits, dtype=torch.float32, steps=4):
    with monkeypatch.context() as undone:
        undone.setattr(paged_adamw, "arena_of", real_arena)
        params = parameters(dtype)
        optimizer = PagedAdamW(params, lr=1e-2, bits=bits)
        assert optimizer.stats()["mode"] == "none"
        train(params, optimizer, range(steps))
        assert optimizer.stats()["mode"] == "ram"
    return params, optimizer


real_arena = paged_adamw.arena_of


def assert_same(params, optimizer, others, other):
    optimizer.synchronize()
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q)
        assert optimizer.state[p].keys() == other.state[q].keys()
        for name, value in optimizer.state[p].items():
            assert_same_bits(value, other.state[q][name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [32, 8])
def test_paging_changes_no_bit(fake, monkeypatch, bits, dtype):
    expected = in_ram(monkeypatch, bits, dtype)
    params = parameters(dtype)
    optimizer = PagedAdamW(params, lr=1e-2, bits=bits)
    train(params, optimizer)
    assert_same(params, optimizer, *expected)
    stats = optimizer.stats()
    assert stats["mode"] == fake.mode
    assert stats["bytes"] > 3 * PAGES or bits == 8
    assert stats["resident"] + stats["paged"] == stats["bytes"]


@pytest.mark.parametrize("bits", [32, 8])
def test_evicting_between_steps_changes_no_bit(fake, monkeypatch, bits):
    expected = in_ram(monkeypatch, bits)
    params = parameters()
    optimizer = PagedAdamW(params, lr=1e-2, bits=bits)
    for step in range(4):
        train(params, optimizer, [step])
        if step == 2:
            optimizer.load_state_dict(optimizer.state_dict())  # whose tensors are the arena's own
        freed = optimizer.evict()
        assert (freed > 0) == (fake.mode == "managed")
        assert optimizer.stats()["resident"] == 0
        assert optimizer.stats()["peak"] > 0
    assert_same(params, optimizer, *expected)


@pytest.mark.parametrize("bits", [32, 8])
def test_saved_and_loaded_it_stays_paged_and_goes_on_bit_for_bit(fake, monkeypatch, bits):
    expected = in_ram(monkeypatch, bits)
    params = parameters()
    optimizer = PagedAdamW(params, lr=1e-2, bits=bits)
    train(params, optimizer, range(2))
    saved = optimizer.state_dict()
    resumed = PagedAdamW(params, lr=1.0, bits=bits)
    resumed.load_state_dict(saved)
    del optimizer, saved
    train(params, resumed, range(2, 4))
    assert_same(params, resumed, *expected)
    assert resumed.stats()["mode"] == fake.mode


def test_a_step_out_of_memory_evicts_and_is_taken(fake, monkeypatch):
    expected = in_ram(monkeypatch, 32)
    params = parameters()
    optimizer = PagedAdamW(params, lr=1e-2)
    train(params, optimizer, range(3))
    resident = []
    gradient_of = dtensor.gradient_of

    def short(p, grad):
        resident.append(optimizer.stats()["resident"])
        if len(resident) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradient_of(p, grad)

    with monkeypatch.context() as undone:
        undone.setattr(paged_adamw, "gradient_of", short)
        if fake.mode == "streamed":  # nothing of it lies on the card but buffers: the error is the caller's
            with pytest.raises(torch.OutOfMemoryError):
                train(params, optimizer, [3])
            resident[:] = [0]
        train(params, optimizer, [3])
    del short
    if fake.mode == "managed":
        assert resident[0] > 0 == resident[1]
    assert_same(params, optimizer, *expected)


def test_what_was_copied_before_memory_ran_out_is_gone_when_the_step_is_tried_again(fake, monkeypatch):
    if fake.mode == "streamed":
        pytest.skip("nothing can be evicted, so nothing is tried again")
    params = parameters(torch.bfloat16)
    optimizer = PagedAdamW(params, lr=1e-2)
    train(params, optimizer, range(1))
    copies = []

    def short(p, grad):
        if len(copies) == 3:
            copies.append(None)
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(copies) == 4:
            copies.append([each() is None for each in copies[:3]])
        copy = grad.clone()
        if len(copies) < 3:
            copies.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(paged_adamw, "gradient_of", short)
    train(params, optimizer, range(1, 2))
    assert copies[4] == [True, True, True]


def test_memory_that_others_take_in_mid_training_changes_no_bit(fake, monkeypatch):
    expected = in_ram(monkeypatch, 32)
    params = parameters()
    optimizer = PagedAdamW(params, lr=1e-2)
    train(params, optimizer, range(2))
    fake.set_others(1 << 30)
    train(params, optimizer, range(2, 4))
    fake.set_others(0)
    assert_same(params, optimizer, *expected)


def test_parameters_added_later_get_an_arena_of_their_own(fake):
    params = parameters()
    optimizer = PagedAdamW(params[:4], bits=8)
    train(params[:4], optimizer, range(1))
    kept = {p: optimizer.state[p]["exp_avg"] for p in params[:3]}
    before = optimizer.stats()["bytes"]
    optimizer.add_param_group({"params": params[4:]})
    train(params, optimizer, range(1, 2))
    assert all(optimizer.state[p]["exp_avg"] is tensor for p, tensor in kept.items())
    assert optimizer.stats()["bytes"] > before
    assert optimizer.report().startswith("PagedAdamW, 8 bits: ")


def test_the_memory_goes_with_the_optimizer_and_its_last_tensor(fake):
    params = parameters()
    optimizer = PagedAdamW(params)
    train(params, optimizer, range(1))
    kept = optimizer.state[params[0]]["exp_avg"]
    del optimizer
    assert fake.alive()["blocks"] > 0
    assert kept.abs().sum() > 0
    del kept
    assert fake.alive()["blocks"] == 0


def test_an_error_of_the_device_reaches_the_caller(fake):
    params = parameters()
    optimizer = PagedAdamW(params)
    train(params, optimizer, range(1))
    fake.fail("cudaEventRecord", 1, 2)
    with pytest.raises(RuntimeError, match="PagedAdamW: cudaEventRecord must succeed, got: out of memory"):
        train(params, optimizer, range(1, 2))
    del optimizer


# ---- shards on a mesh of another device than their state: streamed under FSDP2, it lies on the host, the mesh on cards


@pytest.fixture
def mesh(monkeypatch):
    """Of the device meta, to which DTensor.from_local copies what lies on the CPU, as it does to a card."""
    distributed = pytest.importorskip("torch.distributed", reason="torch was built without distributed")
    if not distributed.is_available():
        pytest.skip("torch was built without distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # torch asks the module of a mesh's device, which meta has not, how many there are.
    device = SimpleNamespace(device_count=lambda: 1, current_device=lambda: 0, is_initialized=lambda: True)
    monkeypatch.setattr(torch, "meta", device, raising=False)
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("meta", (2,))
    distributed.destroy_process_group()


def shard(tensor, mesh):
    """The first of two shards along rows, as FSDP2 offers it, with its memory on the CPU."""
    from torch.distributed.tensor import DTensor, Shard

    sizes = (2 * len(tensor), *tensor.shape[1:])
    likeness = DTensor.from_local(
        tensor.to("meta"), mesh, [Shard(0)], run_check=False, shape=sizes, stride=tensor.stride()
    )
    return DTensor(tensor, likeness._spec, requires_grad=False)


def sharded_and_plain(mesh, bits, steps=3, **options):
    """A shard and a plain tensor of its values, each trained by an optimizer of its own."""
    value = torch.randn(301, 70, generator=torch.Generator().manual_seed(1))
    params = [torch.nn.Parameter(shard(value.clone(), mesh)), torch.nn.Parameter(value.clone())]
    optimizers = [PagedAdamW([p], lr=1e-2, bits=bits, **options) for p in params]
    step_both(params, optimizers, mesh, range(steps))
    return params, optimizers


def step_both(params, optimizers, mesh, steps):
    for step in steps:
        grad = torch.randn(301, 70, generator=torch.Generator().manual_seed(100 + step))
        params[0].grad, params[1].grad = shard(grad.clone(), mesh), grad
        for optimizer in optimizers:
            optimizer.step()


def assert_shown_state_is_the_plain_ones(params, optimizers):
    assert_same_bits(params[0].to_local(), params[1])
    shown, plain = (each.state_dict()["state"][0] for each in optimizers)
    assert shown["step"] == plain["step"] > 0
    for name in ("exp_avg", "exp_avg_sq"):
        assert shown[name].shape == params[0].shape
        assert shown[name].placements == params[0].placements
        assert_same_bits(shown[name].to_local(), plain[name], name)
    if "absmax" in plain:
        blocks = len(plain["absmax"])
        assert_same_bits(shown["absmax"].to_local()[:blocks], plain["absmax"])
        assert len(shown["absmax"]) == 2 * len(shown["absmax"].to_local())


@pytest.mark.parametrize("bits", [32, 8])
def test_the_state_shown_of_a_shard_is_the_one_that_steps_change(fake, mesh, bits):
    params, optimizers = sharded_and_plain(mesh, bits)
    assert optimizers[0].stats()["mode"] == fake.mode
    assert_shown_state_is_the_plain_ones(params, optimizers)
    kept = optimizers[0].state[params[0]]["exp_avg"]
    before = kept.to_local().clone()
    step_both(params, optimizers, mesh, range(3, 4))
    optimizers[0].synchronize()
    assert not torch.equal(kept.to_local(), before)
    assert optimizers[0].state[params[0]]["exp_avg"] is kept


@pytest.mark.parametrize("bits", [32, 8])
def test_a_shards_state_in_host_memory_is_shown_as_it_is(mesh, monkeypatch, bits):
    """A parameter that FSDP2 has offloaded lies on the CPU, its mesh does not."""
    assert_shown_state_is_the_plain_ones(*sharded_and_plain(mesh, bits))


@pytest.mark.parametrize("bits", [32, 8])
def test_a_shards_saved_state_is_loaded_into_its_arena(fake, mesh, bits):
    params, optimizers = sharded_and_plain(mesh, bits)
    saved = copy.deepcopy({key: value.to_local() for key, value in shown_tensors(optimizers[0], params[0]).items()})
    resumed = PagedAdamW([params[0]], lr=1e-2, bits=bits)
    step = optimizers[0].state[params[0]]["step"]
    resumed.load_state_dict(
        {"state": {0: {"step": step, **saved}}, "param_groups": optimizers[0].state_dict()["param_groups"]}
    )
    step_both(params, [resumed, optimizers[1]], mesh, range(3, 5))
    assert_shown_state_is_the_plain_ones(params, [resumed, optimizers[1]])


def shown_tensors(optimizer, p):
    optimizer.synchronize()
    return {name: value for name, value in optimizer.state[p].items() if name != "step"}


def test_a_tensor_that_is_a_copy_of_the_arena_is_refused(fake):
    if fake.mode == "streamed":
        pytest.skip("its tensors lie in host memory")
    arena = paged_adamw.arena_of(torch.device("cpu"), 1 << 16, None, "managed")
    bytes_at = arena.card.bytes_at
    arena.card.bytes_at = lambda *where: bytes_at(*where).clone()
    with pytest.raises(RuntimeError, match="^PagedAdamW: a tensor over the state on cpu must lie where the state does"):
        arena.tensor((0, 4096), torch.float32)
    del arena.card.bytes_at  # which keeps the card


# ---- on a real card: the state stays far below what is free, and moves by explicit prefetches


@pytest.fixture(params=["managed", "streamed"])
def paging(request, device):
    if device.type != "cuda":
        pytest.skip("the card's own memory is what is tested")
    return request.param


def on_card(device, dtype=torch.float32):
    return [torch.nn.Parameter(p.detach().to(device)) for p in parameters(dtype)]


def train_on_card(params, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator).to(p)
            p.grad = None if i == NEVER or (i == SOMETIMES and step % 2) else grad
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [32, 8])
def test_on_a_card_paging_changes_no_bit(paging, device, monkeypatch, bits, dtype):
    expected = parameters(dtype)
    in_ram_optimizer = PagedAdamW(expected, lr=1e-2, bits=bits)
    monkeypatch.setattr(arena_cuda.CudaArena, "chunk_bytes", PAGES)
    params = on_card(device, dtype)
    optimizer = PagedAdamW(params, lr=1e-2, bits=bits, paging=paging)
    for step in range(4):
        train(expected, in_ram_optimizer, [step])
        train_on_card(params, optimizer, [step])
        if step == 1:
            optimizer.evict()
        if step == 2:
            optimizer.load_state_dict(optimizer.state_dict())
    stats = optimizer.stats()
    assert stats["mode"] == paging
    assert stats["resident"] + stats["paged"] == stats["bytes"]
    for p, q in zip(expected, params, strict=True):
        assert_same_bits(p, q.cpu())
        for name, value in in_ram_optimizer.state[p].items():
            assert_same_bits(value, optimizer.state[q][name].cpu(), name)


def test_on_a_card_evicted_state_is_used_again(device):
    if device.type != "cuda":
        pytest.skip("the card's own memory is what is tested")
    params = [torch.nn.Parameter(torch.ones(32 << 20, device=device))]
    optimizer = PagedAdamW(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    stats = optimizer.stats()
    assert stats["resident"] == stats["bytes"] >= 256 << 20 or stats["mode"] == "streamed"
    freed = optimizer.evict()
    assert freed == stats["resident"] or stats["mode"] == "streamed"
    assert optimizer.stats()["resident"] == 0
    first = optimizer.state[params[0]]["exp_avg"][:3].clone()
    optimizer.step()
    assert not torch.equal(first, optimizer.state[params[0]]["exp_avg"][:3])


def test_on_a_card_the_choice_is_made_and_told(device):
    if device.type != "cuda":
        pytest.skip("the card's own memory is what is tested")
    params = on_card(device)
    optimizer = PagedAdamW(params, bits=8)
    train_on_card(params, optimizer, range(1))
    mode = optimizer.stats()["mode"]
    assert mode == "managed" or (mode == "streamed" and "streamed: " in optimizer.report())
    with pytest.raises(ValueError, match="page_to must be None for parameters on CUDA"):
        refused = PagedAdamW(params, page_to="/tmp")
        refused.step()
