"""Stand-ins for flash-attn 3, its build with sinks on the kernels hub, and flash-attn 4: their signatures and returns.

Signatures as of flash-attention 0251105 (2026-08, `hopper/flash_attn_interface.py`), flash-attn-4 4.0.0b36
(`flash_attn/cute/interface.py`) and kernels-community/vllm-flash-attn3. What matters here of each:

- 3: `return_attn_probs=True` returns `(out, lse)`, else `out`.
- 3 from the hub: always `(out, lse)`; sinks are `s_aux`.
- 4: always a pair, whose `lse` is None unless q, k or v need gradients or `return_lse=True`; sinks: `learnable_sink`.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from .flash_standin import _dense


class _Attention(torch.autograd.Function):
    """Out and lse of padded (`ends` None) or packed sequences; the gradient is that of out."""

    @staticmethod
    def forward(ctx, q, k, v, ends, score, sink, wants_lse):
        ctx.save_for_backward(q, k, v)
        ctx.rule = ends, score, sink
        out, lse = _attend(q, k, v, ends, score, sink)
        if lse is not None:
            ctx.mark_non_differentiable(lse)
        return out, lse if wants_lse or any(ctx.needs_input_grad) else None

    @staticmethod
    def backward(ctx, grad_out, _):
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out, _ = _attend(*leaves, *ctx.rule)
        return *torch.autograd.grad(out, leaves, grad_out), None, None, None, None


def _attend(q, k, v, ends, score, sink):
    if ends is None:
        rows = [_dense(*row, *score, sink) for row in zip(q, k, v)]
        return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows])
    rows = [_dense(q[a:b], k[a:b], v[a:b], *score, sink) for a, b in pairwise(ends.tolist())]
    return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows], dim=1)


def _score(q, softmax_scale, causal, window_size, softcap):
    left, right = (-1 if w is None else w for w in window_size)
    return q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, causal, left, right, softcap


class FlashAttn3:
    name = "flash_attention_3"
    sinks = False

    @staticmethod
    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        out, lse = _Attention.apply(q, k, v, None, _score(q, softmax_scale, causal, window_size, softcap), None, True)
        return (out, lse) if return_attn_probs else out

    @staticmethod
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        score = _score(q, softmax_scale, causal, window_size, softcap)
        out, lse = _Attention.apply(q, k, v, cu_seqlens_q, score, None, True)
        return (out, lse) if return_attn_probs else out


class FlashAttn3FromHub:
    name = "kernels-community/vllm-flash-attn3"
    sinks = True

    @staticmethod
    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        s_aux=None,
        cp_world_size=1,
        cp_rank=0,
        cp_tot_seqused_k=None,
    ):
        score = _score(q, softmax_scale, causal, window_size, softcap)
        return _Attention.apply(q, k, v, None, score, s_aux, True)

    @staticmethod
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        s_aux=None,
        cp_world_size=1,
        cp_rank=0,
        cp_tot_seqused_k=None,
    ):
        score = _score(q, softmax_scale, causal, window_size, softcap)
        return _Attention.apply(q, k, v, cu_seqlens_q, score, s_aux, True)


class FlashAttn4:
    name = "flash_attention_4"
    sinks = True

    @staticmethod
    def flash_attn_func(
        q,
        k,
        v,
        qv=None,
        gather_kv_indices=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        score_mod=None,
        score_mod_bwd=None,
        mask_mod=None,
        aux_tensors=None,
        aux_scalars=None,
        block_sparse_tensors=None,
        block_sparse_tensors_bwd=None,
        return_lse=False,
        gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):
        score = _score(q, softmax_scale, causal, window_size, softcap)
        return _Attention.apply(q, k, v, None, score, learnable_sink, return_lse)

    @staticmethod
    def flash_attn_varlen_func(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        min_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        gather_kv_indices=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        score_mod=None,
        score_mod_bwd=None,
        mask_mod=None,
        block_sparse_tensors=None,
        aux_tensors=None,
        aux_scalars=None,
        return_lse=False,
        scheduler_metadata=None,
        seqlen_k_per_split=None,
        disable_scheduler_metadata=False,
        gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):
        score = _score(q, softmax_scale, causal, window_size, softcap)
        return _Attention.apply(q, k, v, cu_seqlens_q, score, learnable_sink, return_lse)


PACKAGES = [FlashAttn3, FlashAttn3FromHub, FlashAttn4]
