"""What every pass takes beside its tensors, as one value, and what the passes with several results give.

The schemas of the operators stay flat, since an operator takes no such values: :mod:`rhythm_kernels.ops.library` folds
them once. Whoever adds an attention variant adds its field here, and teaches it to the score file of each backend.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """Which sequences and heads a pass measures, and by which score rule, checked and in canonical form.

    seqs: `(S, 4)` int32: row, start, end, response_start, with `start <= response_start <= end`; ordered, disjoint.
    heads: `(Hs, 2)` int32: query head, row of the log-sum-exp.
    max_seqlen: no sequence is longer, in tokens.
    scale, softcap: the logit is `scale q.k`, or `softcap tanh(scale q.k / softcap)` where softcap is not 0.
    window_left: how many keys before itself a row sees; -1: all.
    sinks: `(H,)` float32 logits that join each row's denominator, or None.
    alibi_slopes: `(S, H)` float32, or `(1, H)` for all sequences: `slope (t - s)` is taken from the logit; or None.
    """

    seqs: Tensor
    heads: Tensor
    max_seqlen: int
    scale: float
    softcap: float
    window_left: int
    sinks: Tensor | None
    alibi_slopes: Tensor | None = None

    def within(self, length: int) -> Rule:
        """The same for rows of `length` tokens, where no distance is longer: what kernels then count fits 32 bits."""
        return self._replace(max_seqlen=min(self.max_seqlen, length), window_left=min(self.window_left, length))

    def split(self) -> tuple[list[Tensor], list[Any]]:
        """Its tensors, which autograd must save, and the rest, with an ellipsis where a tensor was."""
        tensors = [x for x in self if isinstance(x, Tensor)]
        return tensors, [... if isinstance(x, Tensor) else x for x in self]

    @classmethod
    def joined(cls, tensors: list[Tensor], rest: list[Any]) -> Rule:
        """The rule that was :meth:`split`."""
        left = iter(tensors)
        return cls._make(next(left) if x is ... else x for x in rest)


# How operators take a rule.
SCHEMA = (
    "Tensor seqs, Tensor heads, SymInt max_seqlen, float scale, float softcap, SymInt window_left, Tensor? sinks, "
    "Tensor? alibi_slopes"
)


class RowStats(NamedTuple):
    """`lse (B, Hs, T)`; `waad` and `span` `(B, T)`, or `(B, Hs, T)` per head; all float32."""

    lse: Tensor
    waad: Tensor
    span: Tensor


class Attended(NamedTuple):
    """`out (B, T, H, D_v)` in v's dtype; `lse (B, H, T)`, all heads; `waad`, `span` as :class:`RowStats` has them."""

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
    """Which tokens credit chooses (eqs. 14 to 18), and what gamma each kind of token has.

    mode: local, global, coupled, or random and entropy, which choose by a given score. top: the share that is chosen.
    neighbors: how many tokens before an anchor may be its intro token. bottom: choose the lowest instead.
    tau_waad, tau_delta: thresholds of eq. 18, None for those of the response. levels: :func:`gamma_levels`.
    """

    mode: str
    top: float
    neighbors: int
    bottom: bool
    tau_waad: float | None
    tau_delta: float | None
    levels: list[float]
