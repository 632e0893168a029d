"""Measuring a pass that a trainer makes anyway: in chunks, with the price of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..heads import HeadGroups
from ..probe import RhythmProbe
from ..probe.calibration import Calibration
from ..probe.forward_sequences import ForwardInputs
from ..probe.layer_call import LayerCall

__all__ = ["MeasuredPass", "PassCalibration", "PassProbe"]


class _Rows:
    """The `(B, T)` response mask of a whole pass, handed out to forwards that take its rows in order."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self._taken = 0

    def take(self, count: int) -> Tensor:
        """The next `count` rows."""
        self._taken += count
        return self.mask[self._taken - count : self._taken]

    def check(self, what: str) -> None:
        """Raise where the forwards did not take exactly the rows that there are."""
        if self._taken != len(self.mask):
            shape = tuple(self.mask.shape)
            raise RuntimeError(f"{what}: {self._taken} rows were seen, must cover response_mask of shape {shape}")


class PassCalibration(Calibration):
    """A calibration over all forwards of one pass.

    Args:
        model, layers, quantile: as for :func:`rhythm_kernels.head_groups`.
        response_mask: `(B, T)` of the whole pass. The forwards inside the block take its rows in order.
    """

    def __init__(self, model: nn.Module, layers: str | Sequence[int], quantile: float, response_mask: Tensor) -> None:
        super().__init__(model, layers, quantile)
        self._rows = _Rows(response_mask)

    def begin(self, inputs: ForwardInputs) -> Tensor | None:
        self.response_mask = self._rows.take(inputs.batch)
        return super().begin(inputs)

    def groups(self) -> HeadGroups:
        self._rows.check("groups")
        return super().groups()


class PassProbe(RhythmProbe):
    """A probe over all forwards of one pass, which trainers split along the batch to bound its memory.

    Args:
        model, groups, window, horizon: as for :class:`rhythm_kernels.RhythmProbe`.
        response_mask: `(B, T)` of the whole pass. The forwards inside the block take its rows in order.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: HeadGroups,
        window: int,
        horizon: tuple[int, int | None],
        response_mask: Tensor,
    ) -> None:
        super().__init__(model, groups, window, horizon)
        self._rows = _Rows(response_mask)
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self, inputs: ForwardInputs) -> Tensor | None:
        self.response_mask = self._rows.take(inputs.batch)
        return super().begin(inputs)

    def layer(self, call: LayerCall) -> None:
        if call.q.is_cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            super().layer(call)
            stop.record()
            self._events.append((start, stop))
        else:
            started = time.perf_counter()
            super().layer(call)
            self._seconds += time.perf_counter() - started

    def end(self) -> None:
        super().end()
        self._parts.append((self.waad, self.fai))

    def measures(self) -> tuple[Tensor, Tensor]:
        """WAAD and FAI of the whole pass, each `(B, T)` float32.

        Raises:
            RuntimeError: the forwards inside the block did not cover the rows of `response_mask`.
        """
        self._rows.check("measures")
        waad, fai = (torch.cat([part[i] for part in self._parts]) for i in range(2))
        return waad, fai

    def seconds(self) -> float:
        """Time spent measuring so far. On CUDA this waits for the measured kernels, and for nothing after them."""
        for start, stop in self._events:
            stop.synchronize()
            self._seconds += start.elapsed_time(stop) / 1000
        self._events.clear()
        return self._seconds


@dataclass
class MeasuredPass:
    """What a measured log-prob pass leaves behind."""

    probe: PassProbe | None = None
    entropy: Tensor | None = None
