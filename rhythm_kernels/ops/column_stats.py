"""`column_stats`: moments of the attention each key receives from the rows at least `min_distance` after it."""

from torch import Tensor

from ..rule import Rule, per_token
from .library import define_pass


def _fake(
    q: Tensor, k: Tensor, lse: Tensor, rule: Rule, min_distance: int, moments: bool, per_head: bool
) -> Tensor:  # fmt: skip
    # count, mean, variance, skewness, kurtosis; or the mean alone (FAI to the end of the response).
    return per_token(q, rule, per_head, 5 if moments else 1)


column_stats = define_pass(
    "column_stats",
    "Tensor q, Tensor k, Tensor lse",
    "SymInt min_distance, bool moments, bool per_head",
    "Tensor",
    _fake,
)
