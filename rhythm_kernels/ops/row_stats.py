"""`row_stats`: log-sum-exp, WAAD and span of each row, in one online softmax over all its keys; v is not read."""

from torch import Tensor

from ..rule import RowStats, Rule, per_token
from .library import define_pass


def _fake(q: Tensor, k: Tensor, rule: Rule, window: int, per_head: bool) -> RowStats:
    lse = per_token(q, rule, True)
    return RowStats(lse, per_token(q, rule, per_head), per_token(q, rule, per_head))


row_stats = define_pass(
    "row_stats", "Tensor q, Tensor k", "SymInt window, bool per_head", "(Tensor lse, Tensor waad, Tensor span)", _fake
)
