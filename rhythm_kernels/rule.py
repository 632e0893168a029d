"""The score rule as one value, which every pass takes; and the named results of passes that return several tensors.

Schemas of torch operators cannot hold such values, so they list the fields one by one, and
:mod:`rhythm_kernels.ops.library` joins these into a `Rule` again. To add an attention variant, add its field here and
apply it in the score file of each backend.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """How q.k becomes a logit, and in which sequences and heads; checked and in canonical form.

    seqs: `(S, 4)` int32, the sequence table: batch row, start, end, response start, in order and disjoint, with
        `start <= response start <= end`.
    heads: `(Hs, 2)` int32, the head table: query head, and its lse index (where its row of lse lies in the given lse).
    max_seqlen: no sequence is longer, in tokens.
    scale, softcap: the logit is `scale q.k`, or `softcap tanh(scale q.k / softcap)` where softcap is not 0.
    window_left: the sliding window: how many keys before itself a query sees; -1: all.
    sinks: `(H,)` float32 logits that join each row's denominator alone, or None.
    alibi_slopes: `(S, H)` float32, or `(1, H)` for all sequences: the logit is less `slope (t - s)`. Or None.
    """

    seqs: Tensor
    heads: Tensor
    max_seqlen: int
    scale: float
    softcap: float
    window_left: int
    sinks: Tensor | None
    alibi_slopes: Tensor | None = None

    def split(self) -> tuple[list[Tensor], list[Any]]:
        """The tensors, which autograd saves in its own way, and all fields with `...` in place of each tensor."""
        tensors = [x for x in self if isinstance(x, Tensor)]
        return tensors, [... if isinstance(x, Tensor) else x for x in self]

    @classmethod
    def joined(cls, tensors: list[Tensor], rest: list[Any]) -> Rule:
        """The rule that :meth:`split` took apart."""
        left = iter(tensors)
        return cls._make(next(left) if x is ... else x for x in rest)


# The same fields in an operator's schema.
SCHEMA = (
    "Tensor seqs, Tensor heads, SymInt max_seqlen, float scale, float softcap, SymInt window_left, Tensor? sinks, "
    "Tensor? alibi_slopes"
)


class RowStats(NamedTuple):
    """The results of `row_stats`: `lse (B, Hs, T)`; `waad` and `span` `(B, T)`, or `(B, Hs, T)` per head; float32."""

    lse: Tensor
    waad: Tensor
    span: Tensor


class Attended(NamedTuple):
    """The results of `attention`: `out (B, T, H, D_v)` in v's dtype, `lse (B, H, T)`; `waad`, `span` as in RowStats."""

    out: Tensor
    lse: Tensor
    waad: Tensor
    span: Tensor


def per_token(q: Tensor, rule: Rule, per_head: bool, *leading: int) -> Tensor:
    """An unwritten float32 result of a pass: `(*leading, B, T)`, or `(*leading, B, H_selected, T)`."""
    batch, length = q.shape[:2]
    middle = (rule.heads.shape[0],) if per_head else ()
    return q.new_empty((*leading, batch, *middle, length), dtype=torch.float32)


class Choice(NamedTuple):
    """Which tokens credit chooses (eqs. 14 to 18), and the gamma of each kind of token.

    mode: local, global, coupled, or random and entropy, which choose by a given score. top: the share that is chosen.
    neighbors: how many tokens before an anchor may be its intro token. bottom: choose the lowest instead.
    tau_waad, tau_delta: thresholds of eq. 18; None: computed from each response. levels: see :func:`gamma_levels`.
    """

    mode: str
    top: float
    neighbors: int
    bottom: bool
    tau_waad: float | None
    tau_delta: float | None
    levels: list[float]
