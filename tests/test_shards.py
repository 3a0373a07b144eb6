"""Parameters of which two processes hold shards: how they lie, what is clipped and skipped, whose state is loaded.

All claims run in one pair of processes, each in turn; what a claim said in either is what its test says. Training under
DDP and FSDP2, and its checkpoints: test_optim_distributed.py.
"""

import datetime
import math
import os
import socket
import traceback

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from nf4lora import PagedAdamW
from nf4lora.ops import reference

from support.bits import assert_same_bits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,  # two processes that have 20 seconds' patience with each other
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
]
WORLD = 2
FIRST = reference.nested_code()


class Model(nn.Module):
    """Rows that two processes cannot share evenly, and a single value."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(24, 37), nn.Linear(37, 5)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * self.scale


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def batch(step, size=24):
    return torch.randn(4, size, generator=torch.Generator().manual_seed(step))


def train(model, optimizer, steps, size=24):
    """Both processes on the same batch: the mean of two equal gradients is that gradient, to the bit."""
    for step in steps:
        optimizer.zero_grad()
        model(batch(step, size)).square().mean().backward()
        optimizer.step()


def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (WORLD,))


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mine(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# ---- how they lie


def elsewhere_placed_parameters_step_as_their_whole(rank):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for placement in (Shard(0), Shard(1), Replicate()):
        for bits in (32, 8):
            generator = torch.Generator().manual_seed(1)
            value = torch.randn(13, 37, generator=generator)
            p = nn.Parameter(distribute_tensor(value, mesh(), [placement]))
            # in 8 bits, blocks are of the shard: what its process computes is what it would alone
            q = nn.Parameter((value if bits == 32 else mine(p).detach()).clone())
            optimizer, alone = (PagedAdamW([each], lr=1e-2, bits=bits) for each in (p, q))
            for _ in range(3):
                grad = torch.randn(13, 37, generator=generator)
                p.grad = distribute_tensor(grad, mesh(), [placement])
                q.grad = grad if bits == 32 else mine(p.grad).clone()
                optimizer.step()
                alone.step()
            assert_same_bits(whole(p) if bits == 32 else mine(p), q, (placement, bits))
            state = optimizer.state[p]["exp_avg"]
            assert (state.shape, state.placements) == (p.shape, p.placements)
            assert_same_bits(whole(state) if bits == 32 else mine(state), alone.state[q]["exp_avg"])


def gradients_that_lie_otherwise_are_brought(rank):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    p = nn.Parameter(distribute_tensor(torch.zeros(7, 4), mesh(), [Shard(0)]))
    grad = torch.arange(28.0).view(7, 4)
    p.grad = distribute_tensor(grad, mesh(), [Replicate()])
    optimizer = PagedAdamW([p], betas=(0.0, 0.9))
    optimizer.step()
    assert_same_bits(whole(optimizer.state[p]["exp_avg"]), grad)


def a_process_may_hold_nothing(rank):
    """A weight of one row: all of it is with the first process, and both count its steps."""
    for bits in (32, 8):
        torch.manual_seed(0)
        alone = nn.Linear(600, 1, bias=False)
        model = sharded(nn.Linear(600, 1, bias=False))
        with torch.no_grad():
            mine(model.weight)[:] = alone.weight if rank == 0 else 0.0
        optimizers = [PagedAdamW(each.parameters(), lr=1e-2, bits=bits, max_grad_norm=0.1) for each in (model, alone)]
        for each, optimizer in zip((model, alone), optimizers, strict=True):
            train(each, optimizer, range(3), 600)
        assert mine(model.weight).numel() == (600 if rank == 0 else 0)
        assert int(optimizers[0].state[model.weight]["step"]) == 3
        # the norm is summed in another order where it is a sum over processes: a unit of the factor's last place,
        # which may round an 8-bit moment to the neighbour
        assert torch.allclose(whole(model.weight), alone.weight, rtol=0, atol=1e-6 if bits == 32 else 1e-3)


# ---- clipping, gradients that are not finite


def clipping_is_that_of_torch_over_all_shards(rank):
    model, other = sharded(Model()), sharded(Model())
    inside = PagedAdamW(model.parameters(), lr=1e-2, max_grad_norm=0.05)
    outside = PagedAdamW(other.parameters(), lr=1e-2)
    for step in range(3):
        for each in (model, other):
            each.zero_grad()
            each(batch(step)).square().mean().backward()
        norm = nn.utils.get_total_norm([whole(p.grad) for p in other.parameters()])  # over full tensors
        assert norm > 0.1
        nn.utils.clip_grads_with_norm_(other.parameters(), 0.05, norm)
        inside.step()
        outside.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        # the sum of squares is taken per shard or over the whole: a few units of the last place, of steps of 1e-2
        assert torch.allclose(mine(p), mine(q), rtol=0, atol=1e-6)


def spoil(model, rank):
    """A gradient that is not finite, in one process."""
    model.zero_grad()
    model(batch(0)).square().mean().backward()
    if rank == 1:
        mine(model.first.weight.grad)[3, 5] = math.nan


def a_norm_that_is_not_finite_skips_all_in_every_process(rank):
    model = sharded(Model())
    optimizer = PagedAdamW(model.parameters(), max_grad_norm=1.0)
    spoil(model, rank)
    before = [mine(p).detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(mine(p), old) for p, old in zip(model.parameters(), before, strict=True))
    assert optimizer.stats()["skipped"] == sum(old.numel() for old in before)
    train(model, optimizer, [1])
    assert all(not torch.equal(mine(p), old) for p, old in zip(model.parameters(), before, strict=True) if len(old))


def without_clipping_one_value_is_skipped_where_it_is(rank):
    model = sharded(Model())
    optimizer = PagedAdamW(model.parameters())
    spoil(model, rank)
    before = whole(model.first.weight).clone()
    optimizer.step()
    same = whole(model.first.weight) == before
    assert same.nonzero().tolist() == [[19 + 3, 5]]  # 19 rows of 37 are with the first process
    assert optimizer.stats()["skipped"] == rank


# ---- state


def bits_are_converted_shard_by_shard(rank):
    model = sharded(Model())
    torchs = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, torchs, range(2))
    wide, narrow, again = (PagedAdamW(model.parameters(), bits=bits) for bits in (32, 8, 32))
    wide.load_state_dict(torchs.state_dict())
    narrow.load_state_dict(torchs.state_dict())
    again.load_state_dict(narrow.state_dict())
    for p in model.parameters():
        value = mine(torchs.state[p]["exp_avg"])
        assert_same_bits(mine(wide.state[p]["exp_avg"]), value)
        codes, absmax = reference.moment_encode(value.flatten(), FIRST)
        assert_same_bits(mine(narrow.state[p]["exp_avg"]).flatten(), codes)
        rows = mine(narrow.state[p]["absmax"])[:, 0]
        assert_same_bits(rows[: len(absmax)], absmax)
        assert not rows[len(absmax) :].any()
        assert_same_bits(mine(again.state[p]["exp_avg"]).flatten(), reference.moment_decode(codes, absmax, FIRST))


def a_flat_state_of_two_groups_goes_on_bit_for_bit(rank):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict as give

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    models = [sharded(Model()) for _ in range(2)]
    optimizers = [
        PagedAdamW([{"params": [m.scale], "lr": rate}, {"params": [*m.first.parameters(), *m.second.parameters()]}])
        for m, rate in zip(models, (0.1, 7.0), strict=True)
    ]
    train(models[0], optimizers[0], range(2))
    state = get_optimizer_state_dict(models[0], optimizers[0], options=options)
    models[1].load_state_dict(models[0].state_dict())
    give(models[1], optimizers[1], state, options=options)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(2, 4))
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert_same_bits(mine(p), mine(q))


def codes_of_shards_are_not_misread_by_one_process(rank):
    """456 and 432 values in two blocks each, and 888 in four: as many scales, but of other values."""
    model = sharded(nn.Linear(24, 37, bias=False))
    optimizer = PagedAdamW(model.parameters(), lr=1e-2, bits=8)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    entry = {name: whole(value) for name, value in saved["state"][0].items()}
    shards = [None] * WORLD
    codes = mine(saved["state"][0]["exp_avg"]).flatten()
    scales = mine(saved["state"][0]["absmax"])[:, 0]
    torch.distributed.all_gather_object(shards, reference.moment_decode(codes, scales, FIRST))
    one = nn.Linear(24, 37, bias=False)
    alone = PagedAdamW(one.parameters(), bits=8)
    try:
        alone.load_state_dict({"state": {0: entry}, "param_groups": saved["param_groups"]})
    except ValueError:
        return
    state = alone.state[one.weight]
    found = reference.moment_decode(state["exp_avg"].flatten(), state["absmax"][:, 0], FIRST)
    assert_same_bits(found, torch.cat(shards))


def codes_of_one_process_are_not_misread_by_shards(rank):
    one, model = nn.Linear(24, 37, bias=False), sharded(nn.Linear(24, 37, bias=False))
    alone = PagedAdamW(one.parameters(), lr=1e-2, bits=8)
    torch.manual_seed(4)
    one.weight.grad = torch.randn(37, 24) * torch.randn(37, 1).exp()
    alone.step()
    state = alone.state[one.weight]
    expected = reference.moment_decode(state["exp_avg"].flatten(), state["absmax"][:, 0], FIRST)
    optimizer = PagedAdamW(model.parameters(), bits=8)
    try:
        optimizer.load_state_dict(alone.state_dict())
    except ValueError:
        return
    state = optimizer.state[model.weight]
    found = reference.moment_decode(mine(state["exp_avg"]).flatten(), mine(state["absmax"])[:, 0], FIRST)
    assert_same_bits(found, expected[:456] if rank == 0 else expected[456:])


CLAIMS = [
    elsewhere_placed_parameters_step_as_their_whole,
    gradients_that_lie_otherwise_are_brought,
    a_process_may_hold_nothing,
    clipping_is_that_of_torch_over_all_shards,
    a_norm_that_is_not_finite_skips_all_in_every_process,
    without_clipping_one_value_is_skipped_where_it_is,
    bits_are_converted_shard_by_shard,
    a_flat_state_of_two_groups_goes_on_bit_for_bit,
    codes_of_shards_are_not_misread_by_one_process,
    codes_of_one_process_are_not_misread_by_shards,
]


def process(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=20)  # of a process whose partner failed
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=patience)
    for claim in CLAIMS:
        torch.manual_seed(0)
        try:
            claim(rank)
            said = ""
        except Exception:
            said = f"process {rank}: {traceback.format_exc()}"
        (folder / f"{claim.__name__}.{rank}").write_text(said)
        everyone = [None] * WORLD
        torch.distributed.all_gather_object(everyone, bool(said))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each claim said in each process: nothing where it held."""
    folder = tmp_path_factory.mktemp("claims")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ended = "never begun"
    try:
        mp.spawn(process, (port, folder), WORLD)
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:  # where one failed, its partner may abort
        ended = f"not reached, for {error}"
    found = {path.name: path.read_text() for path in folder.iterdir()}
    return {name: found.get(name, ended) for name in (f"{c.__name__}.{rank}" for c in CLAIMS for rank in range(WORLD))}


@pytest.mark.parametrize("claim", [claim.__name__ for claim in CLAIMS])
def test_in_two_processes(said, claim):
    assert [said[f"{claim}.{rank}"] for rank in range(WORLD)] == [""] * WORLD
