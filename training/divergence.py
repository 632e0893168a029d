"""A model that diverged: noticed in the step where its numbers stop being finite, and said in one line.

Going on would be days of nothing: after one loss that is NaN every weight is, and no checkpoint from then on is of use.
transformers' `Trainer` goes on, and by default logs a finite loss in the place of one that is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from .settings import RecipeError

_ADVICE = "the model has diverged: try a smaller grpo.learning_rate, from the start or with a checkpoint as model.path"
# What torch says where the probabilities to draw a token from are NaN, infinite or all 0: on CPUs, and on GPUs, where
# an assertion inside of the kernel is all that is left of it.
_SIGNS = ("probability tensor contains", "invalid multinomial distribution", "device-side assert")


class DivergedError(RecipeError):
    """Loss, gradient or probabilities of a model are not finite; the message says which, and in which step."""


def check_finite(**figures: float) -> None:
    """Raise `DivergedError` for the first figure that is NaN or infinite: `loss=...`, `gradient_norm=...`."""
    for name, value in figures.items():
        if not math.isfinite(value):
            raise DivergedError(f"the {name.replace('_', ' ')} is {value}")


@contextmanager
def drawing() -> Iterator[None]:
    """A block that draws tokens: torch's error for probabilities that are none becomes a `DivergedError`."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _SIGNS):
            raise
        raise DivergedError("the model's probabilities are not finite, so that no token can be drawn") from error


@contextmanager
def in_step(step: int) -> Iterator[None]:
    """A step of training, in which tokens may be drawn: a `DivergedError` inside names it and says what may help."""
    try:
        with drawing():
            yield
    except DivergedError as error:
        raise DivergedError(f"step {step}: {error}; {_ADVICE}") from error
