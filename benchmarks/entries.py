"""The results of benchmarks: an entry for each rival and shape, and how files of them are written and read."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Entry:
    """The result of one rival at one shape. Times are in seconds, memory and traffic in bytes.

    Attributes:
        status: "ok"; "unavailable", "does not fit", "too slow", "wrong" (a red gate) or "failed", and then `reason`
            says why and there is no timing.
        gives: names of the results it returned, each of which passed the gate.
        error: the largest error in units of the gate's tolerance; `slack` is the factor this rival was allowed.
        median, p20, p80: of `samples` calls in interleaved rounds; `cpu`: median CPU time of all threads.
        mode: how it was timed: "call"; "graph" (CUDA: the replay of a captured graph); "own time": the call measured
            itself, or a part of itself (on CUDA by events).
        ratio: median over the yardstick's in the same rounds.
        bytes, flops: what must be done (see `benchmarks.work`); `bandwidth_share`, `flops_share`: of the machine's own
            ceilings at their fastest, measured in the same rounds.
    """

    suite: str
    rival: str
    shape: str
    dtype: str
    dimensions: dict[str, Any]
    status: str = "ok"
    reason: str = ""
    gives: list[str] = field(default_factory=list)
    error: float | None = None
    slack: float = 1.0
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    cpu: float | None = None
    samples: int = 0
    mode: str = "call"
    peak_bytes: int | None = None
    peak_by: str = ""
    yardstick: str = ""
    ratio: float | None = None
    bytes: int = 0
    flops: int = 0
    bandwidth_share: float | None = None
    flops_share: float | None = None
    time: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    environment: dict[str, Any] = field(default_factory=dict)


def default_path(device: str) -> Path:
    """`results/<device>-<date>.json`."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return RESULTS / f"{slug}-{time.strftime('%Y-%m-%d', time.gmtime())}.json"


def save(entries: Iterable[Entry], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(entry) for entry in entries], indent=1, allow_nan=False)
    whole = path.with_suffix(".tmp")  # written first: if the process is ended here, the file is as it was
    whole.write_text(text + "\n")
    whole.replace(path)


def load(paths: Iterable[Path]) -> list[Entry]:
    """The entries of several files; a field that is missing or unknown is a ValueError that names it."""
    known = {f.name for f in fields(Entry)}
    entries = []
    for path in paths:
        for content in json.loads(path.read_text()):
            if set(content) != known:
                odd = sorted(set(content) ^ known)
                raise ValueError(f"{path} must be entries with the fields of Entry, got missing or unknown ones: {odd}")
            entries.append(Entry(**content))
    return entries
