"""Long sums of the Triton passes: sinks, a dominant first key and uniform rows."""

from __future__ import annotations

import pytest

from rhythm_kernels.triton.configs import Tile, forced
from tests.sums import PASSES, Head, errors, gradient_errors, hold

KINDS = {
    "sinks": (Head(sink=4), Head(sink=12), Head(sink=16, spread=1)),
    "first key": (Head(), Head(first=12), Head(first=16, spread=1)),
}
# A running sum takes a tile of 32 at a time, as the table's smallest do: the more, the more roundings. On the other
# side tiles are wide, for the interpreter's sake.
_MANY_ROWS, _MANY_KEYS = Tile(256, 32, 1, 1), Tile(32, 256, 1, 1)
TILES = dict.fromkeys(("band_rows", "row_stats", "attention", "attention_alone", "attention_dq"), _MANY_ROWS)
TILES |= dict.fromkeys(("band_columns", "column_stats", "column_moments", "attention_dkv"), _MANY_KEYS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_pass(kind: str) -> None:
    with forced(TILES):
        hold(errors(KINDS[kind][1:2], 1024, "triton", PASSES["triton"]))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_at_4096(kind: str) -> None:
    with forced(TILES):
        hold(errors(KINDS[kind], 4096, "triton", PASSES["triton"]))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_bands_as_wide_as_the_sequence(kind: str) -> None:
    with forced(TILES):
        hold(errors(KINDS[kind][1:2], 4096, "triton", PASSES["triton"][:3], window=4096, horizon=(10, 4096)))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    with forced(TILES):
        hold(gradient_errors(KINDS[kind][1:], 1024, "triton"))
