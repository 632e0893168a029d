"""WAAD and FAI from the attention maps of an eager model: the paper's way, and the best of today's practice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rhythm_kernels import HeadGroups

from ..gate import Results
from ..shapes import ModelShape


class _Sums:
    """The sums of the head groups' maps (eq. 8) over the layers met so far, and the measures of them."""

    def __init__(self, shape: ModelShape, groups: HeadGroups) -> None:
        self.shape, self.groups = shape, groups
        self.layers = {layer for layer, _ in [*groups.local, *groups.global_]}
        self.local: Tensor | float = 0.0
        self.global_: Tensor | float = 0.0

    def add(self, layer: int, maps: Tensor) -> None:
        """One layer's maps `(B, H, T, T)`."""
        local, global_ = ([h for at, h in group if at == layer] for group in (self.groups.local, self.groups.global_))
        if local:
            self.local = self.local + maps[:, local].sum(dim=1, dtype=torch.float32)
        if global_:
            self.global_ = self.global_ + maps[:, global_].sum(dim=1, dtype=torch.float32)

    def measures(self, response: Tensor | None) -> Results:
        """`(B, T)` each; `response (B, T)` bool: the rows that count and the tokens that are scored, None: all."""
        assert isinstance(self.local, Tensor) and isinstance(self.global_, Tensor)
        length = self.local.shape[1]
        position = torch.arange(length, device=self.local.device)
        distance = position[:, None] - position
        band = (distance >= self.shape.lo) & (distance <= self.shape.hi)
        waad = (self.local * distance.clamp(0, self.shape.window)).sum(dim=-1) / len(self.groups.local)
        if response is None:
            rows, count = band, band.sum(dim=0)
        else:
            rows = band & response[:, :, None]  # (B, T, T)
            count = rows.sum(dim=1)
        fai = torch.where(rows, self.global_, 0.0).sum(dim=1) / count.clamp(min=1) / len(self.groups.global_)
        if response is None:
            return {"waad": waad, "fai": fai}
        return {"waad": torch.where(response, waad, 0.0), "fai": torch.where(response, fai, 0.0)}


@torch.no_grad()
def with_maps(
    decoder: Any, shape: ModelShape, groups: HeadGroups, ids: Tensor, live: Tensor | None, response: Tensor | None
) -> Results:
    """The paper's way: a forward that returns every layer's maps. `live (B, T)` is the attention mask."""
    maps = decoder(ids, attention_mask=live, use_cache=False, output_attentions=True).attentions
    sums = _Sums(shape, groups)
    for layer in sorted(sums.layers):
        sums.add(layer, maps[layer])
    return sums.measures(response)


@torch.no_grad()
def with_hooks(
    decoder: Any, shape: ModelShape, groups: HeadGroups, ids: Tensor, live: Tensor | None, response: Tensor | None
) -> Results:
    """The best of today's practice: a hook reduces each layer's maps and lets them go."""
    sums = _Sums(shape, groups)

    def hook(layer: int) -> Callable[..., Any]:
        def reduce(module: nn.Module, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
            if layer in sums.layers:
                sums.add(layer, output[1])
            return (output[0], None, *output[2:])

        return reduce

    handles = [layer.self_attn.register_forward_hook(hook(index)) for index, layer in enumerate(decoder.layers)]
    try:
        decoder(ids, attention_mask=live, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return sums.measures(response)


def maps_memory(shape: ModelShape) -> int:
    """Bytes of all layers' maps, and of one layer's softmax."""
    size = shape.batch * shape.heads * shape.length**2
    return size * (shape.layers * shape.torch_dtype.itemsize + 8)


def layer_memory(shape: ModelShape) -> int:
    """Bytes of one layer's maps."""
    return shape.batch * shape.heads * shape.length**2 * (2 * shape.torch_dtype.itemsize + 8)
