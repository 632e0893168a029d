"""Tune the launch choices for the GPU there is: `python -m rhythm_kernels.tuning`. Runs only when it is called.

For each kernel, neighbours of the table's tile are tried, nearest first, within a number of candidates and a budget of
seconds. A candidate must run, spill no more than the table's tile and give the same results; the fastest must also do
so with softcap, sliding window and sinks at once, and be faster in a second measurement, before it is written to a file
that `RHYTHM_TILES` can name.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from .. import __version__
from ..backend import triton as passes
from ..backend.triton import choosing, configs
from ..backend.triton.configs import Tile, words
from ..backend.triton.interpreted import INTERPRETED
from .shortlist import shortlist
from .trial import DTYPES, RUNS, Trial, Workload, arguments

CONFIRMED = 3  # at most so many candidates are measured again, the fastest first
GAIN = 0.99  # a tile replaces the table's if it takes less than this share of its time: a smaller gain is noise


class Timed(NamedTuple):
    """A tile and milliseconds of its pass."""

    tile: Tile
    ms: float


def caps(warps: int) -> set[int]:
    """Registers a thread may have so that one, two, three or four blocks of `warps` warps fit the 65536 of an SM."""
    most = 65536 // (32 * warps)
    return {min(255, most // blocks // 8 * 8) for blocks in (1, 2, 3, 4) if most // blocks >= 96}


def candidates(tile: Tile, most: int) -> list[Tile]:
    """Up to `most` neighbours, fewest steps first: rows and keys halved or doubled, 4 or 8 warps, 1 to 4 stages, and
    caps on registers that let another number of blocks run on an SM."""
    warps = {tile.warps} if INTERPRETED else {4, 8, tile.warps}
    stages = {tile.stages} if INTERPRETED else {1, 2, 3, 4}
    found: list[tuple[float, Tile]] = []
    for rows, keys, n_warps, n_stages in itertools.product(
        (tile.rows // 2, tile.rows, tile.rows * 2), (tile.keys // 2, tile.keys, tile.keys * 2), warps, stages
    ):  # fmt: skip
        # Chips with such a limit have 65536 registers for all threads: with more threads, each gets fewer.
        registers = min(tile.registers, 2048 // n_warps) if n_warps >= tile.warps else tile.registers and 255
        capped = min(tile.capped_rows, rows)
        steps = abs(math.log2(rows / tile.rows)) + abs(math.log2(keys / tile.keys))
        steps += abs(math.log2(n_warps / tile.warps)) + abs(n_stages - tile.stages)
        if min(rows, keys) < 16 or max(rows, keys) > 256:
            continue
        if steps:
            found.append((steps, Tile(rows, keys, n_warps, n_stages, registers, capped)))
        # ROCm has no such caps. A cap counts as a little more than a step: an uncapped kernel may need no more anyway.
        others = set() if INTERPRETED or torch.version.hip else caps(n_warps) - {registers}
        found += [(steps + 1.01, Tile(rows, keys, n_warps, n_stages, cap, capped)) for cap in sorted(others)]
    return [candidate for _, candidate in sorted(found, key=lambda x: x[0])[:most]]


def tune(
    kernel: str, table: Tile, workload: Workload, device: torch.device, most: int, seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Timed, Timed]:  # fmt: skip
    """The table's tile and the best one, which may be the same, with their times; prints every candidate.

    No candidate is begun after nine tenths of `seconds`: the last tenth is for the second measurements.
    """
    start = clock()
    plain = Trial(kernel, arguments(workload, device, full_rule=False))
    base = Timed(table, plain.milliseconds(table))
    print(f"{kernel}\n  {words(table):<44} {base.ms:9.4f} ms  1.00  the table's", flush=True)
    tried: Counter[str] = Counter()
    timed: list[Timed] = []
    listed = candidates(table, most)
    for tile in listed:
        if clock() - start > 0.9 * seconds:
            break
        objection = plain.objection(tile)
        tried[objection.partition(":")[0] or "timed"] += 1
        if objection:
            print(f"  {words(tile):<44} {objection}", flush=True)
            continue
        timed.append(Timed(tile, plain.milliseconds(tile)))
        print(f"  {words(tile):<44} {timed[-1].ms:9.4f} ms  {timed[-1].ms / base.ms:.2f}", flush=True)
    best = base
    full: Trial | None = None  # with the full rule
    short = workload._replace(length=min(workload.length, 1024))
    for tile, ms in sorted(timed, key=lambda x: x.ms)[:CONFIRMED]:
        if ms >= GAIN * base.ms or clock() - start > seconds:
            break
        full = full or Trial(kernel, arguments(short, device, full_rule=True))
        objection = full.objection(tile)
        if objection:
            print(f"  {words(tile):<44} with the full rule {objection}")
            continue
        base = Timed(table, min(base.ms, plain.milliseconds(table)))
        again = Timed(tile, max(ms, plain.milliseconds(tile)))
        if again.ms < GAIN * base.ms:
            best = again
            break
    tried["not reached"] = len(listed) - tried.total()
    print("  " + ", ".join(f"{n} {what}" for what, n in tried.items() if n))
    verdict = "the table's stays" if best.tile == table else f"{words(best.tile)}: {best.ms / base.ms:.2f} of its time"
    print(f"  -> {verdict}", flush=True)
    return base, best


def main(given: list[str], clock: Callable[[], float] = time.monotonic) -> int:
    parser = argparse.ArgumentParser(prog="python -m rhythm_kernels.tuning", description=__doc__)
    parser.add_argument("--kernel", action="append", choices=list(RUNS), help="may be given several times; default all")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--length", type=int, default=8192, help="tokens of one sequence")
    parser.add_argument("--seconds", type=float, default=120.0, help="for all kernels; a begun candidate is finished")
    parser.add_argument("--candidates", type=int, default=24, help="at most, for one kernel")
    parser.add_argument("--save", type=Path, help="the file of tiles; default: the one that RHYTHM_TILES=1 reads")
    parser.add_argument(
        "--shortlist",
        action="store_true",
        help="only time the candidates of configs.CANDIDATES; results are added to --save as lines of JSON",
    )
    chosen = parser.parse_args(given)
    if not 1 <= chosen.head_size <= 256:
        parser.error(f"--head-size must be from 1 to 256, got {chosen.head_size}")
    if chosen.kv_heads < 1 or chosen.heads < 2 or chosen.heads % chosen.kv_heads:
        parser.error(f"--heads must be a multiple of --kv-heads {chosen.kv_heads}, at least 2, got {chosen.heads}")
    for name, least in (("length", 16), ("candidates", 1)):
        if getattr(chosen, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(chosen, name)}")
    if not chosen.seconds > 0:
        parser.error(f"--seconds must be above 0, got {chosen.seconds}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = passes.available(device)
    if reason:
        print(f"Nothing to tune: {reason}.", file=sys.stderr)
        return 2
    from ..backend.triton import tile_file  # needs Triton

    if chosen.shortlist:
        workload = Workload(chosen.length, chosen.heads, chosen.kv_heads, chosen.head_size, chosen.dtype)
        print(f"{tile_file.device_name()}, {choosing.architecture(device)}: {workload}", flush=True)
        if INTERPRETED:
            print("Triton is interpreted: these times say nothing about any GPU.")
        shortlist(device, chosen.seconds, chosen.kernel, workload, chosen.save, clock=clock)
        return 0
    start = clock()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    arch = choosing.architecture(device)
    workload = Workload(chosen.length, chosen.heads, chosen.kv_heads, chosen.head_size, chosen.dtype)
    bits = 32 if INTERPRETED else 8 * DTYPES[chosen.dtype].itemsize
    path = chosen.save or tile_file.cache_path()
    if path.exists():
        try:
            tile_file.load(path, arch, configs.TILES[arch])
        except ValueError as error:
            parser.error(f"cannot add to the file that is there: {error}")
    print(f"{tile_file.device_name()}, {arch}: {workload}")
    if INTERPRETED:
        print("Triton is interpreted: these times say nothing about any GPU.")
    kernels = list(dict.fromkeys(chosen.kernel or RUNS))
    table = {name: configs.listed(name, arch, bits, chosen.head_size) for name in RUNS}
    # Candidates are compared with the tables' tiles, whatever RHYTHM_TILES says.
    with choosing.forced(table):
        for i, kernel in enumerate(kernels):
            left = chosen.seconds - (clock() - start)
            if left <= 0:
                print(f"Out of time before {', '.join(kernels[i:])}: give more --seconds.")
                break
            base, best = tune(
                kernel, table[kernel], workload, device, chosen.candidates, left / (len(kernels) - i), clock
            )
            measured = {
                **workload._asdict(), "ms": best.ms, "table_ms": base.ms, "package": __version__,
                "torch": torch.__version__, "date": date,
            }  # fmt: skip
            key = {"kernel": kernel, "bits": bits, "head_size": chosen.head_size}
            entries = [] if best.tile == base.tile else [{**key, "tile": best.tile._asdict(), "measured": measured}]
            tile_file.save(path, arch, configs.TILES[arch], {(kernel, bits, chosen.head_size)}, entries)
    print(f"Saved to {path}: RHYTHM_TILES={chosen.save or 1} uses it.")
    return 0
