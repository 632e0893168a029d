"""`column_stats`: moments of the attention each key receives from the rows at least `min_distance` after it."""

from torch import Tensor

from .library import RULE, define, per_token


def _fake(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    seqs: Tensor,
    heads: Tensor,
    max_seqlen: int,
    scale: float,
    softcap: float,
    window_left: int,
    sinks: Tensor | None,
    min_distance: int,
    moments: bool,
    per_head: bool,
    backend: str | None,
) -> Tensor:
    # count, mean, variance, skewness, kurtosis; or the mean alone (FAI to the end of the response).
    return per_token(q, heads, per_head, 5 if moments else 1)


column_stats = define(
    "column_stats",
    f"Tensor q, Tensor k, Tensor lse, {RULE}, SymInt min_distance, bool moments, bool per_head",
    "Tensor",
    _fake,
)
