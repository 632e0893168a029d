"""`RhythmCredit`: the credit of a trainer's batches, from the forwards that it makes anyway to shaped advantages.

This is what every trainer's adapter is made of; it knows no trainer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .arguments import check_int, check_tensor, readable, same_shape
from .credit import rhythm_credit, shape_advantages
from .heads import HeadGroups
from .packed_credit import bounds_of, sequence_by_sequence
from .probe.calibration import NoResponseError, evaluating, head_groups, inputs_of
from .probe.checks import on_device
from .probe.split_batch import BatchCalibration, BatchProbe, check_response_mask, over_tokens
from .probe.structure import attention_layers, find_decoder
from .settings import RhythmSettings

__all__ = ["GROUPS_FILE", "NEAR_CERTAIN", "RhythmCredit"]

GROUPS_FILE = "rhythm_groups.json"
# Nats of entropy below which a token counts as near-certain: the likeliest token has a probability of 0.99 or so, and a
# factor on its advantage changes next to nothing.
NEAR_CERTAIN = 0.05
_NO_CREDIT = {"gamma_mean": 1.0, "boosted_share": 0.0}  # the statistics of a batch without a token to credit


@dataclass
class _Batch:
    """The measured batch, and what was made of it so far."""

    settings: RhythmSettings  # as they were when it was measured
    mask: Tensor
    step: int  # the latest that was asked about
    probe: BatchProbe | None = None
    measures: tuple[Tensor, Tensor] | None = None
    packed: tuple[Tensor, int] | None = None  # as of `BatchProbe.packed_bounds`
    gamma: Tensor | None = None
    credited: Tensor | None = None  # bool, the tokens that gamma is of
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

    The measured forwards must be those of the policy that wrote the responses: those for the old log-probs, or the
    first training forward where there are none. In modes that read no attention (`uniform`, `random`, `entropy`)
    nothing is calibrated or measured, and a trainer's code need not change; `entropy` and `random` take what they
    choose by in :meth:`gamma` or :meth:`shape`. Of several processes each measures its own part of the batch: hand
    :meth:`calibrating` and :meth:`statistics` what sums over them; or send the `groups` of one to all after a
    calibration.

    A batch without a response token (all responses cut off and masked, say) stops nothing: its gamma is 1, whether or
    not there are groups, and a calibration on it leaves the groups as they are, so that the next batch is asked for.

    Args:
        model: the policy alone, without a critic; else as for :class:`rhythm_kernels.RhythmProbe`. The attribute may
            be set anew where a trainer wraps it.
        settings: a :class:`rhythm_kernels.RhythmSettings`; its defaults where None. The attribute may be set anew, for
            the batches that are measured from then on.

    Raises:
        TypeError, ValueError: at construction, for settings that do not fit the model: layers that cannot be measured,
            groups of another architecture, a file that holds none.
    """

    def __init__(self, model: nn.Module, settings: RhythmSettings | None = None) -> None:
        self.model = model
        self._settings: RhythmSettings | None = None
        self._groups: HeadGroups | None = None
        self._step = 0
        self._grouped_at: int | None = 0  # None: before the next step that is asked about
        self._batch: _Batch | None = None
        self.settings = RhythmSettings() if settings is None else settings

    @property
    def settings(self) -> RhythmSettings:
        """The settings of the next batch."""
        assert self._settings is not None
        return self._settings

    @settings.setter
    def settings(self, settings: RhythmSettings) -> None:
        if not isinstance(settings, RhythmSettings):
            raise TypeError(f"settings must be a RhythmSettings, got {type(settings).__name__}")
        before = self._settings
        if settings != before and settings.reads_attention:
            attention_layers(find_decoder(self.model), settings.layers)  # raises for a wrong choice
            known = self._groups is not None and before is not None and settings.groups == before.groups
            if settings.groups is not None and not known:
                self.groups = cast(HeadGroups, settings.load_groups())
        self._settings = settings

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
        """Whether to calibrate before this step of training: while there are no groups, and every `regroup_steps`.

        Groups that are made or set count from the step of the latest such question. A question about another step
        also ends the measured batch: :meth:`shape` then needs a batch that is measured after it, or a gamma.
        """
        self._step = check_int("step", step, 0)
        if self._grouped_at is None:
            self._grouped_at = self._step
        every = self.settings.regroup_steps
        return self.settings.reads_attention and (self._groups is None or 0 < every <= self._step - self._grouped_at)

    def calibrate(self, batches: Iterable[Mapping[str, Any]]) -> HeadGroups | None:
        """Tell local from global heads by forwards over some batches; see :func:`rhythm_kernels.head_groups`.

        A `response_mask` among the inputs of a batch may be that of the responses alone, as in :meth:`measuring`.
        Nothing is done in modes that read no attention.

        Returns:
            The groups in use; None in such a mode, and where no batch so far had a response token.
        """
        if self.settings.reads_attention:
            layers, quantile = self.settings.layers, self.settings.head_quantile
            with suppress(NoResponseError):
                self.groups = head_groups(self.model, map(_with_whole_mask, inputs_of(batches)), layers, quantile)
        return self._groups

    @contextmanager
    def calibrating(
        self, response_mask: Tensor, reduce: Callable[[Tensor], Tensor | None] | None = None
    ) -> Iterator[None]:
        """The same by forwards that the caller makes in this block, over one batch, without gradients or dropout.

        Args:
            response_mask: as for :meth:`measuring`.
            reduce: sums a float64 vector over the processes that share a batch, all of which then must calibrate, and
                returns it or works in place: the groups are then those of the whole batch, the same everywhere.

        Raises:
            RuntimeError: the forwards did not cover the batch.
        """
        if not self.settings.reads_attention:
            yield
            return
        layers, quantile = self.settings.layers, self.settings.head_quantile
        calibration = BatchCalibration(self.model, layers, quantile, response_mask)
        with evaluating(self.model), calibration:
            yield
        if reduce is not None:
            calibration.add_up(reduce)
        with suppress(NoResponseError):
            self.groups = calibration.groups()

    @contextmanager
    def measuring(self, response_mask: Tensor) -> Iterator[None]:
        """Measure the model's forwards inside this block, which are made as they always are, gradients included.

        One forward, or several that take the batch rows in order, and no others. They may be of different lengths where
        the mask is `(B, C)`, as long as each ends where the batch does.

        Args:
            response_mask: `(B, T)`, bool or 0/1, of all tokens of the batch; or `(B, C)` of the last C tokens of each
                batch row, as trainers keep responses, and so is everything that is made of it. `(1, total)` of packed
                sequences, each of which is then a response of its own.

        Raises:
            RuntimeError: no groups yet; forwards that did not cover the batch (at the end of the block), which is what
                happens where none of them went through `model`.
            TypeError, ValueError: a mask of another type or shape, and whatever a probe refuses. What cannot be told on
                a GPU without waiting for it is raised by :meth:`statistics`, or by the next block; gamma is 1 there.
        """
        before, self._batch = self._batch, None
        if before is not None and before.probe is not None:
            before.probe.examine()
        batch = _Batch(self.settings, check_response_mask(response_mask), self._step)
        if not self.settings.reads_attention:
            yield
        elif self._groups is None and not bool(batch.mask.any()):
            yield
            nothing = torch.zeros(batch.mask.shape, device=batch.mask.device)
            batch.measures = (nothing, nothing)
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
            batch.measures, batch.packed = batch.probe.measures(), batch.probe.packed_bounds()
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
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The factors of the measured batch (eqs. 14 to 19), float32 of the response mask's shape, 1 outside of it.

        Only the latest batch is held: a trainer that buffers several keeps their gammas, which may be cut and shuffled
        along the batch, and hands each to :meth:`shape`.

        Args:
            entropy: of each token's distribution, in nats, of the same shape: read by `mode="entropy"`, and by
                :meth:`statistics` in every mode.
            generator: for `mode="random"`; torch's default one where None.
            response_mask: the tokens that get credit, where they are known better than when the batch was measured:
                without those that a tool wrote. Of the same shape, and True nowhere else.
            cu_seqlens: `(S + 1,)` int, where packed sequences begin and end in the flattened batch. A measured forward
                tells it by itself; modes that read no attention must be told.

        Raises:
            RuntimeError: no batch was measured.
            TypeError, ValueError: as :func:`rhythm_kernels.rhythm_credit`.
        """
        batch, started = self._measured(), time.perf_counter()
        if batch.measures is not None:
            waad, fai = batch.measures
        else:  # in modes that read neither
            device = batch.mask.device if entropy is None else entropy.device
            waad = fai = torch.zeros(batch.mask.shape, device=device)
        measured = on_device(batch.mask, waad.device)
        mask = measured if response_mask is None else self._better_known(measured, response_mask)
        if entropy is not None:
            entropy = check_tensor("entropy", entropy).detach()  # not the graph that it came from
            if not same_shape(entropy.shape, mask.shape):
                wanted, found = tuple(mask.shape), tuple(entropy.shape)
                raise ValueError(f"entropy must have the shape of the response mask, {wanted}, got {found}")
        packed = batch.packed if cu_seqlens is None else bounds_of(cu_seqlens, mask.numel())
        options = batch.settings.credit_options()
        credit: Callable[..., Tensor] = partial(rhythm_credit, generator=generator, **options)
        if packed is None:
            batch.gamma = credit(waad, fai, mask, entropy=entropy)
        else:
            batch.gamma = sequence_by_sequence(credit, waad, fai, mask, entropy, *packed)
        batch.credited, batch.entropy = mask, entropy
        batch.credit_seconds = time.perf_counter() - started
        return batch.gamma

    def _better_known(self, measured: Tensor, response_mask: Tensor) -> Tensor:
        """A response mask as bool beside the `measured` one, of which it must be a part."""
        if not same_shape(check_tensor("response_mask", response_mask).shape, measured.shape):
            wanted, found = tuple(measured.shape), tuple(response_mask.shape)
            raise ValueError(f"response_mask must be of shape {wanted} like that of measuring, got {found}")
        mask = on_device(response_mask, measured.device)
        if readable(mask) and (places := int((mask & ~measured).sum())):
            raise ValueError(f"response_mask must be True only where that of measuring is, got {places} other places")
        return mask

    def shape(
        self,
        advantages: Tensor,
        gamma: Tensor | None = None,
        *,
        entropy: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The shaped advantages of eq. 13, of the signs that `settings.sign` names: `(B, T)`, detached.

        Args:
            advantages: `(B,)`, one a response, or `(B, T)`.
            gamma: of an earlier batch, which a trainer kept beside its advantages; None: that of the measured batch.
            entropy, generator: as for :meth:`gamma`, which is called with them, or where it was not yet.
        """
        if gamma is None:
            gamma = self._measured().gamma
            if gamma is None or entropy is not None or generator is not None:
                gamma = self.gamma(entropy, generator)
        return shape_advantages(advantages, gamma, self.settings.sign)

    def statistics(self, reduce: Callable[[Tensor], Tensor | None] | None = None) -> dict[str, float]:
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
            reduce: sums a float32 vector over the processes that share a batch, all of which then must call this, and
                returns it or works in place: `torch.distributed.all_reduce`, for example.

        Raises:
            RuntimeError: no gamma was made of the measured batch.
            ValueError: something of the batch could not be measured, which only now is known (on a GPU).
        """
        batch = self._measured()
        if batch.gamma is None or batch.credited is None:
            raise RuntimeError("there is no gamma yet: call gamma() or shape(advantages) before statistics()")
        if batch.probe is not None:
            batch.probe.examine(wait=True)
        mask, gamma = batch.credited, batch.gamma
        of_tokens = {"gamma_mean": gamma, "boosted_share": gamma != 1}
        of_bonus: dict[str, Tensor] = {}
        if batch.measures is not None:
            of_tokens |= dict(zip(("waad_mean", "fai_mean"), batch.measures))
        if batch.entropy is not None:
            entropy = batch.entropy.where(mask, 0.0).float()
            of_tokens |= {"certain_share": entropy < NEAR_CERTAIN, "entropy": entropy}
            of_bonus = {"bonus_certain_share": entropy < NEAR_CERTAIN, "bonus_entropy": entropy}
        bonus = (gamma - 1).abs()
        summed = [mask, bonus, *of_tokens.values(), *(bonus * x for x in of_bonus.values())]
        local = torch.stack([(x * mask).sum().float() for x in summed])
        reduced = None if reduce is None else reduce(local)
        sums = (local if reduced is None else reduced).tolist()
        tokens, bonuses = sums[:2]
        found = dict(_NO_CREDIT)
        if tokens:
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
            step = (groups.provenance or {}).get("step")
            self._grouped_at = step if isinstance(step, int) else None

    def _measured(self) -> _Batch:
        if self._batch is None:
            raise RuntimeError("there is no measured batch: make its forwards inside `with credit.measuring(mask)`")
        if self._batch.step != self._step:
            raise RuntimeError(
                f"the measured batch is of step {self._batch.step}, not of step {self._step}: measure the batch of "
                "each step, or keep gamma() of an earlier one and hand it to shape(advantages, gamma)"
            )
        return self._batch

    def _measures(self) -> tuple[Tensor, Tensor]:
        measures = self._measured().measures
        if measures is None:
            raise RuntimeError(f"mode {self.settings.mode!r} reads no attention: it has neither WAAD nor FAI")
        return measures


def _with_whole_mask(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch for :func:`head_groups`: its `response_mask` over all tokens where it was over the last ones."""
    mask, tokens = batch.get("response_mask"), batch.get("input_ids", batch.get("inputs_embeds"))
    if not (isinstance(mask, Tensor) and isinstance(tokens, Tensor) and mask.dim() == 2):
        return batch
    return {**batch, "response_mask": over_tokens(mask, tokens.shape[1])}
