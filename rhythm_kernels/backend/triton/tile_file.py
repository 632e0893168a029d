"""The file of tuned tiles: written by `python -m rhythm_kernels.tuning`, read where `RHYTHM_TILES` asks for it.

JSON: what the tiles were measured on, and a list of entries. An entry serves exactly its kernel, bits and head size;
for everything else the tables stand. A file is of one architecture, device capability and Triton version: another
compiler, or a chip with less shared memory, may not run its tiles at all.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import triton

from .configs import Tile
from .interpreted import INTERPRETED

_MAKE = "make it with python -m rhythm_kernels.tuning"
_STRINGS = ("architecture", "capability", "triton")
_LIMITS = {"rows": (16, 1024), "keys": (16, 1024), "warps": (1, 32), "stages": (1, 16), "capped_rows": (16, 1024)}


def device_name() -> str:
    """The current device as its vendor calls it."""
    return "interpreter" if INTERPRETED else torch.cuda.get_device_name()


def capability() -> str:
    """What the current device's compiled kernels depend on: `9.0`, `gfx942`, `interpreter`."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties().gcnArchName).split(":")[0]
    return "{}.{}".format(*torch.cuda.get_device_capability())


def cache_path() -> Path:
    """Where the tuner leaves its file, and `RHYTHM_TILES=1` looks for it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    device = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    return cache / "rhythm_kernels" / f"tiles-{device}-triton{triton.__version__}.json"


def _entry(path: Path, entry: Any) -> tuple[tuple[str, int, int], Tile]:
    """One entry's key and tile; a ValueError says what is wrong with it."""
    tile = entry.get("tile") if isinstance(entry, dict) else None
    if not isinstance(tile, dict) or not {"kernel", "bits", "head_size"} <= entry.keys():
        raise ValueError(f"{path}: an entry must have the fields kernel, bits, head_size and tile, got {entry}")
    if not isinstance(entry["kernel"], str):
        raise ValueError(f"{path}: kernel must be a name, got {entry['kernel']!r}")
    if tile.keys() != set(Tile._fields):
        raise ValueError(f"{path}: a tile must have the fields {', '.join(Tile._fields)}, got {', '.join(tile)}")
    for name, value in {"bits": entry["bits"], "head_size": entry["head_size"], **tile}.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{path}: {name} of {entry['kernel']} must be an integer of 0 or more, got {value!r}")
    for name, (low, high) in _LIMITS.items():
        value = tile[name]
        power = name == "stages" or value & (value - 1) == 0
        if not (low <= value <= high and power) and (name, value) != ("capped_rows", 0):
            kind = "" if name == "stages" else "a power of two "
            raise ValueError(f"{path}: {name} of {entry['kernel']} must be {kind}from {low} to {high}, got {value}")
    return (entry["kernel"], entry["bits"], entry["head_size"]), Tile(**tile)


def _read(path: Path) -> dict[str, Any]:
    """The file as JSON, of this device and compiler."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file of tuned tiles {path}: {_MAKE}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    lacks = [name for name in (*_STRINGS, "tiles") if not isinstance(found, dict) or name not in found]
    if lacks or not isinstance(found["tiles"], list):
        raise ValueError(f"{path} is no file of tuned tiles: it lacks {', '.join(lacks) or 'a list of tiles'}")
    return found


def load(path: Path, arch: str, kernels: Iterable[str]) -> dict[tuple[str, int, int], Tile]:
    """(kernel, bits, head size): Tile. Refuses what was tuned for another device or compiler, or not for `kernels`."""
    found = _read(path)
    here = {"architecture": arch, "capability": capability(), "triton": triton.__version__}
    for name, value in here.items():
        if found[name] != value:
            raise ValueError(f"{path} was tuned for {name} {found[name]}, this is {value}: tune again for this one")
    tiles = dict(_entry(path, entry) for entry in found["tiles"])
    unknown = sorted({key[0] for key in tiles} - set(kernels))
    if unknown:
        raise ValueError(f"{path}: kernel must be one of {', '.join(kernels)}, got {', '.join(unknown)}")
    return tiles


def save(
    path: Path, arch: str, kernels: Iterable[str], tuned: set[tuple[str, int, int]], entries: list[dict[str, Any]]
) -> None:  # fmt: skip
    """Write `entries` in place of those that the file has for the keys `tuned`, `(kernel, bits, head size)`.

    Its other entries stay; a file that :func:`load` refuses is an error.
    """
    kept: list[dict[str, Any]] = []
    if path.exists():
        load(path, arch, kernels)
        kept = [x for x in _read(path)["tiles"] if (x["kernel"], x["bits"], x["head_size"]) not in tuned]
    content = {
        "device": device_name(), "architecture": arch, "capability": capability(), "triton": triton.__version__,
        "tiles": kept + entries,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)  # a process that reads meanwhile gets the old file or the new one, whole
