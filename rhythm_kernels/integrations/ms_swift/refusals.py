"""What ms-swift's GRPO can do and rhythm credit cannot honour: refused by the name of the argument, before a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...settings import RhythmSettings
from ..environment import VARIABLE, settings_from_environment

__all__ = ["refuse", "settings_of_run"]

_ONE_POLICY = "credit is measured of the policy that wrote the responses, by the one pass over them that it makes"
_TEACHER = "a teacher makes token advantages of its own there, which credit was never tried with"

# Of each argument the values that credit works with, and why it does not with others.
_ARGUMENTS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "use_liger_kernel": ((False, None), "Liger's loss reads one advantage a response, the mean of its tokens'"),
    "async_generate": ((False,), f"responses of older weights; {_ONE_POLICY}"),
    "advantage_reweight": ((None,), _TEACHER),
    "sdar_loss_coef": ((0.0,), _TEACHER),
}
# What the command line calls the teachers, and what the trainer is handed of them.
_TEACHERS = {
    "teacher_model": "teacher_model",
    "teacher_model_server": "teacher_model_server",
    "teacher_use_disable_adapter": "teacher_model",
}


def settings_of_run() -> RhythmSettings:
    """Those of the environment, which must have them: where its name is misspelt, defaults would go unnoticed.

    Raises:
        ValueError: for a wrong `RHYTHM_CREDIT`, or none.
    """
    settings = settings_from_environment()
    if settings is None:
        raise ValueError(f"{VARIABLE} must be set for rhythm credit (empty means the defaults), got no such variable")
    return settings


def refuse(settings: RhythmSettings, args: Any, model: Any, template: Any, trainer: Mapping[str, Any]) -> None:
    """Raise for what ms-swift's trainer is made with and credit cannot honour.

    Args:
        settings: those of the credit.
        args: ms-swift's `GRPOConfig`.
        model: the policy as ms-swift loads it, with its `model_meta`.
        template: its template.
        trainer: all that the trainer is handed by name.

    Raises:
        ValueError: by the argument's name on the command line.
    """
    for name, (allowed, why) in _ARGUMENTS.items():
        value = getattr(args, name, allowed[0])  # a version without it has none of that
        if value not in allowed:
            raise ValueError(f"{name} must be {allowed[0]!r} for rhythm credit, got {value!r}: {why}")
    for keyword, name in _TEACHERS.items():
        if trainer.get(keyword):
            got = trainer[keyword] if isinstance(trainer[keyword], str) else "one"
            raise ValueError(f"{name} must be left out for rhythm credit, got {got}: {_TEACHER}")
    if template.sequence_parallel_size != 1:
        raise ValueError(
            f"sequence_parallel_size must be 1 for rhythm credit, got {template.sequence_parallel_size}: attention is "
            "measured where all tokens of a sequence are"
        )
    if model.model_meta.is_multimodal:
        raise ValueError(
            "model must be one of text alone for rhythm credit, got a multimodal one: ms-swift lays out its tokens in "
            "ways that credit was never tried with"
        )
    _refuse_blind_loss(settings, args.loss_type, args.importance_sampling_level)


def _refuse_blind_loss(settings: RhythmSettings, loss: str, level: str) -> None:
    """Raise where the loss would not see which tokens credit chose.

    REAL reads the mean advantage of a response. With one ratio for a response, a loss's gradient is that of the ratio
    times the sum of the advantages; CISPO multiplies each token's own log-probability at any level, and
    `sequence_token` gives each token a ratio with a gradient of its own.
    """
    if settings.mode == "uniform":
        return
    advice = "which tokens credit chose would change nothing. RHYTHM_CREDIT=mode=uniform trains without credit"
    if loss == "real":
        raise ValueError(
            f"loss_type must be another than 'real' for rhythm credit, got 'real': it reads the mean advantage of a "
            f"response, so {advice}"
        )
    if level == "sequence" and loss != "cispo":
        raise ValueError(
            f"importance_sampling_level must be 'token' or 'sequence_token' for rhythm credit with loss_type={loss!r}, "
            f"got 'sequence': all tokens of a response share one ratio, so {advice}"
        )
