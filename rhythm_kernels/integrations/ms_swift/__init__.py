"""Rhythm credit for ms-swift's GRPO. Importing this module turns it on, from a file that `--external_plugins` names.

    echo "import rhythm_kernels.integrations.ms_swift" > rhythm.py
    RHYTHM_CREDIT="mode=coupled,gamma_amp=1.5" swift rlhf --rlhf_type grpo --external_plugins rhythm.py ...

The settings are those of :class:`rhythm_kernels.RhythmSettings`, spelled in the environment variable `RHYTHM_CREDIT`
(:mod:`rhythm_kernels.integrations.environment`); set and empty, it means their defaults.
"""

from __future__ import annotations

import sys
from typing import Any

if not __name__.startswith("rhythm_kernels."):  # ms-swift imports a plug-in under a name of its own
    raise ImportError(
        "external_plugins must name a file of yours that holds 'import rhythm_kernels.integrations.ms_swift', got the "
        "file of that module: under the name that ms-swift gives it, it is another module"
    )
if "swift.megatron" in sys.modules:
    raise ImportError("rhythm credit must be used with 'swift rlhf', got Megatron-SWIFT: its trainers are others")

from swift.trainers import TrainerFactory

from .refusals import settings_of_run
from .trainer import RhythmGRPOTrainer

__all__ = ["RhythmGRPOTrainer", "register"]

_chosen = TrainerFactory.get_cls  # ms-swift's choice, by a run's arguments, out of one of its tables


def register() -> None:
    """Have `--rlhf_type grpo` mean `RhythmGRPOTrainer`, and every run of `swift rlhf` without it an error.

    A trainer that another plug-in registered, before or after, is left: it gives credit where it extends ours.
    """
    if TrainerFactory.TRAINER_MAPPING["grpo"].startswith("swift."):
        TrainerFactory.TRAINER_MAPPING["grpo"] = f"{RhythmGRPOTrainer.__module__}.{RhythmGRPOTrainer.__qualname__}"
    TrainerFactory.get_cls = staticmethod(_choose)


def _choose(args: Any, mapping: dict[str, str]) -> type:
    """As ms-swift does, first for the class of its configuration: after all plug-ins, before a model is loaded.

    Raises:
        ValueError: for a run of `swift rlhf` that would have no credit; for a wrong `RHYTHM_CREDIT`, or none.
    """
    kind = getattr(args, "rlhf_type", None)
    if kind == "grpo":
        settings_of_run()
        trainer = _chosen(args, TrainerFactory.TRAINER_MAPPING)
        if not issubclass(trainer, RhythmGRPOTrainer):
            raise ValueError(
                f"external_plugins must register no GRPO trainer beside rhythm credit's, got {trainer.__name__}: let "
                "it extend rhythm_kernels.integrations.ms_swift.RhythmGRPOTrainer"
            )
    elif kind is not None:
        raise ValueError(
            f"rlhf_type must be 'grpo' for rhythm credit, got {kind!r}: leave rhythm_kernels.integrations.ms_swift out "
            "of --external_plugins"
        )
    return _chosen(args, mapping)


register()
