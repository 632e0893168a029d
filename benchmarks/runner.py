"""Runs one suite: rivals are admitted, held to the gate, their memory measured, then timed together."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import memory
from .entries import Entry
from .gate import Results
from .machine import environment
from .rivals import RIVALS, Rival
from .shapes import Shape, shapes
from .suites import SUITES, Gate
from .timing import Budget, Clock, Samples, captured, contest, quantile

_INTERPRETED_TOKENS = 256  # Triton's interpreter is there to be exercised, not to be timed
_SHARE_OF_FREE = 0.8


@dataclass
class _Contender:
    """A rival that is timed; `samples`: those taken already, where it is called once."""

    rival: Rival
    entry: Entry
    call: Callable[[], object]
    samples: Samples = field(default_factory=Samples)


@dataclass(frozen=True)
class Choice:
    """Which shapes and rivals of a suite are wanted; an empty collection says all.

    Attributes:
        lengths: tokens of the shapes.
        among, without: names of rivals that compete, and of rivals that do not.
    """

    lengths: Collection[int] = ()
    among: Collection[str] = ()
    without: Collection[str] = ()

    def takes(self, rival: str) -> bool:
        return (not self.among or rival in self.among) and rival not in self.without


EVERYTHING = Choice()


class BrokenDeviceError(RuntimeError):
    """A rival left the CUDA context unusable: nothing else can be measured in this process.

    Attributes:
        entries: the entries of this shape that say so, to be saved before the process ends.
    """

    def __init__(self, entries: list[Entry]) -> None:
        super().__init__(f"the CUDA context is broken: {entries[-1].rival}: {entries[-1].reason}")
        self.entries = entries


def run_suite(
    suite: str,
    profile: str,
    device: torch.device,
    budget: Budget,
    choice: Choice = EVERYTHING,
    earlier: Collection[Entry] = (),
) -> Iterator[list[Entry]]:
    """The entries of each shape of a suite, in the registry's order, one list a shape.

    Args:
        budget: of each shape; none is begun after its deadline.
        earlier: entries of a process that ended early. A shape is left out where all wanted rivals have an entry of it,
            and a rival where its entry says that it failed.

    Raises:
        BrokenDeviceError: the process must end; another may go on with `earlier`.
    """
    about = environment(device)
    if SUITES[suite].memory_curve:
        memory.keep_nothing()
    for shape in shapes(suite, device.type, profile):
        met = {entry.rival: entry for entry in earlier if entry.suite == suite and entry.shape == shape.name}
        competing = {rival.name for rival in RIVALS[suite] if device.type in rival.devices and choice.takes(rival.name)}
        if (choice.lengths and shape.length not in choice.lengths) or competing <= met.keys():
            continue
        if time.monotonic() > budget.deadline:
            print(f"{suite}, {shape.name}: not begun, the time is over", flush=True)
            continue
        failed = [name for name, entry in met.items() if entry.status == "failed"]
        wanted = replace(choice, without=[*choice.without, *failed])
        yield compete(suite, shape, device, budget, about, wanted)[0]
        gc.collect()  # the timed calls hold the tensors of the shape, some in cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()


def compete(
    suite: str,
    shape: Shape,
    device: torch.device,
    budget: Budget,
    about: dict[str, Any] | None = None,
    choice: Choice = EVERYTHING,
) -> tuple[list[Entry], dict[str, Samples]]:
    """An entry for each rival that competes on this device, and by name the samples of those that were timed."""
    about = environment(device) if about is None else about
    definition = SUITES[suite]
    problem = definition.problem(shape, device)
    gate = definition.gate(problem)
    once = definition.once(shape.length, device)
    entries, contenders = [], []
    for rival in RIVALS[suite]:
        if device.type not in rival.devices or not choice.takes(rival.name):
            continue
        work = rival.work(shape, device.type) if rival.work else definition.work(shape)
        entry = Entry(suite, rival.name, shape.name, shape.dtype, shape.as_dict(), environment=about)
        entry.bytes, entry.flops, entry.slack = work.bytes, work.flops, rival.slack.get(shape.dtype, 1.0)
        entries.append(entry)
        if rival.is_part:
            contender = _part(rival, entry, entries, contenders)
            if contender is not None and once:
                contender.samples.add(contender.call.own_seconds())  # type: ignore[attr-defined]
        else:
            contender = _admit(rival, entry, shape, problem, gate, device, once)
        if contender is not None:
            contenders.append(contender)
        elif entry.status == "failed" and broken(device):
            raise BrokenDeviceError([entry])
    if definition.memory_curve:
        budget = Budget(0.0, 1, 1)
        for contender in contenders if not once else ():  # again: the gates' own work leaves pages that count once
            if not contender.rival.is_part:
                _measure(contender.call, contender.entry, device)
    elif device.type in definition.seconds:
        most = min(budget.seconds, definition.seconds[device.type])
        budget = replace(budget, seconds=most, least=min(budget.least, 2))
    told = {c.rival.name: c.rival.told_by for c in contenders if c.rival.told_by}
    if once:
        timed = {c.rival.name: c.samples for c in contenders}
    else:
        timed = contest({c.rival.name: c.call for c in contenders if not c.rival.is_part}, device, budget, told)
    for contender in contenders:
        _fill(contender.entry, timed[contender.rival.name])
    _compare(contenders, timed, definition.yardstick[device.type])
    return entries, timed


def _part(rival: Rival, entry: Entry, entries: list[Entry], contenders: list[_Contender]) -> _Contender | None:
    """An entry whose time another rival's call tells; that rival is earlier in the registry, and its gate counts."""
    entry.bytes = entry.flops = 0
    whole = next((contender for contender in contenders if contender.rival.name == rival.told_by), None)
    if whole is None:
        found = next((other for other in entries if other.rival == rival.told_by), None)
        entry.status = found.status if found else "unavailable"
        entry.reason = f"told by {rival.told_by!r}: {found.reason if found else 'left out'}"
        return None
    entry.error, entry.gives, entry.slack = whole.entry.error, whole.entry.gives, whole.entry.slack
    entry.mode = "own time"
    return _Contender(rival, entry, whole.call)


