"""`band_rows`: WAAD (eq. 9) of each row from its last `window` keys, given the log-sum-exp."""

from torch import Tensor

from ..rule import Rule, per_token
from .library import define_pass


def _fake(q: Tensor, k: Tensor, lse: Tensor, rule: Rule, window: int, per_head: bool) -> Tensor:
    return per_token(q, rule, per_head)


band_rows = define_pass("band_rows", "Tensor q, Tensor k, Tensor lse", "SymInt window, bool per_head", "Tensor", _fake)
