"""Result rows: what each holds, and how files of them are written and read."""

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
class Row:
    """One rival at one shape. Times in seconds, memory and traffic in bytes.

    Attributes:
        status: "ok"; "unavailable", "does not fit", "too slow", "wrong" (a red gate) or "failed", and then `reason`
            says why and there is no timing.
        gives: names of the results it returned, each of which passed the gate.
        error: the largest error in units of the gate's tolerance; `slack` is the factor this rival was allowed.
        median, p20, p80: of `samples` calls in interleaved rounds; `cpu`: median CPU time of all threads.
        mode: "call"; "graph" (CUDA: replay of a captured graph); "own time": what a call says itself that it, or a part
            of it, took (CUDA: by events of its own).
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


def save(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False)
    whole = path.with_suffix(".tmp")  # a process that is ended here leaves the file as it was
    whole.write_text(text + "\n")
    whole.replace(path)


def load(paths: Iterable[Path]) -> list[Row]:
    """Rows of several files; a field that is missing or unknown is a ValueError that names it."""
    known = {f.name for f in fields(Row)}
    rows = []
    for path in paths:
        for content in json.loads(path.read_text()):
            if set(content) != known:
                raise ValueError(f"{path}: fields {sorted(set(content) ^ known)} are missing or unknown")
            rows.append(Row(**content))
    return rows
