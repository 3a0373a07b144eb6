"""PagedAdamW in two processes on a CPU: DDP, FSDP2 with shards of unequal size, and their checkpoints."""

import multiprocessing as mp
import multiprocessing.connection
import os
import socket
import traceback

import pytest
import torch
from torch import nn

from nf4lora import PagedAdamW

from support.bits import assert_same_bits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
]
WORLD = 2
BITS = pytest.mark.parametrize("bits", [32, 8])


class Model(nn.Module):
    """Rows that two processes cannot share evenly, a single value, and a block's worth of others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(24, 37), nn.Linear(37, 5)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * self.scale


def batch(step, rank=None):
    """Of a step, the whole or a process's half."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2 * WORLD, 24, generator=generator)
    return x if rank is None else x.chunk(WORLD)[rank]


def train(model, optimizer, steps, rank=None):
    for step in steps:
        optimizer.zero_grad()
        model(batch(step, rank)).square().mean().backward()
        optimizer.step()


def alone(bits, steps=4, **options):
    """The same training in one process."""
    model = Model()
    optimizer = PagedAdamW(model.parameters(), lr=1e-2, bits=bits, **options)
    train(model, optimizer, range(steps))
    return {name: p.detach() for name, p in model.named_parameters()}


class Pair:
    """Two processes that do what tests give them, one after the other; a new pair after one that failed."""

    def __init__(self):
        self.pipes = self.children = ()

    def start(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        spawn = mp.get_context("spawn")
        self.pipes, theirs = zip(*(spawn.Pipe() for _ in range(WORLD)))
        self.children = [spawn.Process(target=process, args=(rank, port, theirs[rank])) for rank in range(WORLD)]
        for child, its in zip(self.children, theirs, strict=True):
            child.start()
            its.close()  # so that the end of the child is the end of the pipe

    def run(self, work, *arguments):
        if not self.pipes:
            self.start()
        for pipe in self.pipes:
            pipe.send((work, arguments))
        waiting, said = list(self.pipes), ""
        while waiting and not said:  # where one failed, its partner may wait for it
            for pipe in mp.connection.wait(waiting):
                waiting.remove(pipe)
                try:
                    said += pipe.recv()
                except EOFError:
                    said += f"process {self.pipes.index(pipe)} ended"
        if said:
            self.stop()
        assert not said, said

    def stop(self):
        for child in self.children:
            child.kill()
            child.join()
        self.pipes = self.children = ()


@pytest.fixture(scope="module")
def pair():
    made = Pair()
    yield made
    made.stop()


def process(rank, port, pipe):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD)
    while True:
        work, arguments = pipe.recv()
        try:
            work(rank, *arguments)
            pipe.send("")
        except BaseException:
            pipe.send(f"process {rank}: {traceback.format_exc()}")


def assert_close(named, expected, bits):
    for name, value in named.items():
        # Two halves of a batch are summed in another order. Blocks of 8-bit moments follow the shards, and so does what
        # their values are rounded to: a share of a step of 1e-2.
        assert torch.allclose(value, expected[name], rtol=0, atol=2e-6 if bits == 32 else 5e-3), name


def ddp(rank, bits):
    model = nn.parallel.DistributedDataParallel(Model())
    optimizer = PagedAdamW(model.parameters(), lr=1e-2, bits=bits, max_grad_norm=0.05)
    train(model, optimizer, range(4), rank)
    mine = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    assert_close(mine, alone(bits, max_grad_norm=0.05), bits)
    for p in mine.values():
        others = [torch.empty_like(p) for _ in range(WORLD)]
        torch.distributed.all_gather(others, p)
        assert_same_bits(others[0], others[1])


@BITS
def test_under_ddp_every_process_takes_the_same_step(pair, bits):
    pair.run(ddp, bits)


def sharded():
    from torch.distributed.fsdp import fully_shard

    model = Model()
    # FSDP2 gives the single value to one process and nothing of it to the other.
    return fully_shard(model)


