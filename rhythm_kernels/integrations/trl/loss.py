"""One call of a trainer's loss: what it reads, what it is made of, and whether credit reached it.

Whose loss it is does not matter: TRL's, or that of a class between TRL and `RhythmMixin`. It reads its inputs as it
always did, but for the advantages, which are shaped. A loss that does not see their shape fails here, at the first
batch that can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from ..reach import credit_is_seen
from .inputs import row_marks

__all__ = [
    "EveryStepHasCredit",
    "LossInputs",
    "check_that_credit_is_seen",
    "check_that_rows_have_their_gamma",
]

_LOSSES = ("_compute_loss", "compute_loss", "training_step")


class LossInputs(MutableMapping[str, Any]):
    """Inputs of a loss, with shaped advantages: they are made when they are first asked for.

    Everything else is read from the inputs, and written to them, as without credit. Advantages that a loss writes stay
    here: those of the inputs are of the next iteration too.
    """

    def __init__(self, inputs: dict[str, Any], shaped: Callable[[], Tensor]) -> None:
        self.inputs = inputs
        self._shaped = shaped
        self._advantages: Any = None
        self.log_probs: Tensor | None = None  # that the loss is made of, with gradients

    def __getitem__(self, name: str) -> Any:
        if name != "advantages":
            return self.inputs[name]
        if self._advantages is None:
            self._advantages = self._shaped()
        return self._advantages

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "advantages":
            self._advantages = value
        else:
            self.inputs[name] = value

    def __delitem__(self, name: str) -> None:
        del self.inputs[name]

    def __contains__(self, name: object) -> bool:
        return name in self.inputs

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def copy(self) -> dict[str, Any]:
        """A plain dict, as of a plain dict."""
        return dict(self)


def check_that_rows_have_their_gamma(inputs: Mapping[str, Any]) -> None:
    """Raise where rows of a batch were moved after its gamma was made, and gamma was not moved with them."""
    if "rhythm_rows" not in inputs:
        return
    marks, now = inputs["rhythm_rows"], row_marks(inputs)
    if len(marks) != len(now) or bool(((marks != now).any(1) & (marks[:, 1] == now[:, 1])).any()):
        raise RuntimeError(
            'inputs["rhythm_gamma"] are of other responses than inputs["completion_ids"]: let what reorders, drops or '
            "replaces responses do the same to rhythm_gamma and rhythm_rows"
        )


def check_that_credit_is_seen(trainer: Any, loss: Tensor, read: LossInputs, mask: Tensor) -> bool:
    """Whether a loss told apart the tokens that credit chose; False where this batch cannot say.

    Raises:
        RuntimeError: it does not, or it is made of a forward that nobody measured.
    """
    if read.log_probs is not None:
        shaped = trainer.rhythm.shape(read.inputs["advantages"], read.inputs["rhythm_gamma"])
        reference = read.inputs.get("ref_per_token_logps")
        if reference is not None:  # tokens that the KL term pulls harder than their advantage say nothing of that
            away = (reference - read.log_probs.detach()).exp()
            mask = mask.bool() & (trainer.beta * (away - 1).abs() < 0.1 * shaped.abs())
        try:
            return credit_is_seen(loss, read.log_probs, shaped, mask)
        except RuntimeError as error:
            raise RuntimeError(f"rhythm credit does not reach {_whose(trainer)}: {error}") from error
    # A loss may leave out a batch: then it is zero.
    if loss.requires_grad and mask.any() and read.inputs["advantages"].any() and loss.detach().ne(0).any():
        raise RuntimeError(
            f"rhythm credit cannot be seen to reach {_whose(trainer)}: it makes a forward of its own. Let it take the "
            "log-probabilities of the whole batch from self._get_per_token_logps_and_entropies, in one call"
        )
    return False


class EveryStepHasCredit(TrainerCallback):
    """Raises before an optimizer step to which no loss came by `RhythmMixin._compute_loss`."""

    def __init__(self, trainer: Any, losses: Callable[[], int]) -> None:
        self._trainer, self._losses, self._before = trainer, losses, 0

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        now = self._losses()
        if now == self._before and self._trainer.rhythm.settings.mode != "uniform":
            raise RuntimeError(
                f"rhythm credit does not reach {_whose(self._trainer)}: it takes the place of RhythmMixin's "
                "_compute_loss. Let it call that by super(), or put its class behind: class Mine(RhythmMixin, Theirs)"
            )
        self._before = now


def _whose(trainer: Any) -> str:
    """The class and the method whose loss it is: the first that is neither ours nor TRL's own."""
    for base in type(trainer).__mro__:
        if base.__module__.startswith("rhythm_kernels.") or base.__module__ == "trl.trainer.grpo_trainer":
            continue
        for name in _LOSSES:
            if name in vars(base) and base.__module__.split(".")[0] != "transformers":
                return f"{base.__name__}.{name}"
    return f"{type(trainer).__name__}._compute_loss"
