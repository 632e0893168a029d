"""Checks of a measured forward that never make the host wait for a GPU.

A check asks whether a mask is what the measures take it for. On the CPU its answer is read at once, and the error is
raised. To read it from a CUDA device, the host would have to wait at every forward until the device has caught up.
There the answers of one forward are gathered on the device: if one is False, the forward's results become NaN. They are
copied to the host without a wait, and the host raises the error once they have arrived: before a later forward, when
the block is left, or when results are read.
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
    """A mask as bool on `device`, copied there from the host without a wait.

    From pinned memory it is copied with a wait: the copy would read that memory later, when the owner of the mask may
    have written the next one into it.
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
        """The answers, being copied to the host; None: there are none, or none can be copied (under a tracer, in a
        CUDA graph)."""
        answers = self.answers(device)
        if answers is None or not ordinary():
            return None
        if answers.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        return Pending(answers, self._errors)


class Pending:
    """Answers of a forward that are being copied to the host."""

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
        """Whether the answers have arrived; with `wait`, after waiting for them."""
        if self._arrived is None:
            return True
        if wait:
            self._arrived.synchronize()
        return self._arrived.query()

    def raise_first(self) -> None:
        """Raise the error of the first check that failed, if one did."""
        for holds, error in zip(self._answers.tolist(), self._errors):
            if not holds:
                raise type(error)(f"{error} ({_LATE})")
