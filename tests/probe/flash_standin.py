"""A stand-in for the flash-attn package (2.8): its public signatures, over operators of its names and results.

`flash_attn_func` and `flash_attn_varlen_func` go through custom operators that return `(out, lse, S_dmask, rng_state)`,
as flash-attn's do; the arithmetic is dense torch in float32, on any device and dtype.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

import torch
from torch import Tensor


@torch.autocast("cpu", enabled=False)  # a kernel knows nothing of autocast
def _dense(q, k, v, scale, causal, left, right, softcap, sink=None):
    """One sequence: `(T, H, D)` -> out `(T, H, D_v)`, lse `(H, T)` with the sink in it."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(groups, dim=1) for x in (k, v))
    x = torch.einsum("thd,shd->hts", q.float(), k) * scale
    if softcap > 0:
        x = softcap * torch.tanh(x / softcap)
    distance = torch.arange(q.shape[0])[:, None] - torch.arange(k.shape[0])[None]
    right = 0 if causal else right
    hidden = (distance > left if left >= 0 else distance > len(k)) | (
        -distance > right if right >= 0 else distance > len(k)
    )
    x = x.masked_fill(hidden, float("-inf"))
    lse = x.logsumexp(-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink.float()[:, None])
    return torch.einsum("hts,shd->thd", (x - lse[..., None]).exp(), v).to(q.dtype), lse


@torch.library.custom_op("flash_attn_standin::_flash_attn_forward", mutates_args=())
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    score = (softmax_scale, causal, window_size_left, window_size_right, softcap)
    rows = [_dense(*row, *score) for row in zip(q, k, v)]
    empty = q.new_empty(0)
    return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows]), empty, empty.clone()


@torch.library.custom_op("flash_attn_standin::_flash_attn_varlen_forward", mutates_args=())
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    score = (softmax_scale, causal, window_size_left, window_size_right, softcap)
    ends = cu_seqlens_q.tolist()
    rows = [_dense(q[a:b], k[a:b], v[a:b], *score) for a, b in pairwise(ends)]
    empty = q.new_empty(0)
    return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows], dim=1), empty, empty.clone()


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse, mask, _ = _flash_attn_forward(
        q, k, v, dropout_p, scale, causal, *window_size, softcap, alibi_slopes, return_attn_probs and dropout_p > 0
    )
    return (out, lse, mask) if return_attn_probs else out


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    lengths = (cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
    out, lse, mask, _ = _flash_attn_varlen_forward(q, k, v, *lengths, dropout_p, scale, causal, *window_size, softcap)
    return (out, lse, mask) if return_attn_probs else out


@contextmanager
def installed(model, func=flash_attn_func, varlen_func=flash_attn_varlen_func, name="flash_attention_2"):
    """Let `model` attend through `func`, as if its package were installed and chosen by `name`."""
    from transformers import modeling_flash_attention_utils as utils

    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation_internal
    loaded = {
        "_loaded_implementation": name,
        "_flash_fn": func,
        "_flash_varlen_fn": varlen_func,
        "_flash_with_kvcache_fn": None,
        "_pad_fn": utils._pad_input,
        "_unpad_fn": utils._unpad_input,
        "_process_flash_kwargs_fn": utils._lazy_define_process_function(varlen_func),
        "_process_with_kvcache_kwargs_fn": dict,
    }
    config._attn_implementation_internal = name
    try:
        with mock.patch.multiple(utils, create=True, **loaded):
            yield model
    finally:
        config._attn_implementation_internal = before
