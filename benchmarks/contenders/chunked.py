"""Tile-wise maps in plain torch: a block of rows at a time, softmax over all their keys, reduced at once.

What a careful user writes today. A block that does not fit in memory is halved until it does, so that the table has a
time for every length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..gate import Results
from ..problem import AttentionProblem

Call = Callable[[], Results]
_BLOCK_BYTES = 2**28  # of float32 logits, at first


class Shrinking:
    """Calls `run(rows in a block)`; where memory runs out, halves the block and starts over, for good."""

    def __init__(self, run: Callable[[int], Results], block: int) -> None:
        self.run = run
        self.block = block

    def __call__(self) -> Results:
        while True:
            try:
                return self.run(self.block)
            except RuntimeError as error:
                if self.block == 1 or not _is_out_of_memory(error):
                    raise
            self.block //= 2  # outside of the handler, whose traceback holds the tensors


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _first_block(p: AttentionProblem) -> int:
    shape = p.shape
    return max(1, min(shape.length, _BLOCK_BYTES // (4 * shape.batch * shape.heads * shape.length)))


def _blocks(p: AttentionProblem, block: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """`(rows, A (B, H, rows, keys up to the last row) float32, t - s)` of each block of rows."""
    q, k, _ = p.heads_first
    position = torch.arange(p.shape.length, device=p.device)
    for start in range(0, p.shape.length, block):
        rows = slice(start, min(start + block, p.shape.length))
        grouped = q[:, :, rows].unflatten(1, (p.shape.kv_heads, p.kv_group)).flatten(2, 3)
        x = torch.matmul(grouped, k[:, :, : rows.stop].transpose(2, 3)).float() * p.scale
        x = x.unflatten(2, (p.kv_group, rows.stop - rows.start)).flatten(1, 2)
        distance = position[rows, None] - position[: rows.stop]
        yield rows, torch.softmax(x.masked_fill_(distance < 0, float("-inf")), dim=-1), distance.clamp(min=0)


def _rows(p: AttentionProblem, names: tuple[str, ...], block: int) -> Results:
    results = {name: p.lse.new_empty((p.shape.batch, p.shape.length)) for name in names}
    for rows, maps, distance in _blocks(p, block):
        mean = maps.mean(dim=1)
        if "waad" in names:
            results["waad"][:, rows] = (mean * distance.clamp(max=p.shape.window)).sum(dim=-1)
        if "span" in names:
            results["span"][:, rows] = (mean * distance).sum(dim=-1)
    return results


def band_rows(p: AttentionProblem) -> Call:
    return Shrinking(lambda block: _rows(p, ("waad",), block), _first_block(p))


def row_stats(p: AttentionProblem) -> Call:
    return Shrinking(lambda block: _rows(p, ("waad", "span"), block), _first_block(p))


def band_columns(p: AttentionProblem) -> Call:
    position = torch.arange(p.shape.length, device=p.device)
    count = (p.shape.length - p.shape.lo - position).clamp(0, p.shape.hi - p.shape.lo + 1)

    def run(block: int) -> Results:
        total = p.lse.new_zeros((p.shape.batch, p.shape.length))
        for rows, maps, distance in _blocks(p, block):
            band = (distance >= p.shape.lo) & (distance <= p.shape.hi)
            total[:, : rows.stop] += torch.where(band, maps.mean(dim=1), 0.0).sum(dim=1)
        return {"fai": total / count.clamp(min=1)}

    return Shrinking(run, _first_block(p))


def column_stats(p: AttentionProblem) -> Call:
    count = torch.arange(p.shape.length, 0, -1, device=p.device)

    def run(block: int) -> Results:
        total = p.lse.new_zeros((p.shape.batch, p.shape.length))
        for rows, maps, _ in _blocks(p, block):
            total[:, : rows.stop] += maps.sum(dim=2).mean(dim=1)
        return {"fai_full": total / count}

    return Shrinking(run, _first_block(p))


def column_moments(p: AttentionProblem) -> Call:
    """Two passes: the means, then the central moments about them."""
    shape = p.shape
    count = torch.arange(shape.length, 0, -1, device=p.device)
    position = torch.arange(shape.length, device=p.device)

    def run(block: int) -> Results:
        mean, m2, m3, m4 = p.lse.new_zeros((4, shape.batch, shape.heads, shape.length))
        for rows, maps, _ in _blocks(p, block):
            mean[..., : rows.stop] += maps.sum(dim=2)
        mean /= count
        for rows, maps, _ in _blocks(p, block):
            later = position[rows, None] >= position[: rows.stop]
            deviation = torch.where(later, maps - mean[:, :, None, : rows.stop], 0.0)
            square = deviation * deviation
            m2[..., : rows.stop] += square.sum(dim=2)
            m3[..., : rows.stop] += (square * deviation).sum(dim=2)
            m4[..., : rows.stop] += (square * square).sum(dim=2)
        m2, m3, m4 = m2 / count, m3 / count, m4 / count
        safe = torch.where(m2 > 0, m2, 1.0)
        results = {"mean": mean, "variance": m2, "skewness": m3 / safe.sqrt() / safe, "kurtosis": m4 / safe / safe}
        return {name: x.mean(dim=1) for name, x in results.items()}

    return Shrinking(run, max(1, _first_block(p) // 4))
