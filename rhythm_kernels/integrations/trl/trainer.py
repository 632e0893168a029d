"""TRL's GRPO with rhythm credit: a mixin that measures the passes which a trainer makes anyway.

    class Mine(RhythmMixin, TheirGRPOTrainer):
        pass

Where the trainer computes the old log-probs, they are measured there; where it does not, the training forward is the
behaviour policy itself and is measured. Either way gamma of eq. 19 stands in `inputs["rhythm_gamma"]`, `(B, T)`
float32, and the advantages that the loss reads are shaped by it. Nothing of the trainer's loss is copied.
"""

from __future__ import annotations

from typing import Any

import trl
from torch import Tensor
from transformers import TrainingArguments
from trl import GRPOTrainer

from ...heads import HeadGroups
from ...measured_credit import RhythmCredit
from ...settings import RhythmSettings
from ..announce import announce
from ..environment import settings_from_environment
from .config import RhythmGRPOConfig, settings_of
from .credit import TrainerCredit
from .inputs import keeps_old_log_probs
from .loss import EveryStepHasCredit
from .passes import LogProbPasses
from .refusals import refuse_arguments, refuse_class
from .resume import ResumeMixin

__all__ = ["RhythmGRPOTrainer", "RhythmMixin"]


class RhythmMixin(ResumeMixin):
    """Token advantages that follow the rhythm of attention (arXiv 2510.13554v2), for any subclass of `GRPOTrainer`.

    It stands before the trainer among the bases; what extends the trainer may stand on either side of it, and takes
    what it always took. The settings are those of its configuration, where that extends `RhythmFields`, as
    `RhythmGRPOConfig` does; else `rhythm`; else the environment variable `RHYTHM_CREDIT`. A loss of the trainer's own
    takes its log-probs from `_get_per_token_logps_and_entropies`, and its `inputs["advantages"]` are `(B, T)`.

    `rhythm` is then the trainer's `RhythmCredit`, and `rhythm_groups` the head groups in use (None before the first
    batch). They are saved with each checkpoint and read back on resuming, as is what TRL's own checkpoints lack
    (`resume.py`), so that a resumed run is the same run, but for later passes over an `IterableDataset` and for
    `dataloader_persistent_workers`.

    Raises:
        TypeError: when a class is made: for a trainer that stands before the mixin, is no `GRPOTrainer`, or cannot
            honour token advantages (`refusals.py` names them); at construction: for settings that are nowhere.
        ValueError: at construction, for a model without softmax attention, groups that do not fit it, sequence-level
            importance sampling that credit cannot pass (`refuse_blind_credit`), and `use_liger_kernel` in TRL versions
            whose Liger loss reads one advantage a sequence.
        RuntimeError: in the first step whose loss is seen to ignore the credit.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_class(cls, RhythmMixin)

    def __init__(self, *args: Any, rhythm: RhythmSettings | None = None, **kwargs: Any) -> None:
        refuse_class(type(self), RhythmMixin, made=True)
        configuration = next((x for x in (*args, *kwargs.values()) if isinstance(x, TrainingArguments)), None)
        settings, source = settings_of(configuration, rhythm)
        if configuration is not None:
            refuse_arguments(configuration, settings)  # before a model is loaded
        super().__init__(*args, **kwargs)
        refuse_arguments(self.args, settings)  # as the trainer made or left them
        self.rhythm = RhythmCredit(self.model, settings)
        plain = super()._get_per_token_logps_and_entropies
        self._rhythm = TrainerCredit(LogProbPasses(self, plain))
        self.add_callback(EveryStepHasCredit(self, lambda: self._rhythm.losses))
        if self.accelerator.is_main_process:
            where = "the old-log-prob pass" if keeps_old_log_probs(self) else "the training forward"
            announce(f"{type(self).__name__} (TRL {trl.__version__}; settings from {source})", settings, where)

    @property
    def rhythm_groups(self) -> HeadGroups | None:
        return self.rhythm.groups

    @rhythm_groups.setter
    def rhythm_groups(self, groups: HeadGroups) -> None:
        self.rhythm.groups = groups

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        return self._rhythm.generation(super()._generate_and_score_completions, inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        return self._rhythm.loss(super()._compute_loss, model, inputs)

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return self._rhythm.log_probs(model, *args, **kwargs)


class RhythmGRPOTrainer(RhythmMixin, GRPOTrainer):
    """Drop-in `GRPOTrainer` with rhythm credit: takes what that takes, with a `RhythmGRPOConfig` as `args`.

    More is at :class:`RhythmMixin`. Without `args` it takes TRL's defaults, and those of credit where neither `rhythm`
    nor `RHYTHM_CREDIT` says others.
    """

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        if args is None and kwargs.get("rhythm") is None and settings_from_environment() is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            args = RhythmGRPOConfig(f"{name.split('/')[-1] or 'model'}-RhythmGRPO")
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
