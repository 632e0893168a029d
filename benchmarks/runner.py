"""Runs one suite: rivals are admitted, held to the gate, their memory measured, then timed together."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import memory
from .gate import Results
from .machine import environment
from .rivals import RIVALS, Rival
from .rows import Row
from .shapes import Shape, shapes
from .suites import SUITES, Gate
from .timing import Budget, Samples, captured, contest, quantile

_INTERPRETED_TOKENS = 256  # Triton's interpreter is there to be exercised, not to be timed
_SHARE_OF_FREE = 0.8


@dataclass
class _Contender:
    rival: Rival
    row: Row
    call: Callable[[], object]


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
        rows: the rows of this shape that say so, to be saved before the process ends.
    """

    def __init__(self, rows: list[Row]) -> None:
        super().__init__(f"the CUDA context is broken: {rows[-1].rival}: {rows[-1].reason}")
        self.rows = rows


def run_suite(
    suite: str,
    profile: str,
    device: torch.device,
    budget: Budget,
    choice: Choice = EVERYTHING,
    earlier: Collection[Row] = (),
) -> Iterator[list[Row]]:
    """The rows of each shape of a suite, in the registry's order, one list a shape.

    Args:
        budget: of each shape; none is begun after its deadline.
        earlier: rows of a process that ended before its time. A shape is not run again where all that are wanted have a
            row, and rivals that failed at a shape are left out there.

    Raises:
        BrokenDeviceError: the process must end; another may go on with `earlier`.
    """
    about = environment(device)
    if SUITES[suite].memory_curve:
        memory.keep_nothing()
    for shape in shapes(suite, device.type, profile):
        met = {row.rival: row for row in earlier if row.suite == suite and row.shape == shape.name}
        competing = {rival.name for rival in RIVALS[suite] if device.type in rival.devices and choice.takes(rival.name)}
        if (choice.lengths and shape.length not in choice.lengths) or competing <= met.keys():
            continue
        if time.monotonic() > budget.deadline:
            print(f"{suite}, {shape.name}: not begun, the time is over", flush=True)
            continue
        failed = [name for name, row in met.items() if row.status == "failed"]
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
) -> tuple[list[Row], dict[str, Samples]]:
    """One row a rival that competes on this device, and the samples of those that were timed, by name."""
    about = environment(device) if about is None else about
    definition = SUITES[suite]
    problem = definition.problem(shape, device)
    gate = definition.gate(problem)
    rows, contenders = [], []
    for rival in RIVALS[suite]:
        if device.type not in rival.devices or not choice.takes(rival.name):
            continue
        work = rival.work(shape, device.type) if rival.work else definition.work(shape)
        row = Row(suite, rival.name, shape.name, shape.dtype, shape.as_dict(), environment=about)
        row.bytes, row.flops, row.slack = work.bytes, work.flops, rival.slack.get(shape.dtype, 1.0)
        rows.append(row)
        if rival.is_part:
            contender = _part(rival, row, rows, contenders)
        else:
            contender = _admit(rival, row, shape, problem, gate, device)
        if contender is not None:
            contenders.append(contender)
        elif row.status == "failed" and broken(device):
            raise BrokenDeviceError([row])
    if definition.memory_curve:
        budget = Budget(0.0, 1, 1)
    elif device.type in definition.seconds:
        most = min(budget.seconds, definition.seconds[device.type])
        budget = replace(budget, seconds=most, least=min(budget.least, 2))
    told = {c.rival.name: c.rival.told_by for c in contenders if c.rival.told_by}
    timed = contest({c.rival.name: c.call for c in contenders if not c.rival.is_part}, device, budget, told)
    for contender in contenders:
        _fill(contender.row, timed[contender.rival.name])
    _compare(contenders, timed, definition.yardstick[device.type])
    return rows, timed


