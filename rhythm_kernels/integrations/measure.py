"""Measuring a pass that a trainer makes anyway: in chunks, with the price of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..heads import HeadGroups
from ..probe import RhythmProbe
from ..probe.capture import LayerCall
from ..probe.masks import ForwardInputs

__all__ = ["MeasuredPass", "PassProbe"]


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
        self._whole_mask = response_mask
        self._rows = 0
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self, inputs: ForwardInputs) -> Tensor | None:
        self.response_mask = self._whole_mask[self._rows : self._rows + inputs.batch]
        self._rows += inputs.batch
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
        waad, fai = (torch.cat([part[i] for part in self._parts]) if self._parts else None for i in range(2))
        if waad is None or fai is None or waad.shape != self._whole_mask.shape:
            found = "none" if waad is None else f"shape {tuple(waad.shape)}"
            raise RuntimeError(f"measures: {found}, must cover response_mask of shape {tuple(self._whole_mask.shape)}")
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
