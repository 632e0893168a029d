"""The score rule in torch: an attention variant is added to the tile-wise passes in this file alone.

`x = scale q.k`, softcapped, less `slope (t - s)` with ALiBi; `A = exp(x - lse)`. Which keys a row sees is
:func:`visible`, what a sink takes from a row :func:`sink_peak`, :func:`sink_mass` and :func:`known`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...rule import Rule
from ...sequences import TokenTable
from .tiles import products


def logit(product: Tensor, distance: Tensor, heads: Tensor, sequence: Tensor, rule: Rule) -> Tensor:
    """The logits of a tile, without its mask, `(B, Hs, rows, keys)` float32.

    Args:
        product: `(B, Hs, rows, keys)` float32, `q.k`.
        distance: `(rows, keys)` int64, `t - s`.
        heads: `(Hs,)` int64, the query heads. sequence: `(B, rows)` int64, the entry of `rule.seqs` of each row.
    """
    return _biased(_capped(product, rule), distance, heads, sequence, rule)


def logit_and_slope(
    product: Tensor, distance: Tensor, heads: Tensor, sequence: Tensor, rule: Rule
) -> tuple[Tensor, Tensor | None]:
    """:func:`logit`, and its slope `dx / d(scale q.k)`, of the same shape; None where the slope is 1."""
    x = _capped(product, rule)
    slope = 1 - (x / rule.softcap) ** 2 if rule.softcap > 0 else None
    return _biased(x, distance, heads, sequence, rule), slope


def _capped(product: Tensor, rule: Rule) -> Tensor:
    x = product * rule.scale
    return rule.softcap * torch.tanh(x / rule.softcap) if rule.softcap > 0 else x


def _biased(x: Tensor, distance: Tensor, heads: Tensor, sequence: Tensor, rule: Rule) -> Tensor:
    if rule.alibi_slopes is None:
        return x
    slopes = rule.alibi_slopes[:, heads]  # (1 or S, Hs)
    of_rows = slopes[sequence].transpose(1, 2) if len(slopes) > 1 else slopes[..., None]  # (B, Hs, rows), (1, Hs, 1)
    return x - of_rows[..., None] * distance


def logits(
    q: Tensor, k: Tensor, rows: tuple[int, int], keys: tuple[int, int], heads: Tensor, tokens: TokenTable,
    distance: Tensor, rule: Rule,
) -> Tensor:  # fmt: skip
    """:func:`logit` of a tile of q and k, `(B, Hs, rows, keys)`; `rows` and `keys` are ranges `(first, end)`."""
    return logit(products(q, k, rows, keys, heads), distance, heads, tokens.sequence[:, slice(*rows)], rule)


def of_flash(rule: Rule) -> bool:
    """Whether torch's own flash attention on CPUs can compute this rule."""
    return (
        rule.softcap == 0
        and rule.window_left < 0
        and rule.sinks is None
        and rule.alibi_slopes is None
        and rule.scale > 0
    )


def visible(
    tokens: TokenTable, rows: tuple[int, int], keys: tuple[int, int], rule: Rule, sliding: bool = True
) -> tuple[Tensor, Tensor]:
    """Which keys each row of a tile sees, `(B, 1, rows, keys)` bool; and the distance t - s, `(rows, keys)` int64.

    Without `sliding`, the sliding window is left out.
    """
    device = tokens.start.device
    t = torch.arange(*rows, device=device)[:, None]  # (rows, 1)
    s = torch.arange(*keys, device=device)[None, :]  # (1, keys)
    distance = t - s
    mask = (distance >= 0) & (s >= tokens.start[:, slice(*rows), None])  # (B, rows, keys)
    if sliding and rule.window_left >= 0:
        mask = mask & (distance <= rule.window_left)
    return mask[:, None], distance


def sink_peak(sinks: Tensor) -> Tensor:
    """The running maximum that an online softmax with sinks starts from: the sinks; NaN for `+inf`: A is undefined."""
    return torch.where(sinks == float("inf"), float("nan"), sinks)


def sink_mass(sink: Tensor, peak: Tensor) -> Tensor:
    """A sink's share of a softmax, relative to the peak; one of `-inf` has none, also where all logits are `-inf`."""
    mass = torch.where(peak == sink, 1.0, torch.exp(sink - peak))
    return torch.where(sink == float("-inf"), 0.0, mass)


def known(lse: Tensor, rule: Rule) -> Tensor:
    """The log-sum-exp of the selected heads, `(B, Hs, T)`; NaN where it is not finite, or the sink +inf or NaN."""
    query_heads, lse_index = rule.heads.long().unbind(1)  # (Hs,) each
    row_lse = lse.index_select(1, lse_index)  # (B, Hs, T)
    zero = 0 * row_lse  # NaN where lse is not finite
    if rule.sinks is not None:
        sink = rule.sinks[query_heads, None]  # (Hs, 1)
        zero = zero + torch.where(sink == float("-inf"), 0.0, 0 * sink)
    return row_lse + zero
