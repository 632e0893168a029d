"""Interleaved timing: every rival takes its turn in every round, in a fresh random order, so that drift hits all alike.

CPU: wall clock, and the CPU time of all threads beside it. CUDA: device events around one call after a read of
`FLUSH_BYTES`: the caches hold nothing of the inputs, nor lines that still have to be written, which a call that writes
little would pay for. The read also hides the host's time to launch.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

FLUSH_BYTES = 2**28
_FAST = 0.02  # seconds a rival may take of a round before it gets only one sample in it
_SAMPLES = 5  # at most, of one rival in one round


@dataclass
class Samples:
    """Seconds of each call; `cpu`: process CPU time of all threads (on CUDA: what the host spends)."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, sample: tuple[float, float]) -> None:
        self.wall.append(sample[0])
        self.cpu.append(sample[1])

    def quantile(self, share: float) -> float:
        """The value below which `share` of the samples lie, interpolated."""
        return quantile(self.wall, share)


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Budget:
    """`seconds` for all rounds of one shape, between `least` and `most` rounds.

    `deadline`: the value of `time.monotonic()` after which no round but a shape's first is begun.
    """

    seconds: float
    least: int = 5
    most: int = 50
    deadline: float = math.inf

    def over(self, done: int, seconds: float) -> bool:
        """Whether a shape has had its time, after `done` rounds and so many seconds."""
        return (done >= 1 and time.monotonic() > self.deadline) or (done >= self.least and seconds > self.seconds)


# Of each profile of shapes.
BUDGETS = {"tiny": Budget(0.0, 1, 1), "quick": Budget(5.0, 3), "full": Budget(60.0, 7)}


class Clock:
    """Times one call on one device type."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self._flush = torch.zeros(FLUSH_BYTES // 4, device=device)

    def __call__(self, call: Callable[[], object]) -> tuple[float, float]:
        """Seconds of wall (CUDA: device) and CPU time."""
        if self.device.type != "cuda":
            cpu, wall = time.process_time(), time.perf_counter()
            call()
            return time.perf_counter() - wall, time.process_time() - cpu
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.sum()
        begin.record()
        cpu = time.process_time()
        call()
        cpu = time.process_time() - cpu
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1000, cpu


def contest(
    calls: dict[str, Callable[[], object]], device: torch.device, budget: Budget, told: dict[str, str] | None = None
) -> dict[str, Samples]:
    """Time all `calls`, warm already, in interleaved rounds; in the first each gets one sample.

    `told`: a name -> the call among `calls` whose `own_seconds()` are its samples, after each sample of that call: the
    name of a part of it, or its own name where its clock would count more than is meant.
    """
    clock = Clock(device)
    told = told or {}
    order = list(calls)
    results = {name: Samples() for name in [*order, *(name for name in told if name not in calls)]}
    fastest = dict.fromkeys(order, _FAST)  # by the clock
    shuffle = random.Random(0).shuffle
    start = time.perf_counter()
    for done in range(budget.most):
        if budget.over(done, time.perf_counter() - start):
            break
        shuffle(order)
        for name in order:
            for _ in range(max(1, min(_SAMPLES, int(_FAST / max(fastest[name], 1e-9))))):
                sample = clock(calls[name])
                fastest[name] = min(fastest[name], sample[0])
                if name not in told:
                    results[name].add(sample)
                for part, source in told.items():
                    if source == name:
                        results[part].add(calls[name].own_seconds())  # type: ignore[attr-defined]
    return results


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph of `call`, whose tensors must not be freed meanwhile."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
