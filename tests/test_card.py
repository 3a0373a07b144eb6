"""What torch's programs and ours do to a card, counted on one that computes nothing (bench/harness/card).

Each function that stands above a test is a question: it runs in a process that sees the card.
"""

import ctypes
import doctest

import pytest
import torch

from bench.harness.card import Card, counting, counts

from support.capture import capture

pytestmark = pytest.mark.slow  # a process of its own, which loads torch for CUDA

# ---- torch's own programs


def addition():
    x = torch.ones(4, device="cuda")
    return lambda: x + x


def test_addition_is_one_launch(card):
    done = card.counted(addition)
    assert done.kernels == {"vectorized_elementwise_kernel": 1}
    assert (done.launches, done.allocations, done.bytes) == (1, 1, 512)
    assert not any((done.mallocs, done.copies, done.fills, done.events, done.synchronisations, done.captured))


def item():
    x = torch.ones(1, device="cuda")
    return x.item


def test_a_value_for_the_host_is_one_copy_and_one_synchronisation(card):
    done = card.counted(item)
    assert (done.launches, done.copies, done.synchronisations) == (0, 1, 1)


def products():
    x, bias = torch.ones(3, 64, 64, device="cuda", dtype=torch.bfloat16), torch.ones(64, device="cuda").bfloat16()
    x32 = x[0].float()

    def call():
        x[0] @ x[1], torch.bmm(x, x), torch.nn.functional.linear(x[0], x[1], bias), x32 @ x32

    return call


def test_products_are_launches_of_cublas(card):
    done = card.counted(products)
    assert done.kernels == {"cublasGemmEx": 1, "cublasGemmStridedBatchedEx": 1, "cublasLtMatmul": 1, "cublasSgemm": 1}


def other_stream():
    x, stream = torch.ones(4, device="cuda"), torch.cuda.Stream()

    def call():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.add(x, x, out=x)
        torch.cuda.current_stream().wait_stream(stream)

    return call


def test_a_side_stream_costs_two_events_and_two_waits(card):
    done = card.counted(other_stream)
    assert (done.launches, done.events, done.waits, done.synchronisations) == (1, 2, 2, 0)


def first_use():
    torch.cuda.empty_cache()
    return lambda: torch.empty(64 << 20, dtype=torch.uint8, device="cuda")


def test_memory_comes_from_cuda_where_torch_has_none_left(card):
    assert card.counted(first_use, warm=0).mallocs == 1
    done = card.counted(first_use)
    assert (done.mallocs, done.allocations, done.bytes) == (0, 1, 64 << 20)


def moved():
    host = torch.arange(1000.0)
    device = host.cuda()
    clone = device.clone()
    device.zero_()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for event in events:
        event.record()
    return {
        "clone": torch.equal(clone.cpu(), host),
        "sum": (clone + clone).cpu().sum().item(),
        "pinned": host.pin_memory().is_pinned(),
        "time": events[0].elapsed_time(events[1]),
        "capability": torch.cuda.get_device_capability(),
    }


def test_copies_are_done_and_kernels_are_not(card):
    seen = card.ask(moved)
    assert seen["clone"] is True
    assert seen["sum"] != 2 * sum(range(1000))  # no kernel has written it: the memory holds what it held before
    assert seen["pinned"] is True
    assert 0 <= seen["time"] < 1000
    assert seen["capability"] == [9, 0]


