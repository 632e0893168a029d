"""The first minute on a GPU, in one process: is every pass right, what do torch's operators do, which choice is faster?

    python -m tests.gpu.first --out FOLDER [--seconds N] [--rehearse]

Sections run in order and print a line for each finding; FOLDER/first.json holds what each found. A section that fails
stops no other. Where one breaks the CUDA context the program ends with status 75, and started again goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import entries
from benchmarks.__main__ import BROKEN
from benchmarks.entries import Entry
from benchmarks.problem import AttentionProblem
from benchmarks.rivals import RIVALS, Rival
from benchmarks.runner import BrokenDeviceError, Choice, broken, run_suite
from benchmarks.shapes import AttentionShape
from benchmarks.suites import SUITES
from benchmarks.timing import BUDGETS, Budget, Clock
from rhythm_kernels.probe.lse import LseObserver

from . import cudnn, on_device

PASSES = ("band_rows", "band_columns", "row_stats", "column_stats", "column_moments", "attention", "attention_backward")
_BANDS = ("band_rows", "band_columns")


class First:
    """What the sections share.

    Attributes:
        device: where everything runs; the CPU in a rehearsal, with the smallest shapes.
        out: folder of results.
        deadline: `time.monotonic()` after which nothing is begun that need not be.
    """

    def __init__(self, device: torch.device, out: Path, deadline: float) -> None:
        self.device, self.out, self.deadline = device, out, deadline
        self.small = device.type == "cpu"

    def _ours(self, suite: str) -> Iterator[Rival]:
        """Our backends that run a suite's pass here."""
        for rival in RIVALS[suite]:
            here = self.device.type in rival.devices and not rival.unavailable(self.device)
            if rival.name.startswith("rhythm") and here:
                yield rival

    def passes(self) -> Iterator[str]:
        """Every pass of every backend once against float64: a short sequence whole, a longer one at both ends."""
        wrong = []
        shapes = [AttentionShape(300, batch=2, heads=4, kv_heads=2, dim=64)]
        if self.small:
            shapes = [AttentionShape(70, batch=2, heads=2, kv_heads=1, dim=16)]
        else:
            shapes.append(AttentionShape(2100, batch=2, dim=128, dtype="bfloat16"))
        for shape in shapes:
            problem = AttentionProblem.draw(shape, self.device)
            for suite in PASSES:
                gate = SUITES[suite].gate(problem)
                for rival in self._ours(suite):
                    name = f"{suite:<18} {rival.name:<13} {shape.name:<32}"
                    begin = time.monotonic()
                    try:
                        error, where = gate.error(rival.make(problem)())
                    except Exception as failure:  # the next pass may run
                        if broken(self.device):
                            raise
                        traceback.print_exc()
                        error, where = float("inf"), f"{type(failure).__name__}: {failure}"
                    yield f"{name} {error:8.3g} of its tolerance {time.monotonic() - begin:6.1f} s"
                    if not error <= 1:
                        wrong.append(" ".join(name.split()))
                        yield f"    WRONG: {where}"
        on_device.check_credit(None, self.device)
        yield "credit: the reference's bits"
        assert not wrong, f"wrong: {', '.join(wrong)}"

    def operators(self) -> Iterator[str]:
        """Which operator `scaled_dot_product_attention` runs, with and without gradients, with and without a mask."""
        dtype = torch.float32 if self.small else torch.bfloat16
        length = 64 if self.small else 2048
        for heads, masked, grad in ((8, False, False), (8, False, True), (8, True, False), (4, False, False)):
            q = torch.randn(2, 8, length, 64, device=self.device, dtype=dtype, requires_grad=grad)
            k, v = (torch.randn(2, heads, length, 64, device=self.device, dtype=dtype) for _ in range(2))
            mask = torch.ones(2, 1, length, length, dtype=torch.bool, device=self.device).tril() if masked else None
            with LseObserver() as seen:
                torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=not masked, enable_gqa=heads != 8
                )
            kind = f"{heads} kv heads of 8, {'padding mask' if masked else 'causal'}, {'grad' if grad else 'no grad'}"
            yield f"{kind}: {seen.source or 'none that gives a log-sum-exp'}"

    def cudnn(self) -> Iterator[str]:
        """Whether cuDNN's output is the same bits with its log-sum-exp: `probe/lse.py` relies on it."""
        trouble, found = cudnn.settle_cudnn(self.device)
        yield found
        assert not trouble, trouble

    def ceilings(self) -> Iterator[str]:
        """Bandwidth of a copy, and the rate of a 16-bit matrix product."""
        floats, side = (2**20, 256) if self.small else (2**28, 8192)
        clock = Clock(self.device)
        source = torch.randn(floats, device=self.device)
        target = torch.empty_like(source)
        rate = 8 * floats / _median(clock, lambda: target.copy_(source))
        yield f"copy: {rate / 1e12:.3f} TB/s, read and written"
        a, b = (torch.randn(side, side, device=self.device).bfloat16() for _ in range(2))
        yield f"bfloat16 product: {2 * side**3 / _median(clock, lambda: a @ b) / 1e12:.1f} TFLOP/s"

    def bands(self) -> Iterator[str]:
        """The bands of both compiled backends as ops, in CUDA graphs, of one run: which is to be the default."""
        lengths = () if self.small else (8192, 32_768, 131_072)
        choice = Choice(lengths, ("rhythm cuda", "rhythm triton", "copy kernel"))
        path = self.out / "right-rows.json"
        found: list[Entry] = entries.load([path]) if path.exists() else []
        earlier = list(found)
        budget = BUDGETS["tiny"] if self.small else Budget(1.5, 3, deadline=self.deadline)
        for suite in _BANDS:
            for measured in run_suite(suite, "tiny" if self.small else "full", self.device, budget, choice, earlier):
                found += measured
                entries.save(found, path)
                times = {entry.rival: entry.median for entry in measured if entry.median is not None}
                shares = {entry.rival: entry.bandwidth_share for entry in measured if entry.bandwidth_share is not None}
                for entry in measured:
                    share = f"{shares[entry.rival]:6.1%} of the copy's bandwidth" if entry.rival in shares else ""
                    what = f"{1e6 * entry.median:9.1f} us" if entry.median else entry.reason
                    yield f"{suite:<13} {entry.shape:<28} {entry.rival:<14} {what} {share}"
                ours = {name: t for name, t in times.items() if name.startswith("rhythm")}
                if len(ours) > 1:
                    yield f"    faster: {min(ours, key=lambda name: ours[name])}"

    def host(self) -> Iterator[str]:
        """What one call of the documented functions costs the host, beside the device's work."""
        times = 2 if self.small else 50
        shape = AttentionShape(64, heads=2, kv_heads=1, dim=16)
        if not self.small:
            shape = AttentionShape(8192, dim=128, dtype="bfloat16")
        problem = AttentionProblem.draw(shape, self.device)
        for suite in _BANDS:
            for rival in self._ours(suite):
                if rival.name == "rhythm torch":  # a kernel or ten a tile: nobody's default where another is
                    continue
                call = rival.make(problem)
                call()
                _wait(self.device)
                begin = time.perf_counter()
                for _ in range(times):
                    call()
                each = (time.perf_counter() - begin) / times
                _wait(self.device)
                yield f"{suite:<13} {rival.name:<14} {1e6 * each:8.1f} us of the host a call"

    def tiles(self) -> Iterator[str]:
        """The candidates for launch choices against the table's."""
        from rhythm_kernels.tuning import shortlist

        path = self.out / "tiles.jsonl"
        workload = (
            shortlist.TARGET._replace(length=40, heads=2, kv_heads=1, head_size=16) if self.small else shortlist.TARGET
        )
        left = max(self.deadline - time.monotonic(), 1.0)
        found = shortlist.shortlist(self.device, left, workload=workload, save=path)
        yield f"{len(found)} tiles tried; see {path.name}"


