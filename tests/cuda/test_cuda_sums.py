"""Long sums of the CUDA bands, emulated: sinks, a dominant first key and uniform rows."""

from __future__ import annotations

import pytest

from tests.sums import FIRST, PASSES, SINKS, errors, hold

KINDS = {"sinks": SINKS, "first key": FIRST}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("cuda_on_cpu")
def test_bands(kind: str) -> None:
    hold(errors(KINDS[kind], 2048, "cuda", PASSES["cuda"]))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("cuda_on_cpu")
def test_bands_as_wide_as_the_sequence(kind: str) -> None:
    """W and the horizon without end: sums of 4,096 pairs a row or key."""
    hold(errors(KINDS[kind], 4096, "cuda", PASSES["cuda"], window=4096, horizon=(10, 4096)))
