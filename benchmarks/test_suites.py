"""The suites as pytest-benchmark sees them: `pytest benchmarks --bench-profile quick -k band_rows`.

One test for each suite, shape and rival. The rivals of a shape are timed together, in interleaved rounds, when the
first of them is asked for; each test then hands its rival's samples to pytest-benchmark through the timer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .entries import Entry
from .rivals import RIVALS
from .runner import compete
from .shapes import Shape, shapes
from .timing import BUDGETS, Samples

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Replay:
    """A timer whose differences, two calls a round, are samples that were taken elsewhere."""

    def __init__(self) -> None:
        self._times: Iterator[float] = iter(())

    def load(self, samples: list[float]) -> None:
        self._times = (time for sample in samples for time in (0.0, sample))

    def __call__(self) -> float:
        return next(self._times)


REPLAY = Replay()
_contests: dict[tuple[str, Shape], tuple[dict[str, Entry], dict[str, Samples]]] = {}


def _contest(suite: str, shape: Shape, profile: str) -> tuple[dict[str, Entry], dict[str, Samples]]:
    if (suite, shape) not in _contests:
        entries, samples = compete(suite, shape, DEVICE, BUDGETS[profile])
        _contests[suite, shape] = {entry.rival: entry for entry in entries}, samples
    return _contests[suite, shape]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    profile = metafunc.config.getoption("--bench-profile")
    cases = [
        pytest.param(suite, shape, rival.name, id=f"{suite}-{shape.name}-{rival.name}")
        for suite, rivals in RIVALS.items()
        for shape in shapes(suite, DEVICE.type, profile)
        for rival in rivals
        if DEVICE.type in rival.devices
    ]
    metafunc.parametrize(("suite", "shape", "rival"), cases)


@pytest.mark.benchmark(timer=REPLAY)
def test_rival(benchmark: Any, request: pytest.FixtureRequest, suite: str, shape: Shape, rival: str) -> None:
    """A red gate and a failure fail; what this machine cannot run is skipped with its reason."""
    entries, samples = _contest(suite, shape, request.config.getoption("--bench-profile"))
    entry = entries[rival]
    if entry.status in ("unavailable", "does not fit", "too slow"):
        pytest.skip(entry.reason)
    assert entry.status == "ok", entry.reason
    benchmark.group = f"{suite} {shape.name}"
    fields = ("gives", "error", "mode", "peak_bytes", "peak_by", "yardstick", "ratio", "bytes", "flops")
    shares = ("bandwidth_share", "flops_share", "dtype", "dimensions", "environment")
    benchmark.extra_info.update({name: getattr(entry, name) for name in (*fields, *shares)})
    REPLAY.load(samples[rival].wall)
    benchmark.pedantic(lambda: None, rounds=entry.samples)
