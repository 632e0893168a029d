"""Attention libraries: torch's SDPA, flash-attn, and flash-colreduce (causal column sums)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
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


def sdpa(p: AttentionProblem) -> Call:
    """The forward of `F.scaled_dot_product_attention`, by the kernel that torch chooses."""
    q, k, v = p.heads_first
    return lambda: {"out": F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)}


def sdpa_flash(p: AttentionProblem) -> Call:
    """The same, held to torch's FlashAttention."""
    call = sdpa(p)

    def flash() -> Results:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return call()

    return flash


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
    k = k.repeat_interleave(p.group, dim=1)
    return lambda: {"fai_full": reduce(q, k, reduction="mean", is_causal=True).mean(dim=1, dtype=torch.float32)}
