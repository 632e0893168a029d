"""The log-sum-exp of an attention call, read from the operator that computed it.

`F.scaled_dot_product_attention` and `flash_attn_func` return the output alone, but the operators under them return the
log-sum-exp beside it. `LseObserver` watches the operators that one attention call runs and keeps the log-sum-exp of the
attention operator among them. It chooses nothing and replaces nothing: torch picks its kernel as it would without us,
and autograd above is untouched. Where no operator that returns one ran (torch's math path, eager attention, an unknown
kernel), the caller streams it from q and k instead.

Two operators of torch take a flag, `compute_log_sumexp`, which torch raises where gradients are wanted and not
otherwise; without gradients the observer raises it. The efficient kernel then stores the log-sum-exp beside the same
output. cuDNN, which torch >= 2.11 prefers on sm_90, builds another graph with it (`is_inference` becomes false), whose
engine need not round alike: `RAISE_CUDNN_FLAG` says whether to ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .checks import Checks, reads_now

_EFFICIENT = "aten::_scaled_dot_product_efficient_attention"
_CUDNN = "aten::_scaled_dot_product_cudnn_attention"
_RHYTHM = "rhythm_kernels::attention"
_COMPUTE_LSE = 4  # position of `compute_log_sumexp` in the schemas of the two operators above (torch 2.10 to 2.13)

# Whether cuDNN is asked for its log-sum-exp where torch does not ask: if not, it is streamed from q and k in forwards
# without gradients (two passes O(T^2) a layer). True rests on the output being the same bits with and without the flag:
# tests/gpu/test_lse_source.py asserts that on a GPU, and no GPU has run it yet.
RAISE_CUDNN_FLAG = True

# operator -> name of the source reported to the user; the second output of each is the natural log-sum-exp, float32.
_ATEN_SOURCES = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "sdpa: CPU flash attention",
    "aten::_scaled_dot_product_flash_attention": "sdpa: CUDA flash attention",
    _EFFICIENT: "sdpa: CUDA efficient attention",
    _CUDNN: "sdpa: cuDNN attention",
    _RHYTHM: "rhythm attention",
}
# flash-attn registers these under its own namespace, and the kernels hub under one per build: matched without it.
_FLASH_SOURCES = {
    "_flash_attn_forward": "flash-attn",
    "_flash_attn_varlen_forward": "flash-attn (varlen)",
}


class LseObserver(TorchDispatchMode):
    """Context manager around one attention call; afterwards `lse` and `source` tell what was seen.

    Attributes:
        lse: float32, in the operator's own layout (`(B, H, T)`, `(H, total)` for variable lengths), or None.
        source: the operator in words, or None.
        dtype: the dtype in which the operator read q, which autocast may have lowered; None if none was seen.
        has_sinks: whether the operator knows of attention sinks, so that `lse` holds them where there are any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lse: Tensor | None = None
        self.source: str | None = None
        self.dtype: torch.dtype | None = None
        self.has_sinks = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            # Inference tensors carry no autograd key, so the composite operator itself arrives here.
            with self:
                return func.decompose(*args, **kwargs)
        name = func._schema.name
        source = _ATEN_SOURCES.get(name) or _FLASH_SOURCES.get(name.rpartition("::")[2])
        if source is None:
            return func(*args, **kwargs)
        if name == _EFFICIENT or (name == _CUDNN and RAISE_CUDNN_FLAG):
            args = (*args[:_COMPUTE_LSE], True, *args[_COMPUTE_LSE + 1 :])
        result = func(*args, **kwargs)
        if name != _CUDNN or args[_COMPUTE_LSE]:
            self.lse, self.source, self.dtype = result[1], source, args[0].dtype
            self.has_sinks = name == _RHYTHM
        return result


def as_batched(lse: Tensor, batch: int, heads: int, length: int, live: Tensor | None, checks: Checks) -> Tensor | None:
    """Bring an observed log-sum-exp to `(B, H, T)`, or None where its layout is not one we know.

    Args:
        lse: as observed.
        live: `(B, T)` bool, the tokens that a padded call left in its `(H, total)` result; None if it kept all.
    """
    if lse.dim() == 4 and lse.shape[-1] == 1:  # cuDNN keeps the reduced dimension
        lse = lse.squeeze(-1)
    if lse.shape == (1, heads, batch * length):
        return lse.unflatten(2, (batch, length))[0].transpose(0, 1)  # ours, over several packed batch rows
    if lse.dim() == 3 and lse.shape[:2] == (batch, heads) and lse.shape[2] >= length:
        return lse[..., :length]  # the efficient kernel pads T to its alignment
    if length == 1 and lse.numel() == batch * heads:  # kernels may take the heads of a single query for queries
        return lse.reshape(batch, heads, 1)
    if lse.dim() == 2 and lse.shape[0] != heads:
        lse = lse.T  # flash-attn's Triton backend gives (total, H)
    if lse.dim() == 2 and lse.shape[0] == heads:
        if live is None:
            return lse.unflatten(1, (batch, length)).transpose(0, 1) if lse.shape[1] == batch * length else None
        flat = live.flatten()
        place = flat.cumsum(0)  # of each live token in lse, counted from 1
        fits = place[-1] == lse.shape[1]
        if reads_now(lse.device) and not bool(fits):
            return None
        error = "attention_mask must leave out as many tokens as the attention kernel did, got another number of them"
        checks.require(fits, ValueError(error))
        if lse.shape[1] == 0:  # a batch of padding alone
            return lse.new_zeros((batch, heads, length))
        at = (place - 1).clamp(0, lse.shape[1] - 1)
        return torch.where(flat, lse[:, at], 0.0).unflatten(1, (batch, length)).transpose(0, 1)
    return None
