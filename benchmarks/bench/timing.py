"""The race: contestants are timed in turn, round by round, in one process.

contestants --race()--> seconds per call, by contestant, one for each round
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

Clock = Callable[[Callable[[], object]], float]
"""Calls a function and returns the seconds that it took."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One thing to be timed."""

    name: str
    """Its row in the table."""
    run: Callable[[], object]
    """What is timed."""
    prepare: Callable[[], object] | None = None
    """Called before each `run`, off the clock."""


def wall_clock(device: torch.device) -> Clock:
    """Return a clock for work that keeps the host busy; it waits for the device before and after."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else _nothing

    def clock(run: Callable[[], object]) -> float:
        synchronise()
        start = time.perf_counter()
        run()
        synchronise()
        return time.perf_counter() - start

    return clock


def device_clock(device: torch.device) -> Clock:
    """Return a clock for work on the device: CUDA events there, the wall clock on a CPU."""
    return _event_clock if device.type == "cuda" else wall_clock(device)


def _event_clock(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _nothing() -> None:
    pass


def race(
    contestants: Sequence[Contestant],
    *,
    clock: Clock,
    rounds: int,
    warmup: int = 2,
    shortest: float = 0.0,
) -> dict[str, list[float]]:
    """Time the contestants in turn, round by round, in changing order.

    A round is short, so what slows the machine for a while slows all contestants of that round, and drops
    out of their ratios. Each round starts with another contestant, and every second one runs backwards,
    so that nobody always inherits the same caches.

    Args:
        contestants: what to time; names are unique. There may be none.
        clock: how to time one call.
        rounds: samples for each contestant.
        warmup: calls of each contestant before the first round.
        shortest: seconds that a sample should last; shorter calls are repeated within it, equally often
            for all contestants, going by the quickest one's last warm-up call. Nothing is repeated where a
            contestant has a `prepare`.

    Returns:
        Seconds per call, by contestant, one for each round.
    """
    if not contestants:  # nothing could be measured here
        return {}
    quickest = math.inf
    for contestant in contestants:
        for call in range(warmup):
            _prepare(contestant)
            seconds = clock(contestant.run)
            if call == warmup - 1:
                quickest = min(quickest, seconds)
    calls = 1
    if not any(contestant.prepare for contestant in contestants):
        calls = max(1, math.ceil(shortest / max(quickest, 1e-7)))
    samples: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for number in range(rounds):
        shift = number % len(contestants)
        order = [*contestants[shift:], *contestants[:shift]]
        for contestant in reversed(order) if number % 2 else order:
            _prepare(contestant)
            with no_garbage_collection():
                seconds = clock(partial(_repeat, contestant.run, calls))
            samples[contestant.name].append(seconds / calls)
    return samples


def _prepare(contestant: Contestant) -> None:
    if contestant.prepare is not None:
        contestant.prepare()


def _repeat(run: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        run()


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep Python's garbage collector off: it comes when it likes, whoever's garbage it is."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
