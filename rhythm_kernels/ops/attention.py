"""`attention`: causal attention with its log-sum-exp, WAAD and span; differentiable in q, k and v."""

from typing import Any

import torch
from torch import Tensor

from ..rule import Attended, Rule, per_token
from .library import LIBRARY, define_pass


def _fake(q: Tensor, k: Tensor, v: Tensor, rule: Rule, window: int, per_head: bool) -> Attended:
    batch, length, n_heads, _ = q.shape
    out = q.new_empty((batch, length, n_heads, v.shape[3]))
    lse = q.new_empty((batch, n_heads, length), dtype=torch.float32)
    return Attended(out, lse, per_token(q, rule, per_head), per_token(q, rule, per_head))


def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


attention = define_pass(
    "attention",
    "Tensor q, Tensor k, Tensor v",
    "SymInt window, bool per_head",
    "(Tensor out, Tensor lse, Tensor waad, Tensor span)",
    _fake,
)

# It does not read the head table: gradients are of all heads, the table selects those whose statistics are returned.
attention_backward = define_pass(
    "attention_backward",
    "Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse",
    "",
    "(Tensor dq, Tensor dk, Tensor dv)",
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *others = inputs
    out, lse, waad, span = output
    tensors, ctx.numbers = Rule(*others[: len(Rule._fields)]).split()
    ctx.save_for_backward(q, k, v, out, lse, *tensors)
    ctx.backend = inputs[-1]
    ctx.without_gradient = [None] * len(others)
    ctx.mark_non_differentiable(lse, waad, span)


@torch.autograd.function.once_differentiable  # the backward pass is an operator without a derivative
def _backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    rule = Rule.joined(tensors, ctx.numbers)
    return *attention_backward(grad_out, q, k, v, out, lse, *rule, ctx.backend), *ctx.without_gradient


torch.library.register_autograd("rhythm_kernels::attention", _backward, setup_context=_save, lib=LIBRARY)
