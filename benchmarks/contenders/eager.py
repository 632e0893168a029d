"""The paper's way: complete attention maps `(B, H, T, T)`, as transformers' eager attention makes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..gate import Results
from ..problem import AttentionProblem
from ..shapes import Shape

Call = Callable[[], Results]


def memory(shape: Shape) -> int:
    """Bytes at its peak: two of logits and map in the input's dtype, and in 16 bits the softmax in float32 beside."""
    size = shape.batch * shape.heads * shape.length**2  # type: ignore[union-attr]
    return size * 8  # (measured: 2.03 GiB at 16 heads of 4,096 tokens in float32)


def moments_memory(shape: Shape) -> int:
    """The same, and the deviations with their powers in float32."""
    return memory(shape) + 3 * 4 * shape.batch * shape.heads * shape.length**2  # type: ignore[union-attr]


def maps(p: AttentionProblem, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`A` in the inputs' dtype, and the values of each query head; the softmax is taken in float32."""
    q, k, v = p.heads_first
    k, v = (x.repeat_interleave(p.kv_group, dim=1) for x in (k, v))
    x = torch.matmul(q, k.transpose(2, 3)) * p.scale + mask
    return torch.softmax(x, dim=-1, dtype=torch.float32).to(q.dtype), v


def _tables(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    """The causal mask to add, and `t - s` (0 above the diagonal); made once, outside of the timing."""
    position = torch.arange(p.shape.length, device=p.device)
    distance = position[:, None] - position
    mask = torch.zeros(distance.shape, dtype=p.q.dtype, device=p.device).masked_fill(distance < 0, float("-inf"))
    return mask, distance


def _of_mean_map(reduce: Callable[[AttentionProblem, Tensor, Tensor], Results]) -> Callable[[AttentionProblem], Call]:
    """A contender that reduces the mean map of its heads (eq. 8), `(B, T, T)`, by `reduce(problem, map, distance)`."""

    def make(p: AttentionProblem) -> Call:
        mask, distance = _tables(p)
        return lambda: reduce(p, maps(p, mask)[0].mean(dim=1, dtype=torch.float32), distance)

    return make


def _waad(p: AttentionProblem, mean_map: Tensor, distance: Tensor) -> Results:
    return {"waad": (mean_map * distance.clamp(0, p.shape.window)).sum(dim=-1)}


def _fai(p: AttentionProblem, mean_map: Tensor, distance: Tensor) -> Results:
    rows = (distance >= p.shape.lo) & (distance <= p.shape.hi)
    return {"fai": torch.where(rows, mean_map, 0.0).sum(dim=1) / rows.sum(dim=0).clamp(min=1)}


def _rows(p: AttentionProblem, mean_map: Tensor, distance: Tensor) -> Results:
    away = distance.clamp(min=0)
    return {**_waad(p, mean_map, distance), "span": (mean_map * away).sum(dim=-1)}


def _columns(p: AttentionProblem, mean_map: Tensor, distance: Tensor) -> Results:
    return {"fai_full": mean_map.sum(dim=1) / torch.arange(p.shape.length, 0, -1, device=p.device)}


band_rows = _of_mean_map(_waad)
band_columns = _of_mean_map(_fai)
row_stats = _of_mean_map(_rows)
column_stats = _of_mean_map(_columns)


def column_moments(p: AttentionProblem) -> Call:
    mask, distance = _tables(p)
    later = distance >= 0

    def call() -> Results:
        received = maps(p, mask)[0].float()
        count = later.sum(dim=0)
        mean = received.sum(dim=2) / count
        deviation = torch.where(later, received - mean[:, :, None], 0.0)
        square = deviation * deviation
        m2, m3, m4 = (x.sum(dim=2) / count for x in (square, square * deviation, square * square))
        safe = torch.where(m2 > 0, m2, 1.0)
        skewness, kurtosis = m3 / safe.sqrt() / safe, m4 / safe / safe
        return {
            name: x.mean(dim=1)
            for name, x in (("mean", mean), ("variance", m2), ("skewness", skewness), ("kurtosis", kurtosis))
        }

    return call


def attention(p: AttentionProblem) -> Call:
    mask, distance = _tables(p)

    def call() -> Results:
        weights, values = maps(p, mask)
        return {
            "out": torch.matmul(weights, values).transpose(1, 2),
            **_rows(p, weights.mean(dim=1, dtype=torch.float32), distance),
        }

    return call
