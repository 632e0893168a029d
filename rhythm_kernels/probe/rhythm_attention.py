"""`"rhythm"`: an attention implementation of transformers on `attention_with_rhythm`.

It computes causal self-attention for training and prefill: grouped heads, sliding windows, softcap, sinks, left and
right padding, packed positions. Decoding with a KV cache, dropout, biases and masks of other shapes go to transformers'
own `sdpa` function, or to the model's eager function where `sdpa` does not know softcap or sinks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..canonical import DTYPES, MAX_HEAD_SIZE
from ..functional import attention_with_rhythm
from ..reference import AttentionStats
from .range_mask import RangeMask, rhythm_mask
from .taps import eager_function

NAME = "rhythm"

# Arguments by which sparse attention names the keys it kept, for kernels that read them.
_SPARSE = ("indices", "topk_indices", "block_indices")


@dataclass
class Request:
    """What a probe asks of one attention call, and afterwards what it got.

    Attributes:
        heads, window, per_head: as for `attention_with_rhythm`.
        stats: WAAD and span of every live row, `(B, T)` or `(B, Hs, T)`; None where another function ran.
    """

    heads: list[int]
    window: int
    per_head: bool
    stats: AttentionStats | None = None


_request: Request | None = None


@contextmanager
def asking(request: Request | None) -> Iterator[None]:
    """Around one attention call: have it take these statistics in its own pass."""
    global _request
    before, _request = _request, request
    try:
        yield
    finally:
        _request = before


def is_one_pass(device: torch.device) -> bool:
    """Whether attention on this device takes the statistics in its own pass. On a CPU they would be a pass more, and
    with the log-sum-exp a band of keys is cheaper."""
    return ops.choose("attention", None, device) == "triton"


def register() -> None:
    """Make `attn_implementation="rhythm"` known to transformers; calling it again changes nothing.

    Raises:
        RuntimeError: someone else registered a function of that name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    found = AttentionInterface._global_mapping.get(NAME, rhythm_attention)
    if found is not rhythm_attention:
        raise RuntimeError(f"attn_implementation={NAME!r} is taken by {found.__module__}.{found.__qualname__}")
    if NAME not in AttentionInterface._global_mapping:
        AttentionInterface.register(NAME, rhythm_attention)
        AttentionMaskInterface.register(NAME, rhythm_mask)


def rhythm_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RangeMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: `query (B, H, T, D)`, `key`, `value (B, H_kv, S, ...)`.

    Returns `(B, T, H, D_v)` and None. Gradients reach query, key, value and the sinks.

    Raises:
        NotImplementedError: the model attends to chosen keys only (sparse attention), or to compressed keys too.
        ValueError: `cu_seq_lens_q` without the packed position_ids from which the mask is made.
    """
    if any(kwargs.get(name) is not None for name in _SPARSE):
        raise NotImplementedError(
            f"{type(module).__name__} chooses keys (sparse attention), which attn_implementation={NAME!r} does not "
            "support: use 'sdpa' or 'eager'"
        )
    mask_keys = attention_mask.shape[-1] if isinstance(attention_mask, RangeMask) else key.shape[2]
    if getattr(module, "compressor", None) is not None or mask_keys != key.shape[2]:
        raise NotImplementedError(
            f"{type(module).__name__} attends to keys that are no tokens' own (compressed or added keys), which "
            f"attn_implementation={NAME!r} does not support: use 'eager'"
        )
    cu_seqlens, packed = kwargs.get("cu_seq_lens_q"), isinstance(attention_mask, RangeMask) and attention_mask.packed
    if cu_seqlens is not None and cu_seqlens.shape[0] > 2 and not packed:
        raise ValueError(
            f"cu_seq_lens_q must be None or come with packed position_ids, as attn_implementation={NAME!r} does not "
            f"read it, got {cu_seqlens.shape[0] - 1} sequences: pass packed position_ids, attention_mask=None and "
            "use_cache=False"
        )
    query, key, value = _lowered(query, key, value)
    if dropout or not _is_self_attention(module, query, key, value, attention_mask, kwargs):
        return _by_others(module, query, key, value, attention_mask, dropout, scaling, kwargs), None
    batch, _, length, _ = query.shape
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attention_mask is None:
        ranges: dict[str, Any] = {}
        left = -1
        no_response = torch.full((batch,), length, dtype=torch.int32, device=q.device)
    else:
        assert isinstance(attention_mask, RangeMask)
        mask = attention_mask if attention_mask.first.device == q.device else attention_mask.to(q.device)
        ranges, left, no_response = mask.arguments, mask.left, mask.no_response
    request = _request
    if request is None:  # without a response no statistics are taken
        asked: dict[str, Any] = {"heads": [0], "response_start": no_response}
    else:
        asked = {"heads": request.heads, "window": request.window, "per_head": request.per_head}
    if packed:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    sinks = kwargs.get("s_aux")
    out, lse, stats = attention_with_rhythm(
        q,
        k,
        v,
        softmax_scale=scaling,
        window_size=(left, 0),
        softcap=float(kwargs.get("softcap") or 0.0),
        sinks=sinks,
        **ranges,
        **asked,
    )
    if request is not None:
        if packed:
            stats = AttentionStats(*(x.unflatten(-1, (batch, length)).movedim(-2, 0) for x in stats))
        request.stats = stats
    if sinks is not None and sinks.requires_grad and torch.is_grad_enabled():
        out = _SinkGradient.apply(out, sinks, lse)
    return out.view(batch, length, *out.shape[-2:]), None


def _lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, what `scaled_dot_product_attention` would compute in."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)


def _is_self_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
) -> bool:
    """Whether this call is one that `attention_with_rhythm` computes."""
    causal = kwargs.get("is_causal")
    return (
        (getattr(module, "is_causal", True) if causal is None else causal)
        and (mask is None or isinstance(mask, RangeMask))
        and query.shape[2] == key.shape[2]
        and query.dtype in DTYPES
        and max(query.shape[3], value.shape[3]) <= MAX_HEAD_SIZE
        and kwargs.get("position_bias") is None
        and kwargs.get("cache") is None
    )


def _by_others(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = mask.to(query.device).dense() if isinstance(mask, RangeMask) else mask
    arguments = {"dropout": dropout, "scaling": scaling, **kwargs}
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, **arguments)[0]
    length, keys = query.shape[2], key.shape[2]
    if mask is None and length > 1:
        # sdpa's mask function leaves the mask out only where the queries are the first of the keys.
        mask = torch.ones(1, 1, length, keys, dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        low = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, low)
    return eager_function(module)(module, query, key, value, mask, **arguments)[0]


class _SinkGradient(torch.autograd.Function):
    """The identity on `out`, with the gradient of the sinks that attention itself does not give.

    A sink takes the share `p = exp(sink - lse)` of each row and no value: `d out / d sink = -p out`.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, sinks: Tensor, lse: Tensor) -> Tensor:
        ctx.save_for_backward(out, sinks, lse)
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        out, sinks, lse = ctx.saved_tensors
        inner = (grad_out.float() * out.float()).sum(-1).movedim(-1, -2)  # (B, H, T) or (H, total)
        share = torch.exp(sinks.float()[:, None] - lse)
        padding = torch.isneginf(lse)  # such a query has no keys, and its sink takes nothing
        weighted = torch.where(padding, 0.0, share * inner)
        return grad_out, -weighted.transpose(0, -2).flatten(1).sum(1).to(sinks.dtype), None
