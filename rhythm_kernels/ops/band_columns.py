"""`band_columns`: FAI (eq. 10) of each key from the rows `lo .. hi` after it, given the log-sum-exp."""

from torch import Tensor

from ..rule import Rule, per_token
from .library import define_pass


def _fake(q: Tensor, k: Tensor, lse: Tensor, rule: Rule, lo: int, hi: int, per_head: bool) -> Tensor:
    return per_token(q, rule, per_head)


band_columns = define_pass(
    "band_columns", "Tensor q, Tensor k, Tensor lse", "SymInt lo, SymInt hi, bool per_head", "Tensor", _fake
)
