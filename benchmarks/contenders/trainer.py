"""Real steps of the trainer of training/recipes/countdown_tiny.yaml: generation, rewards, loss, optimizer, bookkeeping.

The learning rate is 0. All is done that a step does, but both trainers then keep the same weights, write the same
responses from the same seeds, and differ by the credit alone.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..gate import Results
from ..shapes import TrainerShape

Call = Callable[[], Results]
_RECIPE = "training/recipes/countdown_tiny.yaml"


@dataclass(frozen=True)
class TrainerProblem:
    """What both trainers are made from."""

    shape: TrainerShape
    device: torch.device

    @classmethod
    def draw(cls, shape: TrainerShape, device: torch.device) -> TrainerProblem:
        return cls(shape, device)


def unavailable(device: torch.device) -> str:
    """ "" or why the trainer cannot run here."""
    for module in ("trl", "datasets"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    if device.type != "cuda" and torch.cuda.is_available():
        return "the trainer runs on the GPU that is there"
    return ""


class Steps:
    """A trainer and the call that runs its steps; `own_seconds()` is the median of one, generation to optimizer.

    The first step of the first call calibrates and warms up: a call is made before any that is timed.
    """

    def __init__(self, p: TrainerProblem, mode: str) -> None:
        from transformers import TrainerCallback

        from training.grpo import build_trainer, trainer_config
        from training.models import load
        from training.recipe import ROOT, load_recipe
        from training.task import make

        shape, device = p.shape, p.device
        times = self._times = []  # type: list[tuple[float, float]]
        lines = self._lines = []  # type: list[dict[str, float]]

        class Watch(TrainerCallback):
            begun = (0.0, 0.0)

            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                self.begun = _now(device)

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                now = _now(device)
                times.append((now[0] - self.begun[0], now[1] - self.begun[1]))

            def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
                if logs and "loss" in logs:
                    lines.append(logs)

        self._measures = mode != "uniform"
        self._folder = tempfile.TemporaryDirectory()
        recipe = load_recipe(
            ROOT / _RECIPE,
            [
                f"rhythm.mode={mode}",
                f"output.path={self._folder.name}",
                "output.checkpoint_steps=null",  # a step is timed, and none is kept
                f"grpo.max_steps={shape.steps}",
                f"grpo.per_device_train_batch_size={shape.batch}",
                f"grpo.max_completion_length={shape.length}",
                "grpo.learning_rate=0.0",
                f"task.train_size={shape.batch}",  # prompts: some eight times what one call asks
            ],
        )
        model, tokenizer = load(recipe)
        watch: Any = Watch()
        self._trainer = build_trainer(recipe, trainer_config(recipe), model, tokenizer, make(recipe.task), watch)

    def __call__(self) -> Results:
        self._times.clear()
        self._lines.clear()
        torch.manual_seed(0)
        self._trainer.train()
        names = {"loss": "loss", "tokens": "completions/mean_length"}
        if self._measures:
            names["gamma"] = "rhythm/gamma_mean"
        return {ours: torch.tensor([line[theirs] for line in self._lines]) for ours, theirs in names.items()}

    def own_seconds(self) -> tuple[float, float]:
        """Wall and CPU seconds of a step of the latest call."""
        wall, cpu = zip(*self._times)
        return statistics.median(wall), statistics.median(cpu)


def _now(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def without_credit(p: TrainerProblem) -> Call:
    return Steps(p, "uniform")


def coupled(p: TrainerProblem) -> Call:
    return Steps(p, "coupled")


class TrainerGate:
    """Finite losses of as many steps as were asked for, responses as long as those of the first trainer, and a credit
    that boosts where there is one."""

    def __init__(self, problem: TrainerProblem) -> None:
        self.problem = problem
        self._tokens: torch.Tensor | None = None

    def error(self, got: Results) -> tuple[float, str]:
        """0, or infinite and what is wrong."""
        wrong = float("inf")
        if got["loss"].shape != (self.problem.shape.steps,) or not bool(got["loss"].isfinite().all()):
            return wrong, "losses"
        if "gamma" in got and not bool(((got["gamma"] > 1) & (got["gamma"] < 1.5)).all()):
            return wrong, "gamma"
        if self._tokens is None:
            self._tokens = got["tokens"]
        if not torch.allclose(got["tokens"], self._tokens, rtol=0.02):
            return wrong, "the two trainers write responses of different lengths"
        return 0.0, "loss"
