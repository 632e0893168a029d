"""The suites: for each pass (and the probe, and credit) the problem, the gate, the work counted, and the yardstick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..contenders.backward import BackwardGate
from ..contenders.credit import CreditGate
from ..contenders.models import ModelGate, ModelProblem
from ..contenders.parts import PartGate, PartProblem
from ..contenders.step import StepGate, StepProblem
from ..contenders.trainer import TrainerGate, TrainerProblem
from ..gate import AttentionGate, Results
from ..problem import AttentionProblem, CreditProblem
from ..work import Work
from . import (
    attention,
    attention_backward,
    band_columns,
    band_rows,
    column_stats,
    credit,
    parts,
    probe,
    row_stats,
    step,
)


class Gate(Protocol):
    """The definitions of one problem."""

    def error(self, got: Results) -> tuple[float, str]:
        """The largest error in units of its tolerance, and where it was found."""


@dataclass(frozen=True)
class Suite:
    """What is measured.

    Attributes:
        title: what the table and plot say.
        problem: draws the tensors of a shape on a device.
        gate: makes the gate of a problem.
        work: counts what the pass must do.
        yardstick: device type -> the rival whose median every ratio is taken to.
        memory_curve: the peak memory is what counts: the allocator keeps nothing, and time is taken in one round.
        seconds: device type -> for the rounds of one shape, at most, two of which are then enough: a GPU is paid by the
            minute, and some calls take seconds.
    """

    title: str
    problem: Callable[[Any, torch.device], Any]
    gate: Callable[[Any], Gate]
    work: Callable[[Any], Work]
    yardstick: dict[str, str]
    memory_curve: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


_FLASH = {"cpu": "SDPA forward", "cuda": "SDPA FlashAttention"}


def _part(title: str, work: Callable[[Any], Work], yardstick: str) -> Suite:
    return Suite(title, PartProblem.draw, PartGate, work, dict.fromkeys(("cpu", "cuda"), yardstick))


def _attention(title: str, work: Callable[[Any], Work]) -> Suite:
    return Suite(title, AttentionProblem.draw, AttentionGate, work, _FLASH)


SUITES: dict[str, Suite] = {
    "band_rows": _attention("WAAD given lse", band_rows.work),
    "band_columns": _attention("FAI given lse", band_columns.work),
    "row_stats": _attention("lse, WAAD and span from q and k", row_stats.work),
    "column_stats": _attention("Full-horizon FAI given lse", column_stats.work),
    "column_moments": _attention("Moments of attention received, given lse", column_stats.moments_work),
    "attention": _attention("Attention with its rhythm", attention.work),
    "attention_backward": Suite(
        "Attention's backward pass",
        AttentionProblem.draw,
        BackwardGate,
        attention_backward.work,
        _FLASH | {"cpu": "SDPA backward"},
    ),
    "window": _part("Column passes behind a window", parts.window_work, "rhythm torch: span"),
    "few_heads": _part("A few heads beside all", band_rows.work, "rhythm torch: waad"),
    "short_sequences": _part("Short sequences beside a long one", band_rows.work, "rhythm torch: waad"),
    "probe": Suite(
        "Model forward with measures",
        ModelProblem.draw,
        ModelGate,
        probe.work,
        {"cpu": "forward alone", "cuda": "forward alone"},
        seconds={"cuda": 8.0},
    ),
    "grpo_step": Suite(
        "Forward and backward of a GRPO step",
        StepProblem.draw,
        StepGate,
        step.work,
        {"cpu": "step alone", "cuda": "step alone"},
        seconds={"cuda": 8.0},
    ),
    "countdown_step": Suite(
        "A trainer's step on Countdown",
        TrainerProblem.draw,
        TrainerGate,
        step.trainer_work,
        {"cpu": "trainer, no credit", "cuda": "trainer, no credit"},
        seconds={"cuda": 8.0},
    ),
    "credit": Suite(
        "Credit of a batch",
        CreditProblem.draw,
        CreditGate,
        credit.work,
        {"cpu": "rhythm torch", "cuda": "rhythm torch"},
    ),
    "native_targets": _attention("WAAD and FAI beside SDPA and eager maps", band_rows.work),
    # The last: what it asks of the allocator lasts.
    "probe_memory": Suite(
        "Peak memory of a forward with measures",
        ModelProblem.draw,
        ModelGate,
        probe.work,
        {"cpu": "forward alone", "cuda": "forward alone"},
        memory_curve=True,
    ),
}
