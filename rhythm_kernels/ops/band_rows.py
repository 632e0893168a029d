"""`band_rows`: WAAD (eq. 9) of each row from its last `window` keys, given the log-sum-exp."""

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
    window: int,
    per_head: bool,
    backend: str | None,
) -> Tensor:
    return per_token(q, heads, per_head)


band_rows = define(
    "band_rows", f"Tensor q, Tensor k, Tensor lse, {RULE}, SymInt window, bool per_head", "Tensor", _fake
)
