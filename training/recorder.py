"""The metrics of a run: which of TRL's, by what names, a line a step in `metrics.jsonl`."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from .divergence import check_finite, in_step
from .folder import saved_lines, saving
from .processes import is_main
from .reading import read_json

_NAMES = {  # in metrics.jsonl: in TRL's log
    "loss": "loss",
    "reward": "reward",
    "accuracy": "rewards/correctness/mean",
    "response_tokens": "completions/mean_length",
    "cut_off": "completions/clipped_ratio",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "step_seconds": "step_time",
    "rhythm_seconds": "rhythm/seconds",
    "calibration_seconds": "rhythm/calibration_seconds",
    "gamma_mean": "rhythm/gamma_mean",
    "boosted_share": "rhythm/boosted_share",
    "waad_mean": "rhythm/waad_mean",
    "fai_mean": "rhythm/fai_mean",
    "certain_share": "rhythm/certain_share",
    "bonus_certain_share": "rhythm/bonus_certain_share",
    "bonus_entropy_ratio": "rhythm/bonus_entropy_ratio",
    "row_tokens": "row_tokens",
    "map_bytes": "map_bytes",
}


class Recorder(TrainerCallback):
    """Writes one line a step to `metrics.jsonl`, as it happens, and moves the progress bar: in the main process.

    Ends a run whose loss or gradient is not finite (`DivergedError`), before a checkpoint is made of that step.

    Attributes:
        lines: of all steps of the run, those before it went on included.
        started: when this process began to train, in seconds of `time.perf_counter`.
    """

    def __init__(self, path: Path, steps: int) -> None:
        self.lines: list[dict[str, float]] = []
        self._path, self._steps = path, steps

    def __enter__(self) -> Recorder:
        self.started = time.perf_counter()
        if not is_main():
            return self
        self.read()
        self._file = self._path.open("a", encoding="utf-8")
        done = len(self.lines)
        self._bar = tqdm(total=self._steps, initial=done, desc="train", unit="step", dynamic_ncols=True)
        return self

    def read(self) -> None:
        """Take over the lines that are there."""
        self.lines = [read_json(line) for line in saved_lines(self._path).values()]

    def __exit__(self, *_: Any) -> None:
        if is_main():
            self._bar.close()
            self._file.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not is_main() or not logs or "loss" not in logs:
            return
        line = {"step": state.global_step}
        known = {ours: logs[theirs] for ours, theirs in _NAMES.items() if logs.get(theirs) is not None}
        line |= {name: value for name, value in known.items() if math.isfinite(value)}  # JSON has no other numbers
        self.lines.append(line)
        with saving(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())  # a checkpoint on the disk has all lines before it
        told = (
            ("right", "accuracy", "{:.0%}"),
            ("tokens", "response_tokens", "{:.0f}"),
            ("gamma", "gamma_mean", "{:.2f}"),
        )
        shown = {name: form.format(line[key]) for name, key, form in told if key in line}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(state.global_step - self._bar.n)
        watched = {"loss": known.get("loss", 0.0)}
        if not getattr(args, "fp16", False):  # where a gradient that overflows is no step, and the scale is halved
            watched["gradient_norm"] = known.get("grad_norm", 0.0)
        with in_step(state.global_step):
            check_finite(**watched)
