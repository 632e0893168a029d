"""Long sums of the Triton passes: sinks, a dominant first key and uniform rows."""

from __future__ import annotations

import pytest

from rhythm_kernels.backend.triton.choosing import forced
from rhythm_kernels.backend.triton.configs import Tile
from tests.sums import PASSES, Head, errors, gradient_errors, hold

KINDS = {"sinks": (Head(sink=12),), "first key": (Head(first=12), Head())}


def tiles(wide: int) -> dict[str, Tile]:
    """A running sum takes 32 at a time, as the table's smallest tiles do: the more times, the more roundings.

    On the other side tiles are wide, for the interpreter's sake, which pays by the operation.
    """
    rows = dict.fromkeys(
        ("band_rows", "row_stats", "attention", "attention_alone", "attention_dq"), Tile(wide, 32, 1, 1)
    )
    keys = dict.fromkeys(("band_columns", "column_stats", "column_moments", "attention_dkv"), Tile(32, wide, 1, 1))
    return rows | keys


@pytest.mark.parametrize("kind", KINDS)
def test_every_pass(kind: str) -> None:
    with forced(tiles(256)):
        hold(errors(KINDS[kind][:1], 1024, "triton", PASSES["triton"]))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_at_4096(kind: str) -> None:
    with forced(tiles(1024)):
        hold(errors(KINDS[kind], 4096, "triton", PASSES["triton"]))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_bands_as_wide_as_the_sequence(kind: str) -> None:
    with forced(tiles(1024)):
        hold(errors(KINDS[kind][:1], 4096, "triton", PASSES["triton"][:2], window=4096, horizon=(10, 4096)))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    with forced(tiles(256)):
        hold(gradient_errors(KINDS[kind], 1024, "triton"))
