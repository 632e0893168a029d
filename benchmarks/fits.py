"""What entries say of memory: how well it was counted where it was measured, and from which length a rival has no room.

A rival whose count is above what is free is not run, so its count decides. Beside the peaks of its own shorter shapes
that count is earned, not assumed.
"""

from __future__ import annotations

from collections.abc import Iterable

from .entries import Entry
from .rivals import RIVALS
from .shapes import StepShape

OURS = "step + credit"


def counted(entry: Entry) -> int | None:
    """The bytes that the registry counts for an entry; None where it counts none, or its shape is of another suite."""
    rival = next((rival for rival in RIVALS[entry.suite] if rival.name == entry.rival), None)
    if not entry.suite.startswith("grpo_step") or rival is None or rival.memory is None:
        return None
    return rival.memory(StepShape(**entry.dimensions), entry.environment["device_type"])


def lines(entries: Iterable[Entry]) -> list[str]:
    """A line for each rival and family of shapes that had no room somewhere."""
    found: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        if counted(entry) is not None:
            layout = tuple((k, v) for k, v in sorted(entry.dimensions.items()) if k != "length")
            found.setdefault((entry.environment["device"], layout), []).append(entry)
    return [line for members in found.values() for line in _of_a_family(members)]


def _of_a_family(members: list[Entry]) -> list[str]:
    ours = {e.dimensions["length"]: e for e in members if e.rival == OURS and e.status == "ok"}
    said = []
    for name in dict.fromkeys(entry.rival for entry in members):
        own = sorted((e for e in members if e.rival == name), key=lambda e: e.dimensions["length"])
        refused = [e for e in own if e.status == "does not fit" and e.dimensions["length"] in ours]
        if not refused:
            continue
        first = refused[0]
        length = first.dimensions["length"]
        beside = ours[length].peak_bytes
        errors = [(counted(e) or 0) / e.peak_bytes - 1 for e in own if e.status == "ok" and e.peak_bytes]
        checked = f"; counted {min(errors):+.0%} to {max(errors):+.0%} of what was measured" if errors else ""
        room = f", where {OURS} trains in {beside / 2**30:.1f} GiB" if beside else ""
        said.append(f"{name}: no room from {length:,} tokens on ({first.reason}){room}{checked}")
    return said
