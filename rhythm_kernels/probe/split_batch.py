"""A batch that a trainer splits over several forwards, along its batch rows, to bound the memory: measured as one."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_tensor
from ..heads import HeadGroups
from .calibration import Calibration
from .checks import on_device
from .forward_sequences import ForwardInputs, Sequences
from .layer_call import LayerCall
from .probe import RhythmProbe

__all__ = ["BatchCalibration", "BatchProbe", "check_response_mask", "over_tokens"]


def check_response_mask(mask: Tensor) -> Tensor:
    """A mask of two dimensions; which tokens it is of, the forwards say."""
    if check_tensor("response_mask", mask).dim() != 2:
        raise ValueError(f"response_mask must be (B, T), got shape {tuple(mask.shape)}")
    return mask


def over_tokens(response_mask: Tensor, length: int) -> Tensor:
    """`(B, length)`: a mask of all tokens as it is, one of the last places of each batch row with the rest False."""
    missing = length - response_mask.shape[1]
    if missing < 0:
        raise ValueError(
            f"response_mask must be no longer than the {length} tokens of a forward, got shape "
            f"{tuple(response_mask.shape)}: forwards that are padded to lengths of their own need blocks of their own"
        )
    return F.pad(response_mask, (missing, 0))


class _Responses:
    """The response mask of a whole batch, handed out to forwards that take its batch rows in order.

    It is `(B, T)` like the tokens, or `(B, C)` of their last C places: trainers keep responses without their prompts.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = check_response_mask(mask)
        self._taken = 0

    def of(self, inputs: ForwardInputs) -> Tensor:
        """`(b, T)`: what of the mask belongs to the tokens of the next forward."""
        self._taken += inputs.batch
        if self._taken > len(self.mask):
            self.check()
        return over_tokens(self.mask[self._taken - inputs.batch : self._taken], inputs.length)

    def check(self) -> None:
        """Raise where the forwards did not take exactly the batch rows that there are."""
        if not self._taken:
            raise RuntimeError(
                "no forward of the model ran in this block without a KV cache, so nothing was measured: make one of "
                "the model that credit was given, or of a wrapper of it; those of generate and of copies do not count"
            )
        if self._taken != len(self.mask):
            raise RuntimeError(
                "response_mask must have as many batch rows as the forwards of its block together, got shape "
                f"{tuple(self.mask.shape)} for {self._taken} batch rows: make other forwards outside of the block"
            )


def _marks_padding() -> ValueError:
    return ValueError(
        "response_mask must be True only at tokens that attention_mask keeps, got one that marks padding: a mask of "
        "(B, C) is of the last C columns, whatever they hold; where responses begin elsewhere, give one of (B, T)"
    )


class BatchCalibration(Calibration):
    """A calibration over all forwards of one batch.

    Args:
        model, layers, quantile: as for :func:`rhythm_kernels.head_groups`.
        response_mask: `(B, T)` of the whole batch, or `(B, C)` of the last C places.
    """

    def __init__(self, model: nn.Module, layers: str | Sequence[int], quantile: float, response_mask: Tensor) -> None:
        super().__init__(model, layers, quantile)
        self._responses_of = _Responses(response_mask)

    def begin(self, inputs: ForwardInputs) -> Tensor | None:
        self.response_mask = self._responses_of.of(inputs)
        return super().begin(inputs)

    def groups(self) -> HeadGroups:
        self._responses_of.check()
        return super().groups()


class BatchProbe(RhythmProbe):
    """A probe over all forwards of one batch, which also times itself.

    Args:
        model, groups, window, horizon: as for :class:`rhythm_kernels.RhythmProbe`.
        response_mask: `(B, T)` of the whole batch, or `(B, C)` of the last C places.
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
        self._responses_of = _Responses(response_mask)
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._sequences: list[Sequences] = []  # of each forward
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self, inputs: ForwardInputs) -> Tensor | None:
        self.response_mask = self._responses_of.of(inputs)
        return super().begin(inputs)

    def layer(self, call: LayerCall) -> None:
        if len(self._sequences) == len(self._parts):
            self._sequences.append(call.sequences)
            if (live := call.sequences.live) is not None and self.response_mask is not None:
                self._capture.require((live | ~on_device(self.response_mask, live.device)).all(), _marks_padding())
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
        """WAAD and FAI of the whole batch, each float32 of the response mask's shape.

        Raises:
            RuntimeError: the forwards inside the block did not cover the batch rows of the mask.
        """
        self._responses_of.check()
        length = self._responses_of.mask.shape[1]
        waad, fai = (torch.cat([part[i][:, part[i].shape[1] - length :] for part in self._parts]) for i in range(2))
        return waad, fai

    def packed_bounds(self) -> tuple[Tensor, int] | None:
        """Where the batch's sequences begin and end, if a batch row holds several of them.

        Returns:
            `(S, 2)` int64, counted in the flattened batch, and a length that no response leaves; or None.

        Raises:
            ValueError: several sequences in a batch row of which the response mask has only the last places.
        """
        if not any(sequences.packed for sequences in self._sequences):
            return None
        bounds, first, longest = [], 0, 1
        for sequences in self._sequences:
            if sequences.length != self._responses_of.mask.shape[1]:
                raise ValueError(
                    f"response_mask must have all {sequences.length} tokens of packed batch rows, got shape "
                    f"{tuple(self._responses_of.mask.shape)}"
                )
            batch_row, *ends = sequences.bounds.long().unbind(1)
            begin = (batch_row + first) * sequences.length
            bounds.append(torch.stack([begin + end for end in ends], dim=1))
            longest = max(longest, (sequences.whole_table or sequences.table).max_seqlen)
            first += sequences.batch
        return torch.cat(bounds), longest

    def examine(self, wait: bool = False) -> None:
        """Raise what could not be measured of the forwards, as far as the host knows; with `wait` it knows all."""
        self._capture.examine(wait)

    def seconds(self) -> float:
        """Time spent measuring so far. On CUDA this waits for the measured kernels, and for nothing after them."""
        for start, stop in self._events:
            stop.synchronize()
            self._seconds += start.elapsed_time(stop) / 1000
        self._events.clear()
        return self._seconds
