"""Long sums of the compiled and the tile-wise passes: a sink, a dominant first key, uniform rows; to 32,768 tokens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import rhythm_kernels as rk

from . import bounds
from .sums import FIRST, PASSES, SINKS, Head, errors, gradient_errors, hold

BACKENDS = [name for name in ("torch", "cpu") if not rk.backends()[name]]
KINDS = {"sinks": SINKS, "first key": FIRST}
# What costs minutes with all heads: those that were farthest off.
LONG = {
    ("cpu", "sinks"): (Head(sink=4), Head(sink=12), Head(sink=16, spread=1)),
    ("cpu", "first key"): (Head(), Head(first=12), Head(first=16, spread=1)),
    ("torch", "sinks"): (Head(sink=12),),
    ("torch", "first key"): (Head(), Head(first=12)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned_memory")
def test_every_pass(backend: str, kind: str) -> None:
    hold(errors(KINDS[kind], 4096, backend, PASSES[backend]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bands_as_wide_as_the_sequence(backend: str, kind: str) -> None:
    hold(errors(KINDS[kind][1::2], 2048, backend, PASSES[backend][:3], window=2048, horizon=(10, 2048)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    hold(gradient_errors(KINDS[kind], 1024, "torch"))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pass_at_32768(backend: str, kind: str) -> None:
    hold(errors(LONG[backend, kind], 32_768, backend, PASSES[backend]))


@pytest.mark.long
@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled passes are not built")
def test_wide_bands_at_32768() -> None:
    passes = ("band_rows", "band_columns")
    hold(errors([Head(first=12)], 32_768, "cpu", passes, window=32_768, horizon=(10, 32_768)))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_at_4096(kind: str) -> None:
    hold(gradient_errors(KINDS[kind], 4096, "torch"))


def test_the_document_has_the_bounds() -> None:
    """Else: `python -m tests.bounds` prints the table."""
    document = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text(encoding="utf-8")
    (written,) = re.findall(r"<!-- bounds: [^>]*-->\n(.*?)<!-- end -->", document, re.DOTALL)
    assert written.splitlines() == bounds.table()
    assert all(share is None or share < 1 for _, shares in bounds.MEASURED.values() for share in shares)
