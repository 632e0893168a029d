"""The tensors of one shape, the same for every rival."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import AttentionShape, CreditShape


@dataclass(frozen=True)
class AttentionProblem:
    """q, k, v in flash-attn's layout, and the log-sum-exp that the model's own attention would have returned.

    q and k are drawn so that attention is neither flat nor one-hot (logits of standard deviation 2), v is normal.
    `lse (B, H, T)` float32 has the strides of torch's attention on that device.
    """

    shape: AttentionShape
    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor

    @classmethod
    @functools.lru_cache(maxsize=1)  # shared by suites of one shape: at a million tokens lse alone takes 10 s
    def draw(cls, shape: AttentionShape, device: torch.device, seed: int = 0) -> AttentionProblem:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(heads: int, scale: float) -> Tensor:
            size = (shape.batch, shape.length, heads, shape.dim)
            return (torch.randn(size, generator=generator, device=device) * scale).to(shape.torch_dtype)

        q, k, v = normal(shape.heads, 2**0.5), normal(shape.kv_heads, 2**0.5), normal(shape.kv_heads, 1.0)
        return cls(shape, q, k, v, attention_lse(q, k, v))

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def kv_group(self) -> int:
        """How many query heads share a kv head."""
        return self.shape.heads // self.shape.kv_heads

    @property
    def scale(self) -> float:
        return self.shape.dim**-0.5

    @functools.cached_property
    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as views `(B, H, T, D)`, k and v with their own number of heads."""
        return tuple(x.transpose(1, 2) for x in (self.q, self.k, self.v))  # type: ignore[return-value]


def attention_lse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`(B, H, T)` float32 from the attention operator that SDPA would run on this device."""
    kv_group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(kv_group, 2) for x in (k, v))
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    aten = torch.ops.aten
    if q.device.type == "cpu":
        lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)[1]
    elif q.dtype == torch.float32:
        lse = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, True)[1]
    else:
        lse = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[1]
    return lse[..., : q.shape[1]]


@dataclass(frozen=True)
class CreditProblem:
    """`(B, T)` WAAD and FAI as they come (FAI 0 near the end), and a mask of responses of different lengths."""

    shape: CreditShape
    waad: Tensor
    fai: Tensor
    mask: Tensor

    @classmethod
    def draw(cls, shape: CreditShape, device: torch.device, seed: int = 0) -> CreditProblem:
        generator = torch.Generator(device).manual_seed(seed)
        size = (shape.batch, shape.length)
        waad = 10 * torch.rand(size, generator=generator, device=device)
        fai = 0.01 * torch.rand(size, generator=generator, device=device)
        bounds = torch.rand((2, shape.batch, 1), generator=generator, device=device)
        start, end = (bounds[0] * 0.3 * shape.length).long(), shape.length - (bounds[1] * 0.3 * shape.length).long()
        position = torch.arange(shape.length, device=device)
        return cls(shape, waad, fai.masked_fill(position >= end - 10, 0.0), (position >= start) & (position < end))

    @property
    def device(self) -> torch.device:
        return self.waad.device