def too_much():
    kept = torch.empty(700 << 20, dtype=torch.uint8, device="cuda")
    try:
        torch.empty(400 << 20, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError as error:
        text = str(error)
    del kept
    torch.empty(900 << 20, dtype=torch.uint8, device="cuda")
    free, total = torch.cuda.mem_get_info()
    return text, free, total


@pytest.mark.usefixtures("card")
def test_memory_runs_out():
    with Card(limit=1 << 30) as small:
        text, free, total = small.ask(too_much)
    assert "Tried to allocate 400.00 MiB" in text
    assert total == 1 << 30
    assert free == total - (900 << 20)


def managed_memory():
    ctypes.CDLL(None).cudaMallocManaged(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(64), 1)


def unknown_kernel():
    ctypes.CDLL(None).cudaLaunchKernelExC(bytes(256), b"no kernel", None)
    torch.cuda.check_error(ctypes.CDLL(None).cudaGetLastError())


@pytest.mark.usefixtures("card")
def test_what_it_lacks_ends_the_process_with_its_name():
    with Card() as another:
        with pytest.raises(RuntimeError, match="card: cudaMallocManaged is not implemented"):
            another.ask(managed_memory)
        assert another.counted(addition).launches == 1  # in the next process


def test_a_kernel_that_nobody_registered_is_refused(card):
    with pytest.raises(RuntimeError, match="invalid device function"):
        card.ask(unknown_kernel)


def test_an_error_of_a_question_comes_back(card):
    with pytest.raises(RuntimeError, match="no_such_argument"):
        card.ask(addition, no_such_argument=1)


def test_counting_needs_the_card(card):
    with pytest.raises(RuntimeError, match="counting: the process must see the card, got one without"), counting():
        pass


def test_examples_in_docstrings():
    assert doctest.testmod(counts).failed == 0


# ---- capture


def linear():
    layer = torch.nn.Linear(64, 64).cuda().bfloat16()
    x = torch.ones(8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return lambda: torch.autograd.grad(layer(x).sum(), [x, layer.weight, layer.bias])


def captured_linear():
    graph, capturing = capture(linear())
    with counting() as replaying:
        graph.replay()
    return [[done.launches, done.captured, done.replays, done.synchronisations] for done in (capturing, replaying)]


def test_forward_and_backward_become_a_graph(card):
    (launches, captured, replays, waited), replaying = card.ask(captured_linear)
    assert launches == captured > 3
    assert (replays, waited) == (0, 0)
    assert replaying == [0, 0, 1, 0]


def graphed_layer():
    layer = torch.nn.Linear(64, 64).cuda()
    x = torch.ones(8, 64, device="cuda", requires_grad=True)
    layer = torch.cuda.make_graphed_callables(layer, (x,))
    return lambda: layer(x).backward(x)


def test_a_graphed_layer_replays_forward_and_backward(card):
    done = card.counted(graphed_layer)
    assert done.replays == 2
    assert done.synchronisations == 0


def copied_in_graph():
    host, device = torch.arange(4.0).pin_memory(), torch.zeros(4, device="cuda")
    graph, _ = capture(lambda: device.copy_(host, non_blocking=True))
    host.fill_(7.0)
    before = device.cpu().tolist()
    graph.replay()
    return before, device.cpu().tolist()


def test_a_captured_copy_is_done_by_each_replay(card):
    before, after = card.ask(copied_in_graph)
    assert before == [0.0, 1.0, 2.0, 3.0]  # of the calls that warmed up
    assert after == [7.0] * 4


def in_capture(action, mode="global"):
    """Captures an action; what goes wrong in it is raised, or else what ending the capture says."""
    torch.ones(1, device="cuda")
    cudart, pointer = ctypes.CDLL(None), ctypes.c_void_p()
    x, other = torch.ones(4, device="cuda"), torch.cuda.Stream()
    before, elsewhere, torn = torch.cuda.Event(), torch.cuda.Event(), torch.cuda.Event()
    before.record()
    elsewhere.record(other)

    def fork(join):
        current = torch.cuda.current_stream()
        other.wait_stream(current)
        with torch.cuda.stream(other):
            torch.add(x, x, out=x)
        if join:
            current.wait_stream(other)

    def captured_event(ask):
        torn.record()
        ask(torn)

    actions = {
        "nothing": lambda: None,
        "addition": lambda: x + x,
        "large tensor": lambda: torch.empty(1 << 28, device="cuda"),
        "random numbers": lambda: torch.randint(2**63 - 1, (1,), device="cuda"),
        "side stream that is joined": lambda: fork(True),
        "the default stream's synchronize": lambda: torch.cuda.default_stream().synchronize(),
        "item": x[0].item,
        "synchronize of the device": torch.cuda.synchronize,
        "synchronize of the stream": lambda: torch.cuda.current_stream().synchronize(),
        "query of the stream": lambda: torch.cuda.current_stream().query(),
        "query of an event": before.query,
        "query of a captured event": lambda: captured_event(torch.cuda.Event.query),
        "synchronize of a captured event": lambda: captured_event(torch.cuda.Event.synchronize),
        "wait for what is not captured": lambda: torch.cuda.current_stream().wait_event(elsewhere),
        "cudaMalloc": lambda: cudart.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(512)),
        "side stream that is left": lambda: fork(False),
    }
    errors = []
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode=mode):
            try:
                actions[action]()
            except RuntimeError as error:
                errors.append(str(error).splitlines()[0])
    except RuntimeError as error:
        errors.append(str(error).splitlines()[0])
    return errors


@pytest.mark.parametrize(
    "action",
    ["addition", "large tensor", "random numbers", "side stream that is joined", "the default stream's synchronize"],
)
def test_capture_allows(card, action):
    assert card.ask(in_capture, action=action) == []


UNSUPPORTED = "operation not permitted when stream is capturing"
CAPTURED_EVENT = "operation not permitted on an event last recorded in a capturing stream"


@pytest.mark.parametrize(
    ("action", "error"),
    [
        ("item", UNSUPPORTED),
        ("synchronize of the device", UNSUPPORTED),
        ("synchronize of the stream", UNSUPPORTED),
        ("query of the stream", UNSUPPORTED),
        ("query of an event", UNSUPPORTED),
        ("query of a captured event", CAPTURED_EVENT),
        ("synchronize of a captured event", CAPTURED_EVENT),
        ("wait for what is not captured", "dependency created on uncaptured work in another stream"),
    ],
)
def test_capture_refuses(card, action, error):
    said, at_the_end = card.ask(in_capture, action=action)
    assert error in said
    assert "operation failed due to a previous error during capture" in at_the_end


def test_a_stream_must_be_joined_before_a_capture_ends(card):
    (error,) = card.ask(in_capture, action="side stream that is left")
    assert "capturing stream has unjoined work" in error


def test_the_mode_of_a_capture_says_whether_memory_may_be_allocated(card):
    (error,) = card.ask(in_capture, action="cudaMalloc", mode="global")
    assert "operation failed due to a previous error during capture" in error
    assert card.ask(in_capture, action="cudaMalloc", mode="relaxed") == []
    assert card.ask(in_capture, action="query of an event", mode="relaxed") == []
