"""axolotl's GRPO with rhythm credit: in its YAML, `trainer_cls` names the class below.

    rl: grpo
    trainer_cls: rhythm_kernels.integrations.axolotl.RhythmAxolotlGRPOTrainer

Its YAML knows no settings of credit, so the environment variable `RHYTHM_CREDIT` has them, whatever starts the run:
`RHYTHM_CREDIT="mode=coupled,gamma_amp=1.5" axolotl train config.yaml`. Set and empty, it means the defaults.
"""

from __future__ import annotations

from axolotl.core.trainers.grpo.trainer import AxolotlGRPOTrainer

from .trl import RhythmMixin

__all__ = ["RhythmAxolotlGRPOTrainer"]


class RhythmAxolotlGRPOTrainer(RhythmMixin, AxolotlGRPOTrainer):
    """The trainer that axolotl takes for `rl: grpo`, with :class:`rhythm_kernels.integrations.trl.RhythmMixin`.

    Not with `trl.async_prefetch`, `trl.use_data_producer` or `context_parallel_size`, which are for axolotl's other
    trainers: refused by these names, as those trainers are by theirs.
    """
