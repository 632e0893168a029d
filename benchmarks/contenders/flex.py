"""FlexAttention as far as it goes: every measure that a weighted log-sum-exp can express.

With `score + log w` in place of the score, its log-sum-exp is `log sum w exp(x)`, so that `exp(lse_w - lse)` is the
sum of `w A` over the keys of a row. With q and k exchanged and `score - lse[t]`, it is a column sum. Compiled on a GPU;
uncompiled on a CPU, where the compiled form gives no log-sum-exp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from ..gate import Results
from ..problem import AttentionProblem
from ..shapes import Shape

Call = Callable[[], Results]


def memory(shape: Shape, device: str) -> int:
    """Uncompiled it makes complete maps, several in float32; compiled nothing of that kind."""
    if device == "cuda":
        return 0
    return 5 * 4 * shape.batch * shape.heads * shape.length**2  # type: ignore[union-attr]


@functools.cache
def _compiled() -> Any:
    # Every score and every shape is one compilation of the same function; at the limit torch runs it uncompiled.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


def _attention(q: Tensor, k: Tensor, v: Tensor, score_mod: Any, mask: BlockMask) -> tuple[Tensor, Tensor]:
    run = _compiled() if q.device.type == "cuda" else flex_attention
    gqa = q.shape[1] != k.shape[1]
    out, aux = run(q, k, v, score_mod=score_mod, block_mask=mask, enable_gqa=gqa, return_aux=AuxRequest(lse=True))
    return out, aux.lse


def _mask(p: AttentionProblem, first: int, last: int | None, by_column: bool) -> BlockMask:
    """Pairs at a distance `first <= t - s <= last`."""

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = j - i if by_column else i - j
        keep = distance >= first
        return keep if last is None else keep & (distance <= last)

    length = p.shape.length
    return create_block_mask(visible, None, None, length, length, device=p.device, _compile=p.device.type == "cuda")


def _narrow(p: AttentionProblem, heads: int) -> Tensor:
    """Values nobody reads, as narrow as the kernels take them."""
    return p.q.new_zeros((p.shape.batch, heads, p.shape.length, 16))


def _swapped(p: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    """k as queries (one a query head) and q as keys."""
    q, k, _ = p.heads_first
    return k.repeat_interleave(p.kv_group, dim=1), q, _narrow(p, p.shape.heads)


def _column_sums(p: AttentionProblem, mask: BlockMask) -> Callable[[], Tensor]:
    k, q, v = _swapped(p)
    lse = p.lse.contiguous()

    def score_mod(score: Tensor, b: Tensor, h: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return score - lse[b, h, t]

    return lambda: torch.exp(_attention(k, q, v, score_mod, mask)[1]).mean(dim=1)


def band_rows(p: AttentionProblem) -> Call:
    window = p.shape.window
    q, k, _ = p.heads_first
    v, mask = _narrow(p, p.shape.kv_heads), _mask(p, 0, window - 1, by_column=False)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return score + torch.log((window - (t - s)).clamp(min=1).float())

    def call() -> Results:
        lse = _attention(q, k, v, score_mod, mask)[1]
        return {"waad": (window - torch.exp(lse - p.lse)).mean(dim=1)}

    return call


def band_columns(p: AttentionProblem) -> Call:
    shape = p.shape
    sums = _column_sums(p, _mask(p, shape.lo, shape.hi, by_column=True))
    position = torch.arange(shape.length, device=p.device)
    count = (shape.length - shape.lo - position).clamp(1, shape.hi - shape.lo + 1)
    return lambda: {"fai": sums() / count}


def row_stats(p: AttentionProblem) -> Call:
    """The log-sum-exp and the span: two passes."""
    q, k, _ = p.heads_first
    v = _narrow(p, p.shape.kv_heads)
    all_keys, earlier = _mask(p, 0, None, by_column=False), _mask(p, 1, None, by_column=False)

    def distances(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return score + torch.log((t - s).clamp(min=1).float())

    def call() -> Results:
        lse = _attention(q, k, v, None, all_keys)[1]
        away = _attention(q, k, v, distances, earlier)[1]
        return {"lse": lse, "span": torch.exp(away - lse).mean(dim=1)}

    return call


def column_stats(p: AttentionProblem) -> Call:
    sums = _column_sums(p, _mask(p, 0, None, by_column=True))
    count = torch.arange(p.shape.length, 0, -1, device=p.device)
    return lambda: {"fai_full": sums() / count}


def attention(p: AttentionProblem) -> Call:
    q, k, v = p.heads_first
    mask = _mask(p, 0, None, by_column=False)

    def call() -> Results:
        out, lse = _attention(q, k, v, None, mask)
        return {"out": out.transpose(1, 2), "lse": lse}

    return call
