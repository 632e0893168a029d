"""Definition of an op: a schema, one real kernel for every device, one fake kernel for tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import dispatch

LIBRARY = torch.library.Library("rhythm_kernels", "DEF")

# What every pass takes after its tensors: the sequence table, the head table and the score rule of the canonical form.
RULE = "Tensor seqs, Tensor heads, SymInt max_seqlen, float scale, float softcap, SymInt window_left, Tensor? sinks"


def define(name: str, arguments: str, returns: str, fake: Callable[..., Any]) -> Any:
    """Register `rhythm_kernels::name`, whose last argument is the backend (None: the best), and return its overload.

    The passes give no gradients (results are detached), so one kernel serves all devices, below autograd.
    """
    LIBRARY.define(f"{name}({arguments}, str? backend) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))

    def kernel(*args: Any) -> Any:
        return dispatch.run(name, args[-1], *args[:-1])

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rhythm_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.rhythm_kernels, name).default


def per_token(q: Tensor, heads: Tensor, per_head: bool, *leading: int) -> Tensor:
    """An unwritten float32 result of a pass: `(*leading, B, T)`, or `(*leading, B, H_selected, T)`."""
    batch, length = q.shape[:2]
    middle = (heads.shape[0],) if per_head else ()
    return q.new_empty((*leading, batch, *middle, length), dtype=torch.float32)
