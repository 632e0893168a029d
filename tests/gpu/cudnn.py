"""Whether cuDNN's attention gives the same bits when it is also asked for its log-sum-exp, settled on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rhythm_kernels.probe import lse


class AttentionCall(NamedTuple):
    """One call as transformers makes it; `padded` gives the first row a mask with left padding."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    size: int
    dtype: torch.dtype = torch.bfloat16
    padded: bool = False

    def inputs(self, device: torch.device | str) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, object]]:
        """q, k, v `(B, H, T, D)`, views of `(B, T, H, D)`, and the call's keyword arguments."""
        generator = torch.Generator().manual_seed(self.length)
        q, k, v = (
            torch.randn(self.batch, self.length, heads, self.size, generator=generator)
            .to(device, self.dtype)
            .transpose(1, 2)
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        if not self.padded:
            return (q, k, v), {"is_causal": True, "enable_gqa": self.heads != self.kv_heads}
        group = self.heads // self.kv_heads  # with a mask transformers repeats the key heads itself
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        mask = torch.ones(self.batch, 1, self.length, self.length, dtype=torch.bool, device=device).tril()
        mask[0, :, :, : self.length // 3] = False
        return (q, k, v), {"attn_mask": mask | torch.eye(self.length, dtype=torch.bool, device=device)}


CALLS = (
    AttentionCall(1, 8192, 16, 8, 128),
    AttentionCall(2, 1024, 16, 8, 64),
    AttentionCall(2, 333, 32, 8, 128),
    AttentionCall(1, 2048, 8, 8, 128, torch.float16),
    AttentionCall(2, 1024, 16, 8, 128, padded=True),
    AttentionCall(3, 77, 4, 1, 64, torch.float16, padded=True),
)


def with_and_without(
    call: AttentionCall, device: torch.device | str, operator: SDPBackend = SDPBackend.CUDNN_ATTENTION
) -> tuple[Tensor, Tensor, lse.LseObserver]:
    """The output of a call without gradients as a probe makes torch compute it, as torch does alone, and what was seen.

    Raises:
        RuntimeError: torch has no such operator for this call.
    """
    inputs, options = call.inputs(device)
    with torch.no_grad(), sdpa_kernel(operator):
        alone = scaled_dot_product_attention(*inputs, **options)
        with lse.LseObserver() as seen:
            observed = scaled_dot_product_attention(*inputs, **options)
    return observed, alone, seen


def settle_cudnn(device: torch.device | str, calls: Sequence[AttentionCall] = CALLS) -> tuple[str, str]:
    """Decide for this process whether cuDNN is asked for its log-sum-exp.

    Returns what went wrong, "" if nothing, and what was found. Where an output has other bits when asked,
    `rhythm_kernels.probe.lse.RAISE_CUDNN_FLAG` is set to False: the log-sum-exp is then streamed without gradients.
    """
    if torch.device(device).type != "cuda":
        return "", "cuDNN attention is not available: no CUDA device"
    same, unavailable = [], []
    for call in calls:
        try:
            observed, alone, seen = with_and_without(call, device)
        except RuntimeError as error:
            unavailable.append(f"{call}: {error}")
            continue
        if not torch.equal(observed, alone):
            lse.RAISE_CUDNN_FLAG = False
            most = float((observed.float() - alone.float()).abs().max())
            trouble = (
                f"cuDNN attention rounds otherwise when asked for its log-sum-exp ({call}: by up to {most:.3g}), so it "
                "is not asked in this process: set RAISE_CUDNN_FLAG = False in rhythm_kernels/probe/lse.py"
            )
            return trouble, "the log-sum-exp of cuDNN attention is streamed where there are no gradients"
        if seen.lse is None:
            return f"cuDNN attention ({call}) gave no log-sum-exp, source {seen.source!r}", "nothing was settled"
        same.append(call)
    if not same:
        return "", f"cuDNN attention is not available: {unavailable[0]}"
    found = f"cuDNN's output is the same bits with and without its log-sum-exp in {len(same)} calls"
    return "", f"{found}; not available in {len(unavailable)}" if unavailable else found
