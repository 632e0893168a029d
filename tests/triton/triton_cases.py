"""Cases of the Triton passes in canonical form, and their float64 answers from the dense definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rhythm_kernels.reference import formulas
from rhythm_kernels.rule import Rule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Case:
    """One canonical input; `table` holds `(row, start, end, response_start)`, `heads` the query heads."""

    length: int = 40
    batch: int = 1
    n_heads: int = 2
    kv_heads: int = 1
    head_size: int = 16
    dtype: torch.dtype = torch.float32
    table: list[tuple[int, int, int, int]] | None = None
    heads: list[int] | None = None
    scale: float = 0.0
    softcap: float = 0.0
    window_left: int = -1
    with_sinks: bool = False
    head_major: bool = False
    seed: int = 0
    magnitude: float = 1.5
    q: Tensor = field(init=False)
    k: Tensor = field(init=False)
    sinks: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def tokens(heads: int) -> Tensor:
            x = torch.randn(self.batch, self.length, heads, self.head_size, generator=generator)
            x = (x * self.magnitude).to(self.dtype).to(DEVICE)
            return x.transpose(1, 2).contiguous().transpose(1, 2) if self.head_major else x

        self.q, self.k = tokens(self.n_heads), tokens(self.kv_heads)
        self.sinks = torch.randn(self.n_heads, generator=generator).to(DEVICE) if self.with_sinks else None
        self.scale = self.scale or self.head_size**-0.5
        if self.table is None:
            self.table = [(row, 0, self.length, 0) for row in range(self.batch)]
        if self.heads is None:
            self.heads = list(range(self.n_heads))

    @property
    def seqs(self) -> Tensor:
        return torch.tensor(self.table, dtype=torch.int32, device=DEVICE).reshape(-1, 4)

    @property
    def head_table(self) -> Tensor:
        return torch.tensor([[h, h] for h in self.heads], dtype=torch.int32, device=DEVICE)

    @property
    def max_seqlen(self) -> int:
        return max((end - start for _, start, end, _ in self.table), default=0)

    @property
    def rule(self) -> Rule:
        left = min(self.window_left, self.length)
        return Rule(self.seqs, self.head_table, self.max_seqlen, self.scale, self.softcap, left, self.sinks)

    def given(self, lse: Tensor | None = None) -> dict[str, Any]:
        """The arguments that every pass has."""
        known = {} if lse is None else {"lse": lse}
        return {"q": self.q, "k": self.k, **known, "rule": self.rule}

    def maps(self, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """`A (Hs, n, n)` and `lse (H, n)` of one sequence, float64."""
        q, k = self.q[row, start:end].double(), self.k[row, start:end].double()
        sinks = None if self.sinks is None else self.sinks.double()
        x = formulas.logits(q, k, softmax_scale=self.scale, window_size=(self.window_left, -1), softcap=self.softcap)
        lse = formulas.row_lse(x, sinks)
        return torch.exp(x - lse[..., None])[self.heads], lse

    def lse(self) -> Tensor:
        """`(B, H, T)` float32 as an attention would hand it over; NaN where there is no token."""
        out = torch.full((self.batch, self.n_heads, self.length), float("nan"), device=DEVICE)
        for row, start, end, _ in self.table:
            if end > start:
                out[row, :, start:end] = self.maps(row, start, end)[1].float()
        return out

    def dense(self, measure: Callable[[Tensor, Tensor, int], Tensor], fill: float = 0.0) -> Tensor:
        """`measure(A, lse, first response row) -> (Hs, n)` laid out as `(B, Hs, T)` float64."""
        out = torch.full((self.batch, len(self.heads), self.length), fill, dtype=torch.float64, device=DEVICE)
        for row, start, end, response in self.table:
            if end > start:
                maps, lse = self.maps(row, start, end)
                values = measure(maps, lse[self.heads], response - start)
                out[row, :, response:end] = values[:, response - start :]
        return out


def distances(n: int) -> Tensor:
    """`(n, n)`: t - s."""
    position = torch.arange(n, device=DEVICE)
    return position[:, None] - position[None, :]


def waad(window: int) -> Callable[[Tensor, Tensor, int], Tensor]:
    return lambda maps, lse, first: (maps * distances(maps.shape[-1]).clamp(0, window)).sum(-1)


def span(maps: Tensor, lse: Tensor, first: int) -> Tensor:
    return (maps * distances(maps.shape[-1]).clamp(min=0)).sum(-1)


def row_lse(maps: Tensor, lse: Tensor, first: int) -> Tensor:
    return lse


def rows_after(n: int, first: int, lo: int, hi: int | None) -> Tensor:
    """`(n, n)` bool: rows of the response at distance `lo .. hi`."""
    distance = distances(n)
    rows = (distance >= lo) & (torch.arange(n, device=DEVICE) >= first)[:, None]
    return rows if hi is None else rows & (distance <= hi)


def fai(lo: int, hi: int | None) -> Callable[[Tensor, Tensor, int], Tensor]:
    def measure(maps: Tensor, lse: Tensor, first: int) -> Tensor:
        rows = rows_after(maps.shape[-1], first, lo, hi)
        return torch.where(rows, maps, 0.0).sum(1) / rows.sum(0).clamp(min=1)

    return measure


def moments(min_distance: int) -> list[Callable[[Tensor, Tensor, int], Tensor]]:
    """Count, mean, population variance, skewness and kurtosis."""

    def moment(which: int) -> Callable[[Tensor, Tensor, int], Tensor]:
        def measure(maps: Tensor, lse: Tensor, first: int) -> Tensor:
            rows = rows_after(maps.shape[-1], first, min_distance, None)
            count = rows.sum(0).double().expand(maps.shape[0], -1)
            mean = torch.where(rows, maps, 0.0).sum(1) / count.clamp(min=1)
            central = torch.where(rows, maps - mean[:, None], 0.0)
            m2, m3, m4 = ((central**p).sum(1) / count.clamp(min=1) for p in (2, 3, 4))
            spread = (m2 > 0) & (count >= 2)
            safe = torch.where(spread, m2, 1.0)
            skewness = torch.where(spread, m3 / safe**1.5, 0.0)
            kurtosis = torch.where(spread, m4 / safe**2, 0.0)
            return (count, mean, m2, skewness, kurtosis)[which]

        return measure

    return [moment(i) for i in range(5)]
