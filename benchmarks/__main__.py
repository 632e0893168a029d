"""`python -m benchmarks [--suite NAME] [--quick]` runs suites; `python -m benchmarks report FILES` makes a report."""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from . import fits, report
from .entries import Entry, default_path, load, save
from .machine import device_name
from .runner import BrokenDeviceError, Choice, broken, run_suite
from .shapes import DEVICES, PROFILES
from .suites import SUITES
from .targets import verdicts
from .timing import BUDGETS, Budget

# Exit status where the CUDA context broke: started again with --resume, the command goes on behind what broke it.
BROKEN = 75


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", action="append", choices=SUITES, help="may be repeated; default: all")
    profile = parser.add_mutually_exclusive_group()
    profile.add_argument("--profile", choices=PROFILES, default="full", help="which shapes and how many rounds")
    profile.add_argument("--quick", action="store_const", dest="profile", const="quick", help="one small shape a suite")
    parser.add_argument("--device", choices=DEVICES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length", type=int, action="append", help="only shapes of so many tokens; may be repeated")
    parser.add_argument("--among", action="append", default=[], metavar="RIVAL", help="these rivals alone")
    parser.add_argument("--without", action="append", default=[], metavar="RIVAL", help="leave a rival out")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, help="time for the rounds of one shape")
    parser.add_argument("--deadline", type=float, help="seconds after which nothing is begun but rounds that must be")
    parser.add_argument("--resume", action="store_true", help="leave out what the file of --save holds from before")
    parser.add_argument(
        "--save",
        nargs="?",
        const="",
        metavar="FILE",
        help="write the entries, by default to benchmarks/results/<device>-<date>.json; a file there is added to",
    )
    return parser


def _run(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*flex_attention.*")
    device = torch.device(options.device)
    budget = BUDGETS[options.profile]
    deadline = math.inf if options.deadline is None else time.monotonic() + options.deadline
    if options.seconds is not None:
        budget = Budget(options.seconds, min(budget.least, 3), budget.most, deadline)
    else:
        budget = replace(budget, deadline=deadline)
    choice = Choice(options.length or (), options.among, options.without)
    path = None
    if options.save is not None:
        path = Path(options.save) if options.save else default_path(device_name(device))
    earlier = load([path]) if path is not None and path.exists() else []
    entries: list[Entry] = []
    failed = False
    for suite in options.suite or [name for name in SUITES if name != "native_targets" or device.type == "cpu"]:
        try:
            for found in run_suite(suite, options.profile, device, budget, choice, earlier if options.resume else ()):
                entries += found
                print(report.table(found), flush=True)
                if path is not None:  # after every shape: what is cut short keeps what it has
                    save([*earlier, *entries], path)
        except BrokenDeviceError as error:
            print(error, flush=True)
            if path is not None:
                save([*earlier, *entries, *error.entries], path)
            return BROKEN
        except Exception:  # the other suites are still wanted
            traceback.print_exc()
            if broken(device):
                return BROKEN
            failed = True
    for line in (*verdicts(entries), *fits.lines(entries)):
        print(line)
    if path is not None:
        print(f"{len(entries)} entries added to {path}")
    return 1 if failed or any(entry.status in ("wrong", "failed") for entry in entries) else 0


def _report(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description="A table and plots from entries.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="folder for report.md and the plots; default: the table to the screen")
    options = parser.parse_args(arguments)
    entries = load(options.files)
    if options.out is None:
        print(report.table(entries))
        return 0
    images = report.plots(entries, options.out)
    links = "\n".join(f"![{path.stem}]({path.name})" for path in images)
    (options.out / "report.md").write_text(f"{report.table(entries)}\n{links}\n")
    print(options.out / "report.md")
    return 0


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["report"]:
        return _report(arguments[1:])
    return _run(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
