"""What credit cannot be given in, refused by name: trainers, orders of bases, and settings of a trainer's own.

Every trainer of TRL 1.0.0 to 1.16.0 and of axolotl 0.21 that trains by `GRPOTrainer`'s methods was read for this. What
is not named here works, or is found at the first step (`loss.py`).
"""

from __future__ import annotations

from typing import Any

import trl
from packaging.version import Version
from transformers import Trainer
from trl import GRPOTrainer

from ...settings import RhythmSettings

__all__ = ["refuse_arguments", "refuse_blind_credit", "refuse_class"]

_ONE_RATIO = "its loss weighs a response by one ratio, in which the advantages of the tokens would count by their sum"
_ONE_ADVANTAGE = "its loss takes one advantage a response, and would mix those of tokens over the batch"
_ASYNCHRONOUS = "it packs responses of several policies, and reads their advantages before the forward"
_DIVIDED = "it divides a response over several processes, so that none of them sees its attention whole"
_FEATURES = "its rewards and its loss are not of tokens but of the features of a response"

# By the package that a class is of, so that a user's own class may have any name.
_REFUSED = {
    ("trl", "GMPOTrainer"): _ONE_RATIO,
    ("trl", "RLOOTrainer"): _ONE_RATIO,
    ("trl", "PAPOTrainer"): _ONE_ADVANTAGE,
    ("trl", "GRPOWithReplayBufferTrainer"): "it replays responses of earlier policies, whose attention nobody measured",
    ("trl", "MiniLLMTrainer"): "its advantages are a teacher's, and carry a gradient, which credit would cut",
    ("trl", "AsyncGRPOTrainer"): _ASYNCHRONOUS,
    ("trl", "PPOTrainer"): "its advantages come from a critic that it trains with the policy, not from GRPOTrainer",
    ("axolotl", "AxolotlAsyncGRPOTrainer"): _ASYNCHRONOUS,
    ("axolotl", "AsyncGRPOTrainer"): _ASYNCHRONOUS,
    ("axolotl", "AxolotlGRPOContextParallelTrainer"): _DIVIDED,
    ("axolotl", "AxolotlGRPOSequenceParallelTrainer"): _DIVIDED,
    ("axolotl", "AxolotlEBFTTrainer"): _FEATURES,
}
_NO_GRPO = "credit is given in the passes that GRPOTrainer makes"

# Losses of TRL in which a token's advantage multiplies that token's own log-probability, whatever the ratio's level.
_TOKENWISE_LOSSES = ("cispo", "vespo")
# `sequence_token` is GSPO-token's: its value is a response's ratio, its gradient a token's.
_TOKEN_LEVELS = ("token", "sequence_token")


def refuse_class(cls: type, mixin: type, made: bool = False) -> None:
    """Raise where `mixin` among the bases of `cls` would change nothing, or cannot be honoured.

    Args:
        made: whether the class is complete, as something is made of it; before, it may be part of another.

    Raises:
        TypeError: for a trainer that is refused by name, one that is no `GRPOTrainer`, and one that stands before
            `mixin`, whose methods would never run.
    """
    bases = cls.__mro__
    for base in bases:
        if reason := _reason(base):
            raise TypeError(f"the trainer of {cls.__name__} must heed token advantages, got {base.__name__}: {reason}")
    if GRPOTrainer in bases:
        if bases.index(GRPOTrainer) < bases.index(mixin):
            raise TypeError(
                f"the bases of {cls.__name__} must name {mixin.__name__} before any GRPOTrainer, got "
                f"({', '.join(base.__name__ for base in cls.__bases__)}): its methods would hide those of the credit"
            )
    elif made or issubclass(cls, Trainer):
        trainer = next((base.__name__ for base in bases[1:] if issubclass(base, Trainer)), "none")
        raise TypeError(f"the trainer of {cls.__name__} must be a GRPOTrainer, got {trainer}: {_NO_GRPO}")


def _reason(trainer: type) -> str | None:
    """Why this trainer cannot honour credit, if it is one of those that cannot."""
    if trainer.__module__ == "trl.experimental.gspo_token.grpo_trainer" and Version(trl.__version__) < Version("1.7"):
        return f"before TRL 1.7 {_ONE_ADVANTAGE}"
    return _REFUSED.get((trainer.__module__.split(".")[0], trainer.__name__))


def refuse_arguments(args: Any, settings: RhythmSettings) -> None:
    """Raise where a trainer's configuration asks for a loss that would not see the credit.

    Raises:
        ValueError: for ratios of whole responses (:func:`refuse_blind_credit`), `use_liger_kernel` in versions of TRL
            whose Liger loss reads one advantage a response, DPPO's divergences over the top tokens, and axolotl's
            `async_prefetch`, `use_data_producer` and `context_parallel_size`.
    """
    if getattr(args, "use_liger_kernel", False) and hasattr(GRPOTrainer, "compute_liger_loss"):
        raise ValueError(
            "use_liger_kernel must be False in this version of TRL, got True: its Liger loss reads one advantage a "
            "sequence and would ignore the credit"
        )
    divergence = getattr(args, "divergence_type", "")
    if divergence.startswith("topk_"):
        raise ValueError(
            f"divergence_type must be 'binary_tv' or 'binary_kl', got {divergence!r}: DPPO makes a forward of its own "
            "for the others, which is not measured"
        )
    for name in ("async_prefetch", "use_data_producer"):
        if getattr(args, name, False):
            raise ValueError(f"{name} must be False, got True: {_ASYNCHRONOUS}")
    if (parts := getattr(args, "context_parallel_size", None) or 1) > 1:
        raise ValueError(f"context_parallel_size must be 1, got {parts}: no process would see a response whole")
    refuse_blind_credit(args, settings)


def refuse_blind_credit(args: Any, settings: RhythmSettings) -> None:
    """Raise where the loss would not see which tokens the credit chose.

    With one ratio for a whole response, its gradient is that of the ratio times the sum of the advantages. Losses that
    multiply each token's own log-probability keep the tokens apart at either level.
    """
    level, loss = args.importance_sampling_level, args.loss_type
    if settings.mode == "uniform" or level in _TOKEN_LEVELS or loss in _TOKENWISE_LOSSES:
        return
    raise ValueError(
        f"importance_sampling_level must be 'token' for rhythm_mode={settings.mode!r} with loss_type={loss!r}, "
        f"got {level!r}: there all tokens of a response share one ratio, and credit would vanish into its mean "
        "over the response: which tokens it chose would change nothing. Or set loss_type to one of "
        f"{', '.join(map(repr, _TOKENWISE_LOSSES))}, or rhythm_mode to 'uniform'"
    )
