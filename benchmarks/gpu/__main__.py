"""`python -m benchmarks.gpu right|fast|carry`: what needs a GPU, in two calls; see docs/gpu.md.

right  is it right? Passes against float64, what torch's attention chose, bands, tiles, the GPU tests (240 s)
fast   is it fast? Every suite against its rivals, whole models, a GRPO step, the largest tests (480 s)
carry  on a machine with a network: what a machine without one needs, into .carry
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from .. import report
from ..entries import RESULTS, load
from ..machine import commit, environment
from ..targets import verdicts
from . import carry
from .plan import SECONDS, Plan
from .steps import ROOT, Call


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("call", choices=("right", "fast", "carry"))
    parser.add_argument("--seconds", type=float, help="for everything; default 240 (right), 480 (fast)")
    parser.add_argument("--only", action="append", metavar="STEP", help="this step alone; may be given several times")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU and tiny: checks the call, measures nothing"
    )
    parser.add_argument("--out", type=Path, help="folder of results; default: $OUT, else benchmarks/results/session")
    parser.add_argument("--compile", action="store_true", help="carry: also compile the Triton kernels ahead of time")
    return parser


def main(arguments: list[str]) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.call == "carry":
        return carry.collect(options.compile)
    if not options.rehearse and not torch.cuda.is_available():
        print("There is no GPU: --rehearse runs the call on the CPU, with tiny shapes.", file=sys.stderr)
        return 2
    out = (options.out or Path(os.environ.get("OUT") or RESULTS / "session")).resolve()
    plan = Plan(options.call, out, options.rehearse)
    steps = plan.steps()
    unknown = set(options.only or ()) - {step.name for step in steps}
    if unknown:
        names = ", ".join(step.name for step in steps)
        parser.error(f"--only must be among {names}, got {', '.join(sorted(unknown))}")
    begin = time.monotonic()
    if not options.only:
        for path in plan.results():  # of an earlier call, perhaps of another commit
            path.unlink(missing_ok=True)
    os.environ |= {"PYTHONUNBUFFERED": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    if options.rehearse:
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    carry.unpack()
    carried = carry.compiled()
    device = torch.device("cpu" if options.rehearse else "cuda")
    about = {"rehearsal": options.rehearse, "environment": environment(device)}
    print(f"{about['environment']['device']}, torch {torch.__version__}, commit {commit()}", flush=True)
    if not options.rehearse:
        query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        subprocess.run(["nvidia-smi", query, "--format=csv"], check=False)
    call = Call(options.call, out, options.seconds or SECONDS[options.call], about)
    for step in steps:
        if not options.only or step.name in options.only:
            call.run(step)
    if plan.entries.exists():
        for line in verdicts(load([plan.entries])):
            print(line)
        (out / "report.md").write_text(report.table(load([plan.entries])), encoding="utf-8")
    if carried:
        print(f"{carried} kernels were carried, {carry.compiled() - carried} compiled besides")
    print(f"{time.monotonic() - begin:.0f} s in all; see {out}")
    return 1 if call.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
