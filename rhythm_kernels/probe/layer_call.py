"""One attention call of one layer as the measures take it: q, k, log-sum-exp, score rule and live ranges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..canonical import Canonical, canonical
from ..reference import AttentionStats
from .attention_call import AttentionCall, Observed
from .checks import Checks
from .chunks import rows_after
from .forward_sequences import Sequences
from .lse import as_batched

STREAMED = "streamed from q and k"


@dataclass
class LayerCall:
    """One attention call of one layer, in the layout of the public functions.

    Attributes:
        q, k: `(B, T, H, D)` and `(B, T, H_kv, D)`, or `(B * T, ...)` for packed batches; views of the model's own.
        lse: `(B, H, T)` / `(H, B * T)` float32 as the model's attention operator computed it, or None.
        source: where lse comes from, in words.
        score: the score rule, and `sequences` the live ranges, both as keyword arguments of the public functions.
        first_head: which of the layer's query heads q begins with: above 0 on later ranks of a tensor-parallel model.
        stats: WAAD and span of what the consumer wanted of this layer, `(B, T)` or `(B, H_selected, T)`, 0 outside R,
            where the attention call itself gave them.
    """

    layer: int
    q: Tensor
    k: Tensor
    lse: Tensor | None
    source: str
    score: dict[str, Any]
    sequences: Sequences
    first_head: int = 0
    stats: AttentionStats | None = None

    def present(self, heads: Sequence[int]) -> list[int]:
        """Those of `heads` that q holds, counted within q."""
        return present(heads, self.first_head, self.q.shape[-2])

    def form(self, heads: Sequence[int]) -> Canonical:
        """The canonical form of the call for heads of q, as the functions of :mod:`rhythm_kernels.passes` take it."""
        table = self.sequences.table.to(self.q.device)
        return canonical(self.q, self.k, self.lse, heads=list(heads), **self.score, table=table)

    def measure(self, function: Callable[..., Tensor], heads: Sequence[int], **options: Any) -> Tensor:
        """Call one of the passes on heads of q: `(B, T)` float32, or `(B, Hs, T)` with `per_head=True`."""
        return self.unpack(function(self.form(heads), **options))

    def of_all_rows(self, mean: Tensor, low: int, high: int | None) -> Tensor:
        """A mean over the rows `low..high` after each token, as the passes give it, over all such rows in R.

        In chunked attention the passes see the rows of the token's chunk; the others have A = 0.
        """
        counts = rows_after(self.sequences, low, high)
        if counts is None:
            return mean
        inside, of_all = (x.to(mean.device) for x in counts)
        share = inside / of_all.clamp(min=1)
        return mean * (share if mean.dim() == 2 else share[:, None])

    def unpack(self, result: Tensor) -> Tensor:
        """Undo the flattening of a packed batch: `(..., B * T) -> (B, ..., T)`."""
        if not self.sequences.packed:
            return result
        result = result.unflatten(-1, (self.sequences.batch, self.sequences.length))
        return result.movedim(-2, 0)


def present(heads: Sequence[int], first: int, count: int) -> list[int]:
    """Those of a layer's `heads` that are among the `count` heads from `first` on, counted from `first`."""
    return [head - first for head in heads if 0 <= head - first < count]


def layer_call(
    call: AttentionCall, seen: Observed, sequences: Sequences, left: int, first_head: int, checks: Checks
) -> LayerCall:
    """What the measures take of an attention call that was observed.

    Args:
        left: how many keys to the left of its own a query sees; -1: all.
    """
    query, key, sinks = call.query, call.key, call.sinks
    observer, lse = seen.lse_seen, None
    if observer is not None and observer.lse is not None and (sinks is None or observer.has_sinks):
        lse = as_batched(observer.lse, query.shape[0], query.shape[1], query.shape[2], sequences.live, checks)
    if lse is not None and observer is not None:
        # The measures must be of the q and k that gave the lse: autocast lowers them inside of the attention function.
        dtype, source = observer.dtype, observer.source or STREAMED
    else:
        dtype, source = torch.promote_types(query.dtype, key.dtype), STREAMED
    dtype = torch.float32 if dtype == torch.float64 else dtype
    q, k = (x.detach().to(dtype).transpose(1, 2) for x in (query, key))
    if sequences.packed:
        q, k = q.flatten(0, 1), k.flatten(0, 1)
        lse = None if lse is None else lse.transpose(0, 1).flatten(1, 2)
    score = {
        "softmax_scale": call.kwargs.get("scaling"),
        "window_size": (left, 0),
        "softcap": call.softcap,
        "sinks": None if sinks is None else sinks.detach().float().contiguous(),
    }
    lse = None if lse is None else lse.detach().float()
    stats, request = None, seen.request
    if request is not None and request.stats is not None:
        response = sequences.response[:, None] if request.per_head else sequences.response
        response = response.to(query.device)
        stats = AttentionStats(*(torch.where(response, x, 0.0) for x in request.stats))
    return LayerCall(call.layer, q, k, lse, source, score, sequences, first_head, stats)
