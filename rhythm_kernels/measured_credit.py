"""`RhythmCredit`: the credit of a trainer's batches, from the forwards that it makes anyway to shaped advantages.

This is what every trainer's adapter is made of; it knows no trainer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_int, check_tensor, same_shape
from .credit import rhythm_credit, shape_advantages
from .heads import HeadGroups
from .probe.calibration import evaluating, head_groups
from .probe.split_batch import BatchCalibration, BatchProbe
from .probe.structure import attention_layers, find_decoder
from .settings import RhythmSettings

__all__ = ["GROUPS_FILE", "NEAR_CERTAIN", "RhythmCredit"]

GROUPS_FILE = "rhythm_groups.json"
# Nats of entropy below which a token counts as near-certain: the likeliest token has a probability of 0.99 or so, and a
# factor on its advantage changes next to nothing.
NEAR_CERTAIN = 0.05


@dataclass
class _Batch:
    """The measured batch: its response mask, and what was made of it so far."""

    mask: Tensor
    probe: BatchProbe | None = None
    measures: tuple[Tensor, Tensor] | None = None
    gamma: Tensor | None = None
    entropy: Tensor | None = None
    credit_seconds: float = 0.0


class RhythmCredit:
    """Credit for the batches of one model, whatever trains it.

        credit = RhythmCredit(model, RhythmSettings(mode="coupled"))
        for step, batch in enumerate(batches):
            if credit.calibration_due(step):
                credit.calibrate([batch])                    # or settings.groups, or credit.load(folder)
            with credit.measuring(batch["response_mask"]):
                logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            advantages = credit.shape(advantages)            # (B,) or (B, T) -> (B, T)
            log(credit.statistics())

    The measured forwards must be those of the policy that wrote the responses: the pass for the old log-probs, or the
    first training forward where there is no such pass. In modes that read no attention (`uniform`, `random`,
    `entropy`) nothing is calibrated or measured, and the same lines of a trainer work.

    Args:
        model: as for :class:`rhythm_kernels.RhythmProbe`. The attribute may be set anew where a trainer wraps it.
        settings: a :class:`rhythm_kernels.RhythmSettings`; its defaults where None.

    Attributes:
        model, settings: as given.

    Raises:
        TypeError, ValueError: at construction, for settings that do not fit the model: layers that cannot be measured,
            groups of another architecture, a file that holds none.
    """

    def __init__(self, model: nn.Module, settings: RhythmSettings | None = None) -> None:
        settings = RhythmSettings() if settings is None else settings
        if not isinstance(settings, RhythmSettings):
            raise TypeError(f"settings must be a RhythmSettings, got {type(settings).__name__}")
        self.model, self.settings = model, settings
        self._groups: HeadGroups | None = None
        self._step = self._grouped_at = 0
        self._batch: _Batch | None = None
        if settings.reads_attention:
            attention_layers(find_decoder(model), settings.layers)  # raises for a wrong choice
            if (groups := settings.load_groups()) is not None:
                self.groups = groups

    @property
    def groups(self) -> HeadGroups | None:
        """The head groups in use; None before the first calibration. Set them anew at any time between batches."""
        return self._groups

    @groups.setter
    def groups(self, groups: HeadGroups) -> None:
        if not isinstance(groups, HeadGroups):
            raise TypeError(f"groups must be HeadGroups, got {type(groups).__name__}")
        find_decoder(self.model).check(groups)
        self._groups, self._grouped_at = groups, self._step

    def calibration_due(self, step: int) -> bool:
        """Whether to calibrate before this step of training: while there are no groups, and every `regroup_steps`."""
        self._step = check_int("step", step, 0)
        every = self.settings.regroup_steps
        return self.settings.reads_attention and (self._groups is None or 0 < every <= self._step - self._grouped_at)

    def calibrate(self, batches: Iterable[Mapping[str, Any]]) -> HeadGroups | None:
        """Tell local from global heads by forwards over some batches; see :func:`rhythm_kernels.head_groups`.

        Nothing is done, and None returned, in modes that read no attention.
        """
        if self.settings.reads_attention:
            self.groups = head_groups(self.model, batches, self.settings.layers, self.settings.head_quantile)
        return self._groups

    @contextmanager
    def calibrating(self, response_mask: Tensor) -> Iterator[None]:
        """The same by forwards that the caller makes in this block, over one batch, without gradients or dropout.

        Args:
            response_mask: as for :meth:`measuring`.

        Raises:
            ValueError: no response token was met.
            RuntimeError: the forwards did not cover the batch.
        """
        layers, quantile = self.settings.layers, self.settings.head_quantile
        calibration = BatchCalibration(self.model, layers, quantile, response_mask)
        with evaluating(self.model), calibration:
            yield
        self.groups = calibration.groups()

    @contextmanager
    def measuring(self, response_mask: Tensor) -> Iterator[None]:
        """Measure the model's forwards inside this block, which are made as they always are, gradients included.

        One forward, or several that take the rows of the batch in order.

        Args:
            response_mask: `(B, T)`, bool or 0/1, of all tokens of the batch; or `(B, C)` of the last C tokens of each
                batch row, as trainers keep responses, and so is everything that is made of it.

        Raises:
            RuntimeError: no groups yet; forwards that did not cover the batch (at the end of the block), which is what
                happens where none of them went through `model`.
            TypeError, ValueError: a mask of another type or shape, and whatever a probe refuses.
        """
        self._batch = None
        if check_tensor("response_mask", response_mask).dim() != 2:
            raise ValueError(f"response_mask must be (B, T), got shape {tuple(response_mask.shape)}")
        batch = _Batch(response_mask)
        if not self.settings.reads_attention:
            yield
        elif self._groups is None:
            raise RuntimeError(
                f"mode {self.settings.mode!r} needs head groups: call calibrate(batches), set groups, or load(folder) "
                "before measuring"
            )
        else:
            window, horizon = self.settings.window, self.settings.horizon
            batch.probe = BatchProbe(self.model, self._groups, window, horizon, response_mask)
            with batch.probe:
                yield
            batch.measures = batch.probe.measures()
        self._batch = batch

    @property
    def waad(self) -> Tensor:
        """WAAD of the measured batch, float32 of the response mask's shape, in tokens."""
        return self._measures()[0]

    @property
    def fai(self) -> Tensor:
        """FAI of the measured batch, float32 of the response mask's shape."""
        return self._measures()[1]

    def gamma(
        self,
        entropy: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        response_mask: Tensor | None = None,
    ) -> Tensor:
        """The factors of the measured batch (eqs. 14 to 19), float32 of the response mask's shape, 1 outside of it.

        Args:
            entropy: of each token's distribution, in nats, of the same shape: read by `mode="entropy"`, and by
                :meth:`statistics` in every mode.
            generator: for `mode="random"`.
            response_mask: the tokens that get credit, where they are known better than when the batch was measured:
                without those that a tool wrote. Of the same shape.

        Raises:
            RuntimeError: no batch was measured.
            TypeError, ValueError: as :func:`rhythm_kernels.rhythm_credit`.
        """
        batch, started = self._measured(), time.perf_counter()
        if response_mask is not None:
            if not same_shape(check_tensor("response_mask", response_mask).shape, batch.mask.shape):
                wanted, found = tuple(batch.mask.shape), tuple(response_mask.shape)
                raise ValueError(f"response_mask must be of shape {wanted} like that of measuring, got {found}")
            batch.mask = response_mask
        if batch.measures is None:  # in modes that read neither
            waad = fai = torch.zeros(batch.mask.shape, device=batch.mask.device)
        else:
            waad, fai = batch.measures
        batch.mask, batch.entropy = batch.mask.to(waad.device), entropy
        options = self.settings.credit_options()
        batch.gamma = rhythm_credit(waad, fai, batch.mask, entropy=entropy, generator=generator, **options)
        batch.credit_seconds = time.perf_counter() - started
        return batch.gamma

    def shape(self, advantages: Tensor, gamma: Tensor | None = None) -> Tensor:
        """The shaped advantages of eq. 13, of the signs that `settings.sign` names: `(B, T)`, detached.

        Args:
            advantages: `(B,)`, one a response, or `(B, T)`.
            gamma: of an earlier batch, which a trainer kept beside its advantages; None: that of the measured batch.
        """
        if gamma is None:
            gamma = self._measured().gamma
        return shape_advantages(advantages, self.gamma() if gamma is None else gamma, self.settings.sign)

    def statistics(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """What a log should show of the latest gamma, over the response tokens. The host waits for the device.

        ===================== ========================================================================================
        gamma_mean            mean gamma
        boosted_share         share of tokens whose gamma is not 1
        waad_mean, fai_mean   mean measures; where attention was read
        certain_share         share of near-certain tokens (entropy below 0.05 nats); where there are entropies, as are
                              the two below, which say whether credit falls where it can change anything
        bonus_certain_share   share of the bonus, the sum of |gamma - 1|, that near-certain tokens get
        bonus_entropy_ratio   entropy weighted by the bonus, over the mean entropy: above 1, credit seeks open choices
        seconds               time spent on measuring and credit, of this process; where attention was read
        ===================== ========================================================================================

        Args:
            reduce: sums a float32 vector over the processes that share a batch, which then all must call this:
                `lambda sums: accelerator.reduce(sums, "sum")`, for example.

        Raises:
            RuntimeError: no gamma was made of the measured batch.
        """
        batch = self._measured()
        if batch.gamma is None:
            raise RuntimeError("there is no gamma yet: call gamma() or shape(advantages) before statistics()")
        mask, gamma = batch.mask, batch.gamma
        of_tokens = {"gamma_mean": gamma, "boosted_share": gamma != 1}
        of_bonus: dict[str, Tensor] = {}
        if batch.measures is not None:
            of_tokens |= dict(zip(("waad_mean", "fai_mean"), batch.measures))
        if batch.entropy is not None:
            entropy = batch.entropy.detach().where(mask != 0, 0.0).float()
            of_tokens |= {"certain_share": entropy < NEAR_CERTAIN, "entropy": entropy}
            of_bonus = {"bonus_certain_share": entropy < NEAR_CERTAIN, "bonus_entropy": entropy}
        bonus = (gamma - 1).abs()
        summed = [mask, bonus, *of_tokens.values(), *(bonus * x for x in of_bonus.values())]
        sums = reduce(torch.stack([(x * mask).sum().float() for x in summed])).tolist()
        tokens, bonuses = max(sums[0], 1), sums[1]
        found = {name: total / tokens for name, total in zip(of_tokens, sums[2:])}
        if bonuses:
            found |= {name: total / bonuses for name, total in zip(of_bonus, sums[2 + len(of_tokens) :])}
        mean, weighted = found.pop("entropy", 0.0), found.pop("bonus_entropy", 0.0)
        if mean and bonuses:
            found["bonus_entropy_ratio"] = weighted / mean
        if batch.probe is not None:
            found["seconds"] = batch.probe.seconds() + batch.credit_seconds
        return found

    def save(self, folder: str | Path) -> None:
        """Write the groups in use, if any, and the step they were made at, to `rhythm_groups.json` in a folder.

        It is a file of :class:`rhythm_kernels.HeadGroups`, so `settings.groups` may name it too.
        """
        if self._groups is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            provenance = {**(self._groups.provenance or {}), "step": self._grouped_at}
            replace(self._groups, provenance=provenance).save(Path(folder) / GROUPS_FILE)

    def load(self, folder: str | Path) -> None:
        """Go on with what `save` wrote: the same groups, calibrated again when they would have been.

        Nothing is read in modes that read no attention.

        Raises:
            OSError, ValueError: no such file, not one of head groups, or groups that do not fit the model.
        """
        if self.settings.reads_attention:
            self.groups = groups = HeadGroups.load(Path(folder) / GROUPS_FILE)
            self._grouped_at = (groups.provenance or {}).get("step", 0)

    def _measured(self) -> _Batch:
        if self._batch is None:
            raise RuntimeError("there is no measured batch: make its forwards inside `with credit.measuring(mask)`")
        return self._batch

    def _measures(self) -> tuple[Tensor, Tensor]:
        measures = self._measured().measures
        if measures is None:
            raise RuntimeError(f"mode {self.settings.mode!r} reads no attention: it has neither WAAD nor FAI")
        return measures
