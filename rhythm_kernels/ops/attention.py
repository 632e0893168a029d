"""`attention`: causal attention with its log-sum-exp, WAAD and span; differentiable in q, k and v."""

from typing import Any

import torch
from torch import Tensor

from .library import LIBRARY, RULE, define, per_token


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqs: Tensor,
    heads: Tensor,
    max_seqlen: int,
    scale: float,
    softcap: float,
    window_left: int,
    sinks: Tensor | None,
    window: int,
    per_head: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, n_heads, _ = q.shape
    out = q.new_empty((batch, length, n_heads, v.shape[3]))
    lse = q.new_empty((batch, n_heads, length), dtype=torch.float32)
    return out, lse, per_token(q, heads, per_head), per_token(q, heads, per_head)


def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seqs: Tensor,
    max_seqlen: int,
    scale: float,
    softcap: float,
    window_left: int,
    sinks: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))  # type: ignore[return-value]


attention = define(
    "attention",
    f"Tensor q, Tensor k, Tensor v, {RULE}, SymInt window, bool per_head",
    "(Tensor out, Tensor lse, Tensor waad, Tensor span)",
    _fake,
)

attention_backward = define(
    "attention_backward",
    "Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor seqs, SymInt max_seqlen, float scale, float softcap, SymInt window_left, Tensor? sinks",
    "(Tensor dq, Tensor dk, Tensor dv)",
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, seqs, _, max_seqlen, scale, softcap, window_left, sinks, _, _, backend = inputs
    out, lse, waad, span = output
    ctx.save_for_backward(q, k, v, out, lse, seqs, sinks)
    ctx.rule = (max_seqlen, scale, softcap, window_left)
    ctx.backend = backend
    ctx.mark_non_differentiable(lse, waad, span)


@torch.autograd.function.once_differentiable  # the recomputing backward has no derivative of its own
def _backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, seqs, sinks = ctx.saved_tensors
    grads = attention_backward(grad_out, q, k, v, out, lse, seqs, *ctx.rule, sinks, ctx.backend)
    return *grads, *([None] * 10)


torch.library.register_autograd("rhythm_kernels::attention", _backward, setup_context=_save, lib=LIBRARY)
