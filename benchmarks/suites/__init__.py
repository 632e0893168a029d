"""The suites: for each pass (and the probe, and credit) the problem, the gate, the work counted, and the yardstick."""

from __future__ import annotations

import math
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
from ..shapes import DEVICES
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
        memory_curve: whether peak memory is asked for: the allocator then keeps nothing, and one round is timed.
        seconds: device type -> the most seconds for the rounds of one shape, of which two are then enough: a call may
            take seconds.
        once_from: tokens from which on a rival is called once on a CPU, which takes minutes: that call is held to the
            gate and measured.
    """

    title: str
    problem: Callable[[Any, torch.device], Any]
    gate: Callable[[Any], Gate]
    work: Callable[[Any], Work]
    yardstick: dict[str, str]
    memory_curve: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    once_from: float = math.inf

    def once(self, length: int, device: torch.device) -> bool:
        """Whether a rival is called once only."""
        return device.type == "cpu" and length >= self.once_from


_ON_A_GPU = {"cuda": 8.0}
_FLASH = {"cpu": "SDPA forward", "cuda": "SDPA FlashAttention"}


def _beside(
    yardstick: str, title: str, problem: Any, gate: Callable[[Any], Gate], work: Callable[[Any], Work], **more: Any
) -> Suite:
    """A suite with one yardstick on every device."""
    return Suite(title, problem.draw, gate, work, dict.fromkeys(DEVICES, yardstick), **more)


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
    "window": _beside(
        "rhythm torch: span", "Column passes behind a sliding window", PartProblem, PartGate, parts.window_work
    ),
    "few_heads": _beside("rhythm torch: waad", "A few heads beside all", PartProblem, PartGate, band_rows.work),
    "short_sequences": _beside(
        "rhythm torch: waad", "Short sequences beside a long one", PartProblem, PartGate, band_rows.work
    ),
    "probe": _beside(
        "forward alone", "Model forward with measures", ModelProblem, ModelGate, probe.work, seconds=_ON_A_GPU
    ),
    "grpo_step": _beside(
        "step alone", "Forward and backward of a GRPO step", StepProblem, StepGate, step.work,
        seconds={**_ON_A_GPU, "cpu": 30.0}, once_from=8192,
    ),
    "countdown_step": _beside(
        "trainer, no credit", "A trainer's step on Countdown", TrainerProblem, TrainerGate, step.trainer_work,
        seconds=_ON_A_GPU,
    ),
    "credit": _beside("rhythm torch", "Credit of a batch", CreditProblem, CreditGate, credit.work),
    "native_targets": _attention("WAAD and FAI beside SDPA and eager maps", band_rows.work),
    # Last, since they change torch's allocator for good.
    "grpo_step_memory": _beside(
        "step alone", "Peak memory of a GRPO step", StepProblem, StepGate, step.work, memory_curve=True,
        once_from=2048,  # shorter ones are called three times: the first call of a process holds more
    ),
    "probe_memory": _beside(
        "forward alone", "Peak memory of a forward with measures", ModelProblem, ModelGate, probe.work,
        memory_curve=True,
    ),
}  # fmt: skip
