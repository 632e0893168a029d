"""`band_columns`: FAI (eq. 10) of each key from the rows `lo .. hi` after it, given the log-sum-exp."""

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
    lo: int,
    hi: int,
    per_head: bool,
    backend: str | None,
) -> Tensor:
    return per_token(q, heads, per_head)


band_columns = define(
    "band_columns", f"Tensor q, Tensor k, Tensor lse, {RULE}, SymInt lo, SymInt hi, bool per_head", "Tensor", _fake
)