def fsdp(rank, bits):
    from torch.distributed.tensor import DTensor

    model = sharded()
    optimizer = PagedAdamW(model.parameters(), lr=1e-2, bits=bits, max_grad_norm=0.05)
    train(model, optimizer, range(4), rank)
    for p in model.parameters():
        state = optimizer.state[p]
        for name in ("exp_avg", "exp_avg_sq"):
            assert isinstance(state[name], DTensor)
            assert (state[name].shape, state[name].placements) == (p.shape, p.placements)
            assert state[name].to_local().shape == p.to_local().shape
        if bits == 8:
            assert state["absmax"].shape[0] == WORLD * state["absmax"].to_local().shape[0]
    local = sum(p.to_local().numel() for p in model.parameters())
    whole = sum(p.numel() for p in model.parameters())
    each = 8 if bits == 32 else 2
    assert local < 0.6 * whole
    assert optimizer.stats()["bytes"] <= each * local + 5 * 3 * 256  # five parameters of up to three aligned tensors
    found = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    assert_close(found, alone(bits, max_grad_norm=0.05), bits)


@BITS
def test_under_fsdp_each_process_keeps_the_state_of_its_shards(pair, bits):
    pair.run(fsdp, bits)


def mixed(rank):
    """Some parameters are shards, and some are whole in every process."""
    model = Model()
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.first)
    optimizer = PagedAdamW(model.parameters(), lr=1e-2, max_grad_norm=0.05)
    whole = Model()
    other = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    for step in range(3):
        for each in (model, whole):
            each.zero_grad()
            each(batch(step)).square().mean().backward()
        optimizer.step()
        nn.utils.clip_grad_norm_(whole.parameters(), 0.05)
        other.step()
    found = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    assert_close({name: p.detach() for name, p in found.items()}, dict(whole.named_parameters()), 32)


def test_gradients_are_clipped_together_where_some_are_shards(pair):
    pair.run(mixed)


def gathered(rank):
    model = sharded()
    optimizer = PagedAdamW(model.parameters(), lr=1e-2, bits=8)
    train(model, optimizer, range(2), rank)
    state = optimizer.state_dict()
    entries = {
        key: {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in entry.items()}
        for key, entry in state["state"].items()
    }
    one = PagedAdamW(Model().parameters(), bits=8)
    with pytest.raises(ValueError, match="8-bit moments of shards are loaded by as many processes as saved them"):
        one.load_state_dict({"state": entries, "param_groups": state["param_groups"]})


def test_gathered_codes_are_not_taken_for_those_of_one_process(pair):
    pair.run(gathered)


def checkpoint(rank, bits, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = sharded()
    optimizer = PagedAdamW(model.parameters(), lr=1e-2, bits=bits)
    train(model, optimizer, range(2), rank)
    dcp.save({"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)

    other = sharded()
    resumed = PagedAdamW(other.parameters(), lr=1.0, bits=bits)
    state = {"model": other.state_dict(), "optim": get_optimizer_state_dict(other, resumed)}
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state["model"])
    set_optimizer_state_dict(other, resumed, state["optim"])
    for each, its in ((model, optimizer), (other, resumed)):
        train(each, its, range(2, 4), rank)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(p.to_local(), q.to_local())
        for name, value in optimizer.state[p].items():
            mine, its = (t.to_local() if isinstance(t, type(p.data)) else t for t in (value, resumed.state[q][name]))
            assert_same_bits(mine, its, name)


@BITS
def test_a_distributed_checkpoint_goes_on_bit_for_bit(pair, bits, tmp_path):
    pair.run(checkpoint, bits, tmp_path)


def whole_state(rank):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict as give

    model = sharded()
    optimizer = PagedAdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, range(2), rank)
    options = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    one = Model()
    torchs = torch.optim.AdamW(one.parameters(), lr=1e-2)
    train(one, torchs, range(2))
    expected = {name: torchs.state[p]["exp_avg"] for name, p in one.named_parameters()}
    if rank == 0:
        assert_close({name: saved["state"][name]["exp_avg"] for name in expected}, expected, 32)
    theirs = get_optimizer_state_dict(one, torchs)
    known = saved["param_groups"][0].keys()  # torch.distributed knows no other keys than those of the optimizer there
    theirs["param_groups"] = [{key: group[key] for key in known} for group in theirs["param_groups"]]
    give(model, optimizer, theirs, options=options)
    for name, p in model.named_parameters():
        assert_same_bits(optimizer.state[p]["exp_avg"].full_tensor(), expected[name])


def test_the_whole_state_is_gathered_and_torchs_is_spread(pair):
    pair.run(whole_state)
