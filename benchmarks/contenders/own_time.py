"""The time that the probe's own work takes inside of a forward, rather than the difference of two forwards.

At 131,072 tokens the measures are expected at a thousandth of the forward: the clock of two forwards drifts by more.
So everything the probe does is bracketed where it does it. On CUDA the brackets are events of the stream, and their
distance is the time of the kernels between them as long as the host is ahead of the device, as it is in long forwards.
What the probe makes the model's own kernels do (cuDNN storing the log-sum-exp) stands in no bracket: that is in the
rows "forward + probe" and "forward alone", which are the same calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from rhythm_kernels import RhythmProbe
from rhythm_kernels.probe.capture import Capture

from ..gate import Results

Method = tuple[type, str]


# All that a probe computes in a forward: its start and end, and in each measured attention call what follows attention.
PROBE: tuple[Method, ...] = ((RhythmProbe, "begin"), (Capture, "_measure"), (RhythmProbe, "end"))


class OwnTime:
    """Sums the time inside of its brackets; a bracket within another counts once.

    Attributes:
        count: how many brackets were closed, nested ones left out.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._depth = 0
        self._wall = self._cpu = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.count = 0

    @contextmanager
    def bracket(self) -> Iterator[None]:
        """Count what runs inside."""
        if self._depth:
            yield
            return
        self._depth += 1
        begin, cpu, wall = self._event(), time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            self._wall += time.perf_counter() - wall
            self._cpu += time.process_time() - cpu
            end = self._event()
            if begin is not None and end is not None:
                self._events.append((begin, end))
            self._depth -= 1
            self.count += 1

    def _event(self) -> torch.cuda.Event | None:
        if not self._cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def around(self, *methods: Method) -> Iterator[None]:
        """Bracket every call of these methods, of any instance, until the block is left."""
        with ExitStack() as stack:
            for owner, name in methods:
                stack.enter_context(mock.patch.object(owner, name, self._bracketed(getattr(owner, name))))
            yield

    def _bracketed(self, method: Any) -> Any:
        def bracketed(*args: Any, **kwargs: Any) -> Any:
            with self.bracket():
                return method(*args, **kwargs)

        return bracketed

    def seconds(self) -> tuple[float, float]:
        """Device (CPU: wall) seconds and CPU seconds so far; on CUDA it waits for the last bracket."""
        if not self._cuda:
            return self._wall, self._cpu
        for _, end in self._events:
            end.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._events) / 1000, self._cpu


class Told:
    """A call that can tell afterwards what a part of it took, by the brackets that `run` sets."""

    def __init__(self, device: torch.device, run: Callable[[OwnTime], Results]) -> None:
        self._device, self._run = device, run
        self.own = OwnTime(device)

    def __call__(self) -> Results:
        self.own = OwnTime(self._device)
        return self._run(self.own)

    def own_seconds(self) -> tuple[float, float]:
        """Of the latest call; see :meth:`OwnTime.seconds`."""
        return self.own.seconds()
