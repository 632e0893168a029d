"""Time a few tiles beside those of the tables, on a GPU, in one short step.

``python -m rhythm_kernels.tuning --shortlist --seconds 60 --save results.jsonl``. The candidates are data, in
``configs.CANDIDATES``: by their machine code they promise as much as the table's tile, so that only a GPU can decide.
The shortlist writes no tiles: whoever reads the results edits the table.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..backend.triton import choosing, configs
from ..backend.triton.configs import Tile, words
from ..backend.triton.interpreted import INTERPRETED
from .trial import DTYPES, Trial, Workload, arguments, first_line, outputs

ROUNDS = 2  # how often each tile is timed, in turn with the table's; the shortest time counts
# The most important first: a budget may end before the last.
ORDER = (
    "band_columns", "band_rows", "attention", "row_stats", "column_stats", "column_moments", "attention_alone",
    "attention_dq", "attention_dkv",
)  # fmt: skip
TARGET = Workload(8192, 16, 8, 128, "bf16")


class Job(NamedTuple):
    """A kernel and a tile that it will run."""

    kernel: str
    tile: Tile


def shortlist(
    device: torch.device, seconds: float, kernels: list[str] | None = None, workload: Workload = TARGET,
    save: Path | None = None, workers: int | None = None, clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time every candidate of `kernels` beside the table's tile; print a line for each, as soon as it is known.

    Args:
        seconds: no measurement is begun after so many.
        kernels: which, in this order; default :data:`ORDER`.
        save: a file to which each result is added as a line of JSON as soon as it is known.
        workers: processes that compile in advance, into Triton's cache on disk; default the number of processors less
            two, none where Triton is interpreted.

    Returns:
        A result a tile: `kernel`, `tile`, whether it is the `table`'s, `ms` and `table_ms` (medians of the whole pass,
        milliseconds, cold caches), or `objection`, why it has no time.
    """
    start = clock()
    arch = choosing.architecture(device)
    bits = 32 if INTERPRETED else 8 * DTYPES[workload.dtype].itemsize
    chosen = [name for name in kernels or ORDER if configs.CANDIDATES.get(arch, {}).get(name)]
    table = {name: configs.listed(name, arch, bits, workload.head_size) for name in configs.TILES[arch]}
    jobs = [Job(name, tile) for name in chosen for tile in (table[name], *configs.CANDIDATES[arch][name])]
    if workers is None:
        workers = 0 if INTERPRETED else max(0, (os.cpu_count() or 2) - 2)
    if workers:
        compile_in_advance(jobs, workload, workers, 0.5 * seconds)
        print(f"compiled in advance: {clock() - start:.1f} s", flush=True)
    results: list[dict[str, Any]] = []

    def add(kernel: str, tile: Tile, text: str, **found: Any) -> None:
        results.append({"kernel": kernel, "tile": tile._asdict(), "table": tile == table[kernel], **found})
        print(f"{kernel:<16} {words(tile):<46} {text}", flush=True)
        if save is not None:
            with save.open("a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1]) + "\n")

    # Candidates are compared with the tables' tiles, whatever RHYTHM_TILES says.
    with choosing.forced(table):
        given = arguments(workload, device, full_rule=False)
        for kernel in chosen:
            if clock() - start >= seconds:
                print(f"out of time before {', '.join(chosen[chosen.index(kernel) :])}", flush=True)
                break
            try:
                trial = Trial(kernel, given)
                base = trial.milliseconds(table[kernel])
            except Exception as error:  # the next kernel may run
                add(kernel, table[kernel], f"the table's: {first_line(error)}", objection=first_line(error))
                continue
            add(kernel, table[kernel], f"{base:9.4f} ms  the table's", ms=base, table_ms=base)
            for tile in configs.CANDIDATES[arch][kernel]:
                if tile == table[kernel]:
                    continue
                if clock() - start >= seconds:
                    print(f"{kernel:<16} out of time before {words(tile)}", flush=True)
                    break
                try:
                    objection = trial.objection(tile)
                    if not objection:
                        pairs = [(trial.milliseconds(table[kernel]), trial.milliseconds(tile)) for _ in range(ROUNDS)]
                except Exception as error:
                    objection = f"does not run: {first_line(error)}"
                if objection:
                    add(kernel, tile, objection, objection=objection)
                    continue
                table_ms, ms = (min(times) for times in zip(*pairs))
                add(kernel, tile, f"{ms:9.4f} ms  {ms / table_ms:.3f} of the table's", ms=ms, table_ms=table_ms)
    return results


def compile_in_advance(jobs: list[Job], workload: Workload, workers: int, seconds: float) -> None:
    """Have other processes compile for `seconds` at most; what they leave or fail at is compiled when it is timed.

    They run the passes on a few tokens, since kernels do not depend on the length.
    """
    short = workload._replace(length=64)
    workers = min(workers, len(jobs))
    shares = [[(kernel, list(tile)) for kernel, tile in jobs[i::workers]] for i in range(workers)]
    with contextlib.ExitStack() as stack:
        running = []
        for share in shares:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, json.dumps({"workload": list(short), "jobs": share})],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2],
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)  # called before the wait; does nothing to a process that has ended
            running.append(process)
        until = time.monotonic() + seconds
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))


def compile_jobs(text: str) -> Iterator[str]:
    """Run each job of a worker's share, a JSON object, once; yields a line for each that failed."""
    share = json.loads(text)
    workload = Workload(*share["workload"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = arguments(workload, device, full_rule=False)
    for kernel, fields in share["jobs"]:
        try:
            with choosing.forced({kernel: Tile(*fields)}):
                outputs(kernel, given)
        except Exception as error:
            yield f"{kernel} {fields}: {first_line(error)}"


if __name__ == "__main__":
    for failure in compile_jobs(sys.argv[1]):
        print(failure, file=sys.stderr)
