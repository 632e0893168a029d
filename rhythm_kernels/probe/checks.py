"""Checks of a measured forward that never make the host wait for a GPU.

A check asks whether a mask is what the measures take it for. On the CPU it is read at once and raises. Reading it on a
CUDA device would stop the host until the device has caught up, at every forward; there the answers of one forward are
gathered on the device, where they turn its results into NaN if one of them is no, and travel to the host behind its
back. The host raises the error when it knows: before a later forward, when the block is left, or when results are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensor_cache import ordinary

_LATE = (
    "found on the device after an earlier measured forward, whose results are NaN; with CUDA_LAUNCH_BLOCKING=1, or on "
    "the CPU, it is raised in the forward itself"
)


def reads_now(device: torch.device) -> bool:
    """Whether the host may read a value of this device: not from CUDA, where it would wait."""
    return device.type != "cuda"


def on_device(mask: Tensor, device: torch.device) -> Tensor:
    """A mask as bool on `device`; on its way there from the host nobody waits for it.

    But for one in pinned memory, which the copy would read later, when its owner may have written the next.
    """
    return mask.to(device, torch.bool, non_blocking=mask.device.type == "cpu" and not mask.is_pinned())


class Checks:
    """The checks of one forward."""

    def __init__(self) -> None:
        self._answers: list[Tensor] = []
        self._errors: list[Exception] = []
        self._gathered: Tensor | None = None

    def require(self, answer: Tensor, error: Exception) -> None:
        """Raise `error`, now or later, where `answer`, a 0-d bool, is False."""
        if not reads_now(answer.device):
            self._answers.append(answer)
            self._errors.append(error)
            self._gathered = None
        elif not bool(answer):
            raise error

    def answers(self, device: torch.device) -> Tensor | None:
        """`(n,)` bool, what could not be read yet; None where nothing is open."""
        if self._answers and self._gathered is None:
            self._gathered = torch.stack([answer.to(device, non_blocking=True) for answer in self._answers])
        return self._gathered

    def pending(self, device: torch.device) -> Pending | None:
        """The answers on their way to the host, or None: nothing is open, or the host cannot learn it here."""
        answers = self.answers(device)
        if answers is None or not ordinary():
            return None
        if answers.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        return Pending(answers, self._errors)


class Pending:
    """Answers of a forward that travel to the host."""

    def __init__(self, answers: Tensor, errors: list[Exception]) -> None:
        self._errors = errors
        self._arrived: torch.cuda.Event | None = None
        if answers.is_cuda:
            self._answers = torch.empty(answers.shape, dtype=torch.bool, pin_memory=True)
            self._answers.copy_(answers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(answers.device))
        else:
            self._answers = answers

    def known(self, wait: bool) -> bool:
        """Whether the answers are here; with `wait` they are."""
        if self._arrived is None:
            return True
        if wait:
            self._arrived.synchronize()
        return self._arrived.query()

    def raise_first(self) -> None:
        """Raise the error of the first check that failed, if one did."""
        for held, error in zip(self._answers.tolist(), self._errors):
            if not held:
                raise type(error)(f"{error} ({_LATE})")