def _part(rival: Rival, row: Row, rows: list[Row], contenders: list[_Contender]) -> _Contender | None:
    """A row told by another rival's call, which stands above it in the registry and is as right as that is."""
    row.bytes = row.flops = 0
    whole = next((contender for contender in contenders if contender.rival.name == rival.told_by), None)
    if whole is None:
        found = next((other for other in rows if other.rival == rival.told_by), None)
        row.status = found.status if found else "unavailable"
        row.reason = f"told by {rival.told_by!r}: {found.reason if found else 'left out'}"
        return None
    row.error, row.gives, row.slack, row.mode = whole.row.error, whole.row.gives, whole.row.slack, "own time"
    return _Contender(rival, row, whole.call)


def _admit(rival: Rival, row: Row, shape: Shape, problem: Any, gate: Gate, device: torch.device) -> _Contender | None:
    """The call to be timed, or None where the row says why there is none."""
    interpreted = "triton" in rival.name and os.environ.get("TRITON_INTERPRET") == "1"
    row.reason = rival.unavailable(device)
    if not row.reason and interpreted and shape.length > _INTERPRETED_TOKENS:
        row.reason = f"interpreted Triton is not run beyond {_INTERPRETED_TOKENS} tokens"
    if row.reason:
        row.status = "unavailable"
        return None
    longest = rival.longest.get(device.type, shape.length)
    if shape.length > longest:
        row.status, row.reason = "too slow", f"not run beyond {longest:,} tokens"
        return None
    needs = rival.memory(shape, device.type) if rival.memory else 0
    free = memory.free(device)
    if needs > _SHARE_OF_FREE * free:
        row.status, row.reason = "does not fit", f"needs {needs / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        return None
    try:
        call = rival.make(problem)
        results = call()
        error, where = gate.error(results)
        row.error, row.gives = error / row.slack, sorted(results)
        del results
        if not row.error <= 1:
            row.status, row.reason = "wrong", f"{where}: {row.error:.3g} times the tolerance"
            row.error = row.error if math.isfinite(row.error) else None  # JSON knows no infinity
            return None
        row.peak_bytes, row.peak_by = memory.peak(call, device)
        resident = getattr(call, "resident_bytes", 0)
        if resident and row.peak_bytes is not None:
            row.peak_bytes, row.peak_by = row.peak_bytes + resident, f"{row.peak_by} and what is held between calls"
        if rival.told_by:
            row.mode = "own time"
        if rival.graph and device.type == "cuda":
            return _Contender(rival, row, _captured_or_plain(call, row))
        return _Contender(rival, row, call)
    except Exception as error:  # a rival that breaks must not take the others' rows along
        row.status, row.reason = "failed", f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return None


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


def _captured_or_plain(call: Callable[[], Results], row: Row) -> Callable[[], object]:
    try:
        replay = captured(call)
    except RuntimeError as error:
        row.reason = f"not captured in a graph: {str(error).splitlines()[0][:200]}"
        torch.cuda.synchronize()
        return call
    row.mode = "graph"
    return replay


def _fill(row: Row, samples: Samples) -> None:
    row.median, row.p20, row.p80 = (samples.quantile(share) for share in (0.5, 0.2, 0.8))
    row.cpu = quantile(samples.cpu, 0.5)
    row.samples = len(samples.wall)


def _compare(contenders: list[_Contender], timed: dict[str, Samples], yardstick: str) -> None:
    """Ratios to the yardstick, and shares of the ceilings at their fastest, all of the same rounds."""
    medians = {c.rival.name: c.row.median for c in contenders}
    rates: dict[str, float] = {}
    for contender in contenders:
        kind = contender.rival.ceiling
        if kind:
            rate = getattr(contender.row, kind) / min(timed[contender.rival.name].wall)
            rates[kind] = max(rate, rates.get(kind, 0.0))
    for contender in contenders:
        row = contender.row
        assert row.median is not None
        row.yardstick = yardstick
        reference = medians.get(yardstick)
        row.ratio = row.median / reference if reference else None
        if "bytes" in rates and row.bytes:
            row.bandwidth_share = row.bytes / row.median / rates["bytes"]
        if "flops" in rates and row.flops:
            row.flops_share = row.flops / row.median / rates["flops"]
