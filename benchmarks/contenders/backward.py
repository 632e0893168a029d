"""The backward pass of attention, by autograd as users run it: the forward is made once, outside of the timing."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import rhythm_kernels as rk

from ..gate import WHOLE, Results, tail_rows, worst
from ..problem import AttentionProblem
from .peers import attend

Call = Callable[[], Results]
# What rounding to the inputs' dtype may cost, beside the largest value of a gradient: out, P and dP are all rounded.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def upstream(p: AttentionProblem) -> Tensor:
    """The gradient of the output `(B, T, H, D)`, drawn anew from the same seed."""
    generator = torch.Generator(p.device).manual_seed(1)
    return torch.randn(p.q.shape, generator=generator, device=p.device).to(p.q.dtype)


def _gradients(p: AttentionProblem, forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
    inputs = tuple(x.detach().requires_grad_() for x in (p.q, p.k, p.v))
    out, grad = forward(*inputs), upstream(p)

    def call() -> Results:
        dq, dk, dv = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        return {"dq": dq, "dk": dk, "dv": dv}

    return call


def ours(backend: str | None) -> Callable[[AttentionProblem], Call]:
    """The recomputing backward of `attention_with_rhythm`."""

    def forward(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return rk.attention_with_rhythm(q, k, v, window=window, backend=backend)[0]

    return lambda p: _gradients(p, functools.partial(forward, window=p.shape.window))


def _sdpa(p: AttentionProblem, backend: SDPBackend | None = None) -> Call:
    return _gradients(p, lambda *inputs: attend(*(x.transpose(1, 2) for x in inputs), backend=backend))


def sdpa(p: AttentionProblem) -> Call:
    """The operator that torch chooses."""
    return _sdpa(p)


def sdpa_flash(p: AttentionProblem) -> Call:
    """torch's FlashAttention 2."""
    return _sdpa(p, SDPBackend.FLASH_ATTENTION)


def sdpa_cudnn(p: AttentionProblem) -> Call:
    """cuDNN's attention."""
    return _sdpa(p, SDPBackend.CUDNN_ATTENTION)


class BackwardGate:
    """Gradients in float64, in two parts that are exact whatever T is.

    The last rows give dq of those rows and, since no other row sees their keys, dk and dv of these keys. The first
    rows see the first keys alone, which gives their dq.
    """

    def __init__(self, problem: AttentionProblem) -> None:
        self.problem = problem
        self.length = problem.shape.length
        self.first = self.length - min(self.length, tail_rows(problem.shape))

    def _definition(self, rows: slice) -> Results:
        """dq of `rows`, and dk and dv of the keys in `rows` from these rows; all `(B, rows, heads, D)` float64."""
        p, kv_heads = self.problem, self.problem.shape.kv_heads
        q, grad = (x[:, rows].double().unflatten(2, (kv_heads, p.kv_group)) for x in (p.q, upstream(p)))
        k, v = (x[:, : rows.stop].double() for x in (p.k, p.v))
        x = torch.einsum("btkgd,bskd->bkgts", q, k) * p.scale
        position = torch.arange(rows.stop, device=p.device)
        x.masked_fill_(position[rows, None] < position, float("-inf"))
        maps = torch.softmax(x, dim=-1)
        change = torch.einsum("btkgd,bskd->bkgts", grad, v)
        dx = maps * (change - (maps * change).sum(dim=-1, keepdim=True)) * p.scale
        own = slice(rows.start, rows.stop)
        return {
            "dq": torch.einsum("bkgts,bskd->btkgd", dx, k).flatten(2, 3),
            "dk": torch.einsum("bkgts,btkgd->bskd", dx[..., own], q),
            "dv": torch.einsum("bkgts,btkgd->bskd", maps[..., own], grad),
        }

    @functools.cached_property
    def _want(self) -> dict[str, tuple[slice, Results]]:
        whole = slice(0, min(WHOLE, self.length))
        tail = slice(self.first, self.length)
        found = {"tail": (tail, self._definition(tail))}
        if self.first > 0:
            found["head"] = whole, {"dq": self._definition(whole)["dq"]}
        return found

    def error(self, got: Results) -> tuple[float, str]:
        """The largest error in units of its tolerance, and where it was found."""
        errors = []
        for where, (rows, want) in self._want.items():
            for name in sorted(want.keys() & got.keys()):
                wanted = want[name]
                limit = _ROUNDING[self.problem.q.dtype] * max(1.0, float(wanted.abs().max()))
                errors.append((worst(got[name][:, rows], wanted, limit), f"{name} of the {where}"))
        return max(errors, default=(0.0, ""))
