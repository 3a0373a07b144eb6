"""Timing of calls that take turns, and a measure of what else was running on the machine.

Every contender is called once to warm up. Then all contenders are called in turn, in one order in even rounds and in
the reverse order in odd ones, so that a drift of the clock or the load affects all of them alike. Ratios are taken
within a round. Weights rotate through copies that together are twice as large as the last cache level, so that each
call reads its weight from memory, as in a model of many layers. The median and the range from 20 to 80 % are kept.

The following is not controlled: the clock frequency and its boost, other guests on the same host, the core and the
memory bank of a thread, huge pages, the state of the page cache. Absolute times on a CPU hold for one machine on one
day; quote ratios.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import TypeVar

import torch

T = TypeVar("T")
Spread = dict[str, float]  # median, low (20 %), high (80 %)
Clock = Callable[[Callable[[], object]], float]
MOST_COPIES = 256


def spread(values: list[float], scale: float = 1.0) -> Spread:
    """Median and the range from 20 to 80 %.

    >>> spread([1.0, 2.0, 3.0, 4.0, 100.0])
    {'median': 3.0, 'low': 1.8, 'high': 23.2}
    """
    if len(values) == 1:
        values = values * 2
    fifths = quantiles(values, n=5, method="inclusive")  # "inclusive": no result outside of the measured range
    return {"median": median(values) * scale, "low": fifths[0] * scale, "high": fifths[3] * scale}


@dataclass(frozen=True)
class Timing:
    """Seconds of each call, in the order of the rounds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return median(self.seconds)

    def spread(self, scale: float = 1e3) -> Spread:
        """In milliseconds, unless another scale is asked for."""
        return spread(self.seconds, scale)

    def over(self, other: Timing) -> Spread:
        """The ratio of this time to the other one, round by round."""
        return spread([this / that for this, that in zip(self.seconds, other.seconds, strict=True)])


