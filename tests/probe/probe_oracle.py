"""The paper's formulas on full attention maps, in float64: what the probe is held to.

The maps are those that the eager implementation returns with `output_attentions=True`; nothing here knows of q, k, lse,
or of the package under test.
"""

from __future__ import annotations

import torch
from torch import Tensor

Head = tuple[int, int]
Bounds = list[tuple[int, int, int]]  # (row, start, end) of each live sequence


def eager_maps(model, **inputs) -> dict[int, Tensor]:
    """Layer -> `(B, H, T, T)` float64, from the eager implementation of the same model (which is left as it was)."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    return {layer: one.double() for layer, one in enumerate(maps) if one is not None}


def padded_bounds(mask: Tensor) -> Bounds:
    """Live ranges of a `(B, T)` mask."""
    bounds = []
    for row, live in enumerate(mask.bool()):
        index = live.nonzero().flatten()
        bounds.append((row, int(index[0]), int(index[-1]) + 1) if index.numel() else (row, 0, 0))
    return bounds


def responses(bounds: Bounds, response_mask: Tensor | None) -> list[tuple[int, int, int, int]]:
    """(row, start, first of R, end of R) per sequence: R runs from first to last True."""
    out = []
    for row, start, end in bounds:
        first, last = start, end
        if response_mask is not None:
            index = response_mask[row, start:end].bool().nonzero().flatten()
            first, last = (start + int(index[0]), start + int(index[-1]) + 1) if index.numel() else (end, end)
        out.append((row, start, first, last))
    return out


def group_map(maps: dict[int, Tensor], heads: list[Head]) -> Tensor:
    """Eq. 8: `(B, T, T)`."""
    return torch.stack([maps[layer][:, head] for layer, head in heads]).mean(0)


def oracle(maps, groups, bounds: Bounds, response_mask=None, window=10, horizon=(10, 100)) -> tuple[Tensor, Tensor]:
    """WAAD (eq. 9) and FAI (eq. 10), `(B, T)` float64."""
    local, global_ = group_map(maps, groups.local), group_map(maps, groups.global_)
    batch, length = local.shape[:2]
    waad, fai = torch.zeros(2, batch, length, dtype=torch.float64)
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    low, high = horizon[0], length if horizon[1] is None else horizon[1]
    for row, start, first, end in responses(bounds, response_mask):
        for t in range(first, end):
            keys = slice(start, t + 1)
            waad[row, t] = (local[row, t, keys] * distance[t, keys].clamp(max=window)).sum()
            rows = slice(min(t + low, end), min(t + high + 1, end))
            if rows.stop > rows.start:
                fai[row, t] = global_[row, rows, t].mean()
    return waad, fai


def spans(cases) -> dict[Head, float]:
    """Eq. 7 pooled over `cases`, each (maps, bounds, response mask)."""
    total: dict[Head, float] = {}
    count = 0
    for batch_maps, bounds, response_mask in cases:
        for row, start, first, end in responses(bounds, response_mask):
            count += end - first
            for layer, one in batch_maps.items():
                position = torch.arange(one.shape[-1])
                distance = (position[:, None] - position[None, :]).clamp(min=0)
                span = (one[row, :, first:end, start:end] * distance[first:end, start:end]).sum(dim=(1, 2))
                for head, value in enumerate(span.tolist()):
                    total[layer, head] = total.get((layer, head), 0.0) + value
    return {head: value / count for head, value in total.items()}


def kurtoses(maps, bounds: Bounds, response_mask=None, least=4) -> dict[Head, float]:
    """By head, the mean over responses of the kurtosis over tokens s of R of the mean of A[t, s], t in R >= s + least.

    Responses with fewer than two such tokens are left out; one whose tokens all receive the same counts as 0.
    """
    total: dict[Head, float] = {}
    count = 0
    for row, _, first, end in responses(bounds, response_mask):
        if end - least - first < 2:
            continue
        count += 1
        for layer, one in maps.items():
            received = torch.stack([one[row, :, s + least : end, s].mean(1) for s in range(first, end - least)], dim=1)
            centred = received - received.mean(1, keepdim=True)
            variance = centred.square().mean(1)
            kurtosis = torch.where(variance > 0, centred.pow(4).mean(1) / variance.square(), 0.0)
            for head, value in enumerate(kurtosis.tolist()):
                total[layer, head] = total.get((layer, head), 0.0) + value
    return {head: value / count for head, value in total.items()}