# In their order: what must be known first, then what takes as long as there is time.
SECTIONS: dict[str, Callable[[First], Iterator[str]]] = {
    "operators": First.operators,
    "cudnn": First.cudnn,
    "ceilings": First.ceilings,
    "passes": First.passes,
    "bands": First.bands,
    "host": First.host,
    "tiles": First.tiles,
}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median(clock: Clock, call: Callable[[], object]) -> float:
    call()
    return statistics.median(clock(call)[0] for _ in range(10))


def run(first: First) -> int:
    """All sections that no earlier process has done; the exit status."""
    path = first.out / "first.json"
    done: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, section in SECTIONS.items():
        if name in done:
            continue
        print(f"== {name}", flush=True)
        begin, lines, failure = time.monotonic(), [], ""
        try:
            for line in section(first):
                lines.append(line)
                print(line, flush=True)
        except (Exception, BrokenDeviceError) as error:
            failure = f"{type(error).__name__}: {error}"
            traceback.print_exc()
            print(f"FAILED {name}: {failure}", flush=True)
        done[name] = {"failure": failure, "seconds": round(time.monotonic() - begin, 1), "lines": lines}
        path.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
        if failure and broken(first.device):
            return BROKEN
    for name, found in done.items():
        print(f"{name:<10} {found['seconds']:6.1f} s  {found['failure'] or 'ok'}")
    return int(any(found["failure"] for found in done.values()))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.first", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=140.0)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if options.rehearse else "cuda")
    return run(First(device, options.out, time.monotonic() + options.seconds))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