def alternate(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    least: int = 5,
    most: int = 200,
    device: str = "cpu",
    clock: Clock | None = None,
    between: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Call the contenders in turn for about so many seconds, in at least and at most so many rounds.

    `clock` times one call. By default this is a single call, from its start to its end; see also CLOCKS. `between` is
    called before each round and after the last one.
    """
    clock = clock or (CardClock() if device == "cuda" else timed)
    once = clock.of_one_call() if isinstance(clock, CardClock) else clock
    for call in calls.values():  # the first call builds caches and thread pools, the second tells the time
        once(call)
    clocks, round_takes = {}, 0.0
    for name, call in calls.items():
        took = once(call)
        clocks[name] = fitted = clock.fitted(took) if isinstance(clock, CardClock) else clock
        round_takes += took * (fitted.calls if isinstance(fitted, CardClock) else 1)
    rounds = min(most, max(least, math.ceil(seconds / round_takes)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        if between is not None:
            between()
        order = list(calls.items())
        for name, call in order if number % 2 == 0 else reversed(order):
            samples[name].append(clocks[name](call))
    if between is not None:
        between()
    return {name: Timing(values) for name, values in samples.items()}


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@dataclass(frozen=True)
class CardClock:
    """Seconds of a call on the card, as the mean over `calls` calls in a row.

    With `ahead` the card first waits until the host has queued all calls, so that only the card's work is timed.
    Without it the time of a call is that of the slower one of host and card, and of both together for a single call.
    """

    calls: int = 1
    ahead: bool = False
    pause: float = 1e-3  # seconds that the card waits at first, with `ahead`; four times as long after each failure

    def __call__(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        pause = self.pause
        for _ in range(8):
            if self.ahead:
                torch.cuda._sleep(int(pause * CYCLES))
            start.record()
            for _ in range(self.calls):
                call()
            is_ahead = not start.query()  # the host has queued everything before the card begins
            end.record()
            end.synchronize()
            if is_ahead or not self.ahead:
                return start.elapsed_time(end) / 1e3 / self.calls
            pause *= 4
        raise RuntimeError("timing: the host could not get ahead of the card; somebody else seems to be working")

    def of_one_call(self) -> CardClock:
        """The clock of a single call, which warms up."""
        return CardClock()

    def fitted(self, latency: float) -> CardClock:
        """The clock for a call whose latency is known: fewer calls where they would take more than LONG together.

        The card waits as long as the host may need to queue them, which is less than their latencies.

        >>> CardClock(50).fitted(0.0001).calls, CardClock(50).fitted(0.004).calls, CardClock(1).fitted(1.0).calls
        (50, 5, 1)
        """
        calls = min(self.calls, max(LEAST_CALLS, math.ceil(LONG / latency)))
        return replace(self, calls=calls, pause=min(MOST_PAUSE, max(self.pause, 1.2 * calls * latency)))


CYCLES = 2e9  # a second for torch.cuda._sleep, about; a card's clock is a little slower
LONG = 0.02  # seconds that the calls of one sample take at most, if LEAST_CALLS do
LEAST_CALLS = 2
MOST_PAUSE = 0.02

# How a call is timed, by device. alone: its latency; in_a_row: the time that it adds to a step, which is that of the
# host or the card, whichever takes longer; saturated: the card's work, with a queue that hides the host. On a CPU all
# three are the same.
SATURATED, IN_A_ROW, ALONE = NAMES = ("saturated", "in_a_row", "alone")
CLOCKS: dict[str, dict[str, Clock]] = {
    "cpu": dict.fromkeys(NAMES, timed),
    "cuda": {SATURATED: CardClock(8, ahead=True), IN_A_ROW: CardClock(50), ALONE: CardClock()},
}
HOW = (
    "saturated: the card's work, behind a queue that hides the host; in a row: 50 calls, fewer where they take over 20 "
    "ms, the slower one of host and card; alone: one call on an idle card, host and card"
)


def heading(clock: str) -> str:
    """A clock's name in a table.

    >>> [heading(name) for name in NAMES]
    ['saturated', 'in a row', 'alone']
    """
    return clock.replace("_", " ")


def rotation(make: Callable[[int], T], nbytes: int, device: str = "cpu") -> Iterator[T]:
    """Cycle through copies made by `make(index)` that together are twice as large as the last cache level."""
    return itertools.cycle([make(index) for index in range(copies(nbytes, last_cache(device)))])


def copies(nbytes: int, cache: int) -> int:
    """How many objects of `nbytes` bytes are together twice as large as the cache; at least two.

    >>> copies(8 << 20, 32 << 20), copies(1 << 30, 32 << 20)
    (9, 2)
    """
    return min(MOST_COPIES, max(2, 2 * cache // max(nbytes, 1) + 1))


def last_cache(device: str = "cpu") -> int:
    """Bytes of the last cache level; 32 MB where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=32 << 20)


class Watch:
    """Measures what else ran on the machine meanwhile: `with Watch() as watch: ...`, then `watch.record()`.

    The processor time of the whole system, less that of this process and of its ended children, was used by others.
    """

    def __enter__(self) -> Watch:
        self.load = [os.getloadavg()[0]]
        self.since = (time.perf_counter(), busy_seconds(), own_seconds())
        return self

    def __exit__(self, *exception: object) -> None:
        elapsed, busy, own = (
            now - then
            for now, then in zip((time.perf_counter(), busy_seconds(), own_seconds()), self.since, strict=True)
        )
        self.seconds = elapsed
        self.others = max(0.0, busy - own) / elapsed
        self.load.append(os.getloadavg()[0])

    def record(self) -> dict:
        return {
            "seconds": round(self.seconds, 1),
            "load_average": [round(value, 2) for value in self.load],
            "cores_used_by_others": round(self.others, 2),
        }


def own_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


def busy_seconds() -> float:
    """Processor time that the whole machine has spent so far, time stolen by other guests included."""
    try:
        user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return own_seconds()
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def warning(record: dict) -> str | None:
    """A warning, if other processes used a tenth of a core or more during the measurement."""
    others, load = record["cores_used_by_others"], record["load_average"]
    if others < 0.1:
        return None
    return (
        f"somebody else used {others:.1f} of {os.cpu_count()} cores meanwhile (load average {load[0]:.1f} at the "
        f"start, {load[-1]:.1f} at the end): not to be quoted"
    )


def warning_before() -> str | None:
    """A warning before the first case runs, if the load average shows that other processes are working."""
    load = os.getloadavg()[0]
    return None if load < 0.5 else f"load average {load:.1f} before anything ran: somebody else seems to be working"
