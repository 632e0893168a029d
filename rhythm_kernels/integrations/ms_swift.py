"""Rhythm credit for ms-swift's GRPO. Importing this module turns it on, from a file that `--external_plugins` names.

    echo "import rhythm_kernels.integrations.ms_swift" > rhythm.py
    RHYTHM_CREDIT="mode=coupled,gamma_amp=1.5" swift rlhf --rlhf_type grpo --external_plugins rhythm.py ...

The settings are those of :class:`rhythm_kernels.RhythmSettings`, spelled in the environment variable `RHYTHM_CREDIT`
(:mod:`rhythm_kernels.integrations.environment`) or left at their defaults.
"""

from __future__ import annotations

import sys

if not __package__:  # ms-swift imports a plug-in under a name of its own, with its folder first on sys.path
    raise ImportError(
        "external_plugins must name a file of yours that holds 'import rhythm_kernels.integrations.ms_swift', got the "
        "file of that module: those beside it would hide packages of the same names"
    )
if "swift.megatron" in sys.modules:
    raise ImportError("rhythm credit must be used with 'swift rlhf', got Megatron-SWIFT: its trainers are others")

from swift.trainers import TrainerFactory

from .environment import settings_from_environment
from .ms_swift_refusals import NoCredit
from .ms_swift_trainer import RhythmGRPOTrainer

__all__ = ["RhythmGRPOTrainer", "register"]

_OWN = "swift.rlhf_trainers."  # where ms-swift's own trainers are


def register() -> None:
    """Have `--rlhf_type grpo` mean `RhythmGRPOTrainer`, and any other type an error: none of them gives credit.

    Raises:
        ValueError: for a wrong `RHYTHM_CREDIT`, before a model is loaded; for another plug-in's GRPO trainer.
    """
    settings_from_environment()
    mapping, ours = TrainerFactory.TRAINER_MAPPING, _path(RhythmGRPOTrainer)
    if mapping["grpo"] != ours and not mapping["grpo"].startswith(_OWN):
        raise ValueError(
            f"external_plugins must hold one GRPO trainer, got {mapping['grpo']} before rhythm credit: let it extend "
            "rhythm_kernels.integrations.ms_swift.RhythmGRPOTrainer, and import that module first"
        )
    for kind, path in mapping.items():
        if path.startswith(_OWN):
            mapping[kind] = _path(NoCredit)
    mapping["grpo"] = ours


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


register()
