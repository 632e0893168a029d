"""One call of a trainer's loss: what it reads, what it is made of, and whether credit reached it.

Whose loss it is does not matter: TRL's, or that of a class between TRL and `RhythmMixin`. It reads its inputs as it
always did, but for the advantages, which are shaped. A loss that does not see their shape fails here, at the first
batch that can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from .reach import credit_is_seen
from .trl_inputs import row_marks

__all__ = [
    "EveryStepHasCredit",
    "LossInputs",
    "OneValueAToken",
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


class OneValueAToken(torch.Tensor):
    """Shaped advantages, `(B, T)`, as a loss is given them until it was seen to heed them.

    A loss that was written for one advantage a response adds a dimension to them, `(B, 1, T)`, by which those of one
    response would multiply the ratios of another: silently, as the shapes fit.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            given = next((x for x in args if isinstance(x, cls)), None)
            rows, tokens = (0, 0) if given is None else given.shape
            spread = rows > 1 and isinstance(result, Tensor) and result.shape == (rows, 1, tokens)
        if spread:
            raise RuntimeError(
                'under rhythm credit inputs["advantages"] are of tokens, (B, T), but the loss makes '
                f"{tuple(result.shape)} of them: let it unsqueeze them only where advantages.dim() == 1, as TRL's does"
            )
        return result


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
    ours = __name__.rpartition(".")[0]
    for base in type(trainer).__mro__:
        if base.__module__.startswith(f"{ours}.") or base.__module__ == "trl.trainer.grpo_trainer":
            continue
        for name in _LOSSES:
            if name in vars(base) and base.__module__.split(".")[0] != "transformers":
                return f"{base.__name__}.{name}"
    return f"{type(trainer).__name__}._compute_loss"