def _admit(
    rival: Rival, entry: Entry, shape: Shape, problem: Any, gate: Gate, device: torch.device, once: bool
) -> _Contender | None:
    """The call to be timed, or None where the entry says why there is none; `once`: with its only sample."""
    interpreted = "triton" in rival.name and os.environ.get("TRITON_INTERPRET") == "1"
    entry.reason = rival.unavailable(device)
    if not entry.reason and interpreted and shape.length > _INTERPRETED_TOKENS:
        entry.reason = f"interpreted Triton is not run beyond {_INTERPRETED_TOKENS} tokens"
    if entry.reason:
        entry.status = "unavailable"
        return None
    longest = rival.longest.get(device.type, shape.length)
    if shape.length > longest:
        entry.status, entry.reason = "too slow", f"not run beyond {longest:,} tokens"
        return None
    needs = rival.memory(shape, device.type) if rival.memory else 0
    free = memory.free(device)
    if needs > _SHARE_OF_FREE * free:
        entry.status, entry.reason = "does not fit", f"needs {needs / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        return None
    try:
        call = rival.make(problem)
        watched = _Watched(call, device)
        if once:
            _measure(watched, entry, device)
            results = watched.results
        else:
            results = call()
        error, where = gate.error(results)
        entry.error, entry.gives = error / entry.slack, sorted(results)
        del results
        watched.results = {}
        if not entry.error <= 1:
            entry.peak_bytes = None
            entry.status, entry.reason = "wrong", f"{where}: {entry.error:.3g} times the tolerance"
            entry.error = entry.error if math.isfinite(entry.error) else None  # JSON knows no infinity
            return None
        if not once:
            _measure(call, entry, device)
        if rival.told_by:
            entry.mode = "own time"
        if rival.graph and device.type == "cuda":
            return _Contender(rival, entry, _captured_or_plain(call, entry))
        return _Contender(rival, entry, call, watched.samples)
    except Exception as error:  # a rival that breaks must not take the others' entries along
        entry.status, entry.reason = "failed", f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return None


class _Watched:
    """A call, its results, and a sample of each time it is made."""

    def __init__(self, call: Callable[[], Results], device: torch.device) -> None:
        self._call, self._device = call, device
        self.resident_bytes = getattr(call, "resident_bytes", 0)
        self.results: Results = {}
        self.samples = Samples()

    def __call__(self) -> None:
        def call() -> None:
            self.results = self._call()

        self.samples.add(Clock(self._device)(call))


def _measure(call: Callable[[], object], entry: Entry, device: torch.device) -> None:
    """Peak memory of one call, with what it holds between calls."""
    entry.peak_bytes, entry.peak_by = memory.peak(call, device)
    resident = getattr(call, "resident_bytes", 0)
    if resident and entry.peak_bytes is not None:
        entry.peak_bytes += resident
        entry.peak_by += " and what is held between calls"


def broken(device: torch.device) -> bool:
    """Whether an earlier error left the device unusable in this process, as an illegal address does."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).sum().item()
    except RuntimeError:
        return True
    return False


def _captured_or_plain(call: Callable[[], Results], entry: Entry) -> Callable[[], object]:
    try:
        replay = captured(call)
    except RuntimeError as error:
        entry.reason = f"not captured in a graph: {str(error).splitlines()[0][:200]}"
        torch.cuda.synchronize()
        return call
    entry.mode = "graph"
    return replay


def _fill(entry: Entry, samples: Samples) -> None:
    entry.median, entry.p20, entry.p80 = (samples.quantile(share) for share in (0.5, 0.2, 0.8))
    entry.cpu = quantile(samples.cpu, 0.5)
    entry.samples = len(samples.wall)


def _compare(contenders: list[_Contender], timed: dict[str, Samples], yardstick: str) -> None:
    """Fill in the ratios to the yardstick and the shares of the fastest ceiling, all of the same rounds."""
    medians = {c.rival.name: c.entry.median for c in contenders}
    rates: dict[str, float] = {}
    for contender in contenders:
        kind = contender.rival.ceiling
        if kind:
            rate = getattr(contender.entry, kind) / min(timed[contender.rival.name].wall)
            rates[kind] = max(rate, rates.get(kind, 0.0))
    for contender in contenders:
        entry = contender.entry
        assert entry.median is not None
        entry.yardstick = yardstick
        reference = medians.get(yardstick)
        entry.ratio = entry.median / reference if reference else None
        if "bytes" in rates and entry.bytes:
            entry.bandwidth_share = entry.bytes / entry.median / rates["bytes"]
        if "flops" in rates and entry.flops:
            entry.flops_share = entry.flops / entry.median / rates["flops"]
