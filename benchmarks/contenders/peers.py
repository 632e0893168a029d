"""Attention libraries: torch's SDPA, flash-attn, and flash-colreduce (causal column sums)."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..gate import Results
from ..problem import AttentionProblem

Call = Callable[[], Results]


def installed(module: str) -> Callable[[torch.device], str]:
    """A function of the device: "" where the CUDA package `module` can be imported, else the reason not to."""

    def reason(device: torch.device) -> str:
        if device.type != "cuda":
            return f"{module} needs a GPU"
        return "" if importlib.util.find_spec(module) else f"{module} is not installed"

    return reason


def attend(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None = None) -> Tensor:
    """`F.scaled_dot_product_attention` of `(B, H, T, D)`, as `(B, T, H, D)`; None: by the kernel that torch chooses."""
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        gqa = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)


def sdpa(p: AttentionProblem) -> Call:
    """The forward of `F.scaled_dot_product_attention`, by the kernel that torch chooses."""
    return lambda: {"out": attend(*p.heads_first)}


def _held_to(backend: SDPBackend, p: AttentionProblem) -> Call:
    """The same, held to one of torch's operators; k and v expanded outside of the timing where it knows no groups."""
    inputs = p.heads_first
    try:
        attend(*inputs, backend)
    except RuntimeError as error:
        if "kernel" not in str(error):  # as in "No available kernel"
            raise
        q, k, v = inputs
        inputs = q, k.repeat_interleave(p.kv_group, dim=1), v.repeat_interleave(p.kv_group, dim=1)
    return lambda: {"out": attend(*inputs, backend)}


def sdpa_flash(p: AttentionProblem) -> Call:
    """torch's FlashAttention 2."""
    return _held_to(SDPBackend.FLASH_ATTENTION, p)


def sdpa_cudnn(p: AttentionProblem) -> Call:
    """cuDNN's attention, which torch prefers on some GPUs."""
    return _held_to(SDPBackend.CUDNN_ATTENTION, p)


def flash_attn(p: AttentionProblem) -> Call:
    """flash-attn 2, with its log-sum-exp."""
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    def call() -> Results:
        out, lse, _ = flash_attn_func(p.q, p.k, p.v, causal=True, return_attn_probs=True)
        return {"out": out, "lse": lse}

    return call


def flash_colreduce(p: AttentionProblem) -> Call:
    """Its causal mean over each column; k is expanded outside of the timing, as it knows no grouped heads."""
    from flash_colreduce import flash_colreduce as reduce  # type: ignore[import-not-found]

    q, k, _ = p.heads_first
    k = k.repeat_interleave(p.kv_group, dim=1)
    return lambda: {"fai_full": reduce(q, k, reduction="mean", is_causal=True).mean(dim=1, dtype=torch.float32)}
