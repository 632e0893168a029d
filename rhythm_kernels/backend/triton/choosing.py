"""Which tile a launch takes: one that is forced, one of the file that `RHYTHM_TILES` names, or the tables'."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from .configs import TILES, Tile, listed
from .interpreted import INTERPRETED


def architecture(device: torch.device) -> str:
    """The table a device reads: its compute capability's, or the interpreter's."""
    if INTERPRETED:
        return "interpreter"
    return _architecture(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(index)[0], "sm_80")


_forced: dict[str, Tile] = {}


@contextlib.contextmanager
def forced(tiles: dict[str, Tile]) -> Iterator[None]:
    """A context in which these kernels run with these tiles, in every thread: the tuner tries tiles by it."""
    before = _forced.copy()
    _forced.update(tiles)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@functools.cache
def _asked_for(arch: str) -> dict[tuple[str, int, int], Tile]:
    """(kernel, bits, head size): Tile of the file that `RHYTHM_TILES` names, read once; without it nothing."""
    asked = os.environ.get("RHYTHM_TILES", "")
    if asked in ("", "0"):
        return {}
    from . import tile_file  # needs Triton, and few processes need it

    return tile_file.load(tile_file.cache_path() if asked == "1" else Path(asked), arch, TILES[arch])


def choose(kernel: str, arch: str, bits: int, head_size: int) -> Tile:
    """The tile of a launch: that of the file `RHYTHM_TILES` names if it has exactly this entry, else the table's."""
    if kernel in _forced:
        return _forced[kernel]
    return _asked_for(arch).get((kernel, bits, head_size)) or listed(kernel, arch, bits, head_size)
