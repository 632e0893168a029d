"""`row_stats`: log-sum-exp, WAAD and span of each row in one online softmax over `q k^T` alone."""

from torch import Tensor

from .library import RULE, define, per_token


def _fake(
    q: Tensor,
    k: Tensor,
    seqs: Tensor,
    heads: Tensor,
    max_seqlen: int,
    scale: float,
    softcap: float,
    window_left: int,
    sinks: Tensor | None,
    window: int,
    per_head: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = per_token(q, heads, True)
    return lse, per_token(q, heads, per_head), per_token(q, heads, per_head)


row_stats = define(
    "row_stats",
    f"Tensor q, Tensor k, {RULE}, SymInt window, bool per_head",
    "(Tensor lse, Tensor waad, Tensor span)",
    _fake,
)
