"""What is read from machine code, and that the kernels read as they should."""

from __future__ import annotations

import json
from typing import Any

import pytest

from . import compiling, sass
from .sass import Instruction


def code(*lines: str) -> list[Instruction]:
    return [Instruction(16 * i, text) for i, text in enumerate(lines)]


def read(*arguments: str) -> list[dict[str, Any]]:
    """Readings of the script, in a process that does not interpret."""
    return [json.loads(line) for line in compiling.output("sass", "--json", *arguments).splitlines()]


def test_innermost_loops() -> None:
    """A jump back closes a loop; one around another is not read, and neither is the endless one at the end."""
    listing = code("MOV R1, R2", "FADD R3, R3, R1", "@P0 BRA `(.L_x_1)", "@!P1 BRA `(.L_x_0)", "BRA `(.L_x_2)")
    found = sass.loops(listing, {".L_x_0": 0, ".L_x_1": 1, ".L_x_2": 4})
    assert found == [listing[1:3]]


def test_multiply_adds() -> None:
    loop = code("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24", "@P0 HMMA.16816.F32.BF16 R4, R8, R10, R4")
    assert sass.multiply_adds(loop, 8) == 2 * 64 * 128 * 16 + 8 * 16 * 8 * 16


@pytest.mark.parametrize(
    ("lines", "ahead"),
    [
        (("DEPBAR.LE SB0, 0x0", "HGMMA", "LDGSTS [R1], [R2]", "LDGDEPBAR"), 1),  # asked for at the end: waits in full
        (("LDGSTS [R1], [R2]", "LDGDEPBAR", "HGMMA", "DEPBAR.LE SB0, 0x0"), 2),
        (("LDGSTS [R1], [R2]", "LDGDEPBAR", "HGMMA", "DEPBAR.LE SB0, 0x1"), 6),  # those of the round before
        (("DEPBAR.LE SB0, 0x1", "HGMMA", "LDGSTS [R1], [R2]", "LDGDEPBAR"), 5),
        (("DEPBAR.LE SB0, 0x2", "LDGDEPBAR", "HGMMA", "LDGDEPBAR"), 5),  # two groups a round
        (("HGMMA", "FADD R1, R1, R2"), -1),
    ],
)
def test_how_far_copies_stand_before_the_wait(lines: tuple[str, ...], ahead: int) -> None:
    assert sass.copies_ahead(code(*lines)) == ahead


def test_how_far_loads_stand_before_their_use() -> None:
    """The first that reads the register, in this round or the next; not one that writes it, or reads R17 for R1."""
    loop = code("@!P0 LDG.E R1, desc[UR4][R6.64]", "MOV R17, R5", "FADD R2, R17, R17", "FMUL R3, R1, R1")
    assert sass.loads_ahead(loop) == 3
    assert sass.loads_ahead(loop[3:] + loop[:3]) == 3
    assert sass.loads_ahead([loop[0], *code("MOV R1, R5", "STG.E [R8], R1")]) == 2
    assert sass.loads_ahead(loop[1:]) == -1


def test_blocks() -> None:
    """By registers, by shared memory, by threads."""
    assert sass.blocks_an_sm(168, 1024, 4) == 3 and sass.blocks_an_sm(169, 1024, 4) == 2
    assert sass.blocks_an_sm(128, 56 * 1024, 4) == 4 and sass.blocks_an_sm(128, 57 * 1024, 4) == 3
    assert sass.blocks_an_sm(24, 0, 32) == 2


def test_streams_read_as_they_should() -> None:
    """Two blocks an SM, loads half a tile ahead at least, and few instructions besides those that the work itself is:
    of a pair an FMA, an exponential, an addition (a column); a maximum and the span's FMA besides (a row).
    """
    most = {"column_stats": 3 + 2.5, "row_stats": 5 + 4.5}
    found = read("--kernel", "column_stats", "--kernel", "row_stats")
    assert {reading["kernel"] for reading in found} == most.keys()
    for reading in found:
        assert reading["blocks"] >= 2, reading
        assert reading["spills"] == 0, reading
        assert reading["slots"] <= most[reading["kernel"]], reading
        assert reading["copies_ahead"] >= 0.5 * reading["loop"], reading
        assert reading["loads_ahead"] == -1 or reading["loads_ahead"] >= 0.5 * reading["loop"], reading
        assert reading["matrix"].startswith("HGMMA"), reading


def test_another_tile_can_be_asked_for() -> None:
    [reading] = read("--kernel", "band_rows", "--tile", "64,16,4,2,128", "--head-size", "64")
    assert reading["tile"][:5] == [64, 16, 4, 2, 128]
    assert reading["pairs"] == 64 * 16 and reading["exponentials"] == 1.0
