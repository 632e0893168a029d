"""Steps of a call, each a process with a limit, none of which stops the next; what became of them is a file.

A step that reports a broken CUDA context (exit status `BROKEN`) is started again, to go on behind what broke it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..__main__ import BROKEN

ROOT = Path(__file__).resolve().parents[2]
OUT_OF_TIME, NOT_FOUND = 124, 127  # as `timeout` and shells have them
_LEAST = 12.0  # seconds: with less left in the call no step is begun, which would import torch and end
_AGAIN = 5.0  # seconds of a step's limit: with less left it is not started again
_GRACE = 5.0  # seconds between SIGINT, at which Python still writes what it has, and SIGKILL
_RESTARTS = 3


@dataclass(frozen=True)
class Step:
    """A command and the most seconds it may take.

    Attributes:
        command: without the limit. "{left}" in an argument becomes the seconds that the step has, less a few in which
            to end.
        shown: how many of the last lines of what it prints are shown; all of it is in the log.
        environment: variables besides those of the call.
    """

    name: str
    command: Sequence[str]
    limit: float
    shown: int = 0
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """`status`: the exit status, 124 where the limit ended it, None where no time was left to begin it."""

    step: str
    status: int | None
    seconds: float = 0.0
    restarts: int = 0


class Call:
    """Runs steps one after the other within `seconds`, keeping `steps.json` and `log.txt` in `out` up to date."""

    def __init__(self, name: str, out: Path, seconds: float, about: dict[str, object]) -> None:
        self.name, self.out, self.about = name, out, about
        self.outcomes: list[Outcome] = []
        self._end = time.monotonic() + seconds
        out.mkdir(parents=True, exist_ok=True)
        self._log = (out / f"{name}.log").open("w", encoding="utf-8")

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    @property
    def failed(self) -> bool:
        return any(outcome.status != 0 for outcome in self.outcomes)

    def run(self, step: Step) -> Outcome:
        """Run one step, print a line about it and save what became of all so far."""
        begin = time.monotonic()
        outcome = Outcome(step.name, None)
        end = begin + min(step.limit, self.left)
        while self.left >= _LEAST if outcome.status is None else end - time.monotonic() >= _AGAIN:
            outcome.status, shown = self._once(step, end)
            outcome.seconds = round(time.monotonic() - begin, 1)
            if outcome.status != BROKEN or outcome.restarts == _RESTARTS:
                break
            outcome.restarts += 1
        self.outcomes.append(outcome)
        self._save()
        words = {0: "ok", None: "not begun: no time left", OUT_OF_TIME: "out of time"}
        said = words.get(outcome.status, f"exit status {outcome.status}")
        again = f", started again {outcome.restarts} times" if outcome.restarts else ""
        print(f"{step.name:<12} {outcome.seconds:6.1f} s  {said}{again}", flush=True)
        if outcome.status is not None and (step.shown or outcome.status):
            for line in shown[-(step.shown or 15) :]:
                print(f"    {line}", flush=True)
        return outcome

    def _once(self, step: Step, end: float) -> tuple[int, list[str]]:
        seconds = end - time.monotonic()
        command = [part.replace("{left}", f"{max(seconds - _GRACE, 1):.0f}") for part in step.command]
        self._log.write(f"\n===== {step.name}, at most {seconds:.0f} s: {' '.join(command)}\n")
        self._log.flush()
        begin = self._log.tell()
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **step.environment},
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:  # as where there is no compute-sanitizer
            return NOT_FOUND, [str(error)]
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = OUT_OF_TIME
            for number in (signal.SIGINT, signal.SIGKILL):
                try:
                    os.killpg(process.pid, number)
                    process.wait(_GRACE)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue
        with (self.out / f"{self.name}.log").open(encoding="utf-8", errors="replace") as log:
            log.seek(begin)
            return status, log.read().splitlines()

    def _save(self) -> None:
        found = {**self.about, "call": self.name, "steps": [asdict(outcome) for outcome in self.outcomes]}
        (self.out / f"{self.name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
