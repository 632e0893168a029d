"""WAAD and FAI from the attention maps of an eager model: the paper's way, and the best of today's practice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rhythm_kernels import HeadGroups

from ..gate import Results
from ..shapes import ModelShape

_ROWS = 256  # of the maps are reduced at a time: beside a map, what that takes is little


class _Sums:
    """The measures of the head groups' maps, summed over the layers met so far (they are linear in the maps: eq. 8)."""

    def __init__(self, shape: ModelShape, groups: HeadGroups, response: Tensor | None) -> None:
        self.shape, self.groups, self.response = shape, groups, response
        self.layers = {layer for layer, _ in [*groups.local, *groups.global_]}
        self.waad: Tensor | float = 0.0
        self.fai: Tensor | float = 0.0

    def add(self, layer: int, maps: Tensor) -> None:
        """One layer's maps `(B, H, T, T)`, a few rows at a time: nothing of their size is made."""
        local, global_ = ([h for at, h in group if at == layer] for group in (self.groups.local, self.groups.global_))
        length, shape = maps.shape[2], self.shape
        keys = torch.arange(length, device=maps.device)
        waad = []
        for start in range(0, length, _ROWS):
            rows = slice(start, min(start + _ROWS, length))
            distance = keys[rows, None] - keys
            if local:
                block = maps[:, local, rows].sum(dim=1, dtype=torch.float32)
                waad.append((block * distance.clamp(0, shape.window)).sum(dim=-1))
            if global_:
                block = maps[:, global_, rows].sum(dim=1, dtype=torch.float32)
                counts = (distance >= shape.lo) & (distance <= shape.hi)
                if self.response is not None:
                    counts = counts & self.response[:, rows, None]
                self.fai = self.fai + torch.where(counts, block, 0.0).sum(dim=1)
        if local:
            self.waad = self.waad + torch.cat(waad, dim=1)

    def measures(self) -> Results:
        """`(B, T)` each; with a response, its rows count and its tokens are scored."""
        assert isinstance(self.waad, Tensor) and isinstance(self.fai, Tensor)
        response = self.response
        rows = torch.ones_like(self.fai) if response is None else response.float()
        # How many rows look back at a token over a distance within the horizon: a difference of sums.
        until = nn.functional.pad(rows.cumsum(dim=1), (1, 0))
        last = rows.shape[1]
        keys = torch.arange(last, device=rows.device)
        count = until[:, (keys + self.shape.hi + 1).clamp(max=last)] - until[:, (keys + self.shape.lo).clamp(max=last)]
        waad = self.waad / len(self.groups.local)
        fai = self.fai / count.clamp(min=1) / len(self.groups.global_)
        if response is None:
            return {"waad": waad, "fai": fai}
        return {"waad": torch.where(response, waad, 0.0), "fai": torch.where(response, fai, 0.0)}


@torch.no_grad()
def with_maps(
    decoder: Any, shape: ModelShape, groups: HeadGroups, ids: Tensor, live: Tensor | None, response: Tensor | None
) -> Results:
    """The paper's way: a forward that returns every layer's maps. `live (B, T)` is the attention mask."""
    maps = decoder(ids, attention_mask=live, use_cache=False, output_attentions=True).attentions
    sums = _Sums(shape, groups, response)
    for layer in sorted(sums.layers):
        sums.add(layer, maps[layer])
    return sums.measures()


@torch.no_grad()
def with_hooks(
    decoder: Any, shape: ModelShape, groups: HeadGroups, ids: Tensor, live: Tensor | None, response: Tensor | None
) -> Results:
    """The best of today's practice: a hook reduces each layer's maps and lets them go."""
    sums = _Sums(shape, groups, response)

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
    return sums.measures()


def _softmax(shape: ModelShape, device: str) -> int:
    """Bytes of one layer's maps while they are made, and of the mask of all layers.

    In float32 two at a time, as logits are scaled, masked and exponentiated. Of 16 bits, one beside the float32 softmax
    and its copy in 16 bits; torch's CPU softmax first makes a float32 copy of its input.
    """
    itemsize = shape.torch_dtype.itemsize
    made = 8 if itemsize == 4 or device != "cpu" else 10
    return shape.batch * shape.length**2 * (shape.heads * made + itemsize)


def maps_memory(shape: ModelShape, device: str) -> int:
    """Bytes of all layers' maps at the peak: while the last ones are made."""
    kept = shape.batch * shape.heads * shape.length**2 * shape.torch_dtype.itemsize
    return (shape.layers - 1) * kept + _softmax(shape, device)


def layer_memory(shape: ModelShape, device: str) -> int:
    """Bytes at the peak where one layer's maps are kept until they are reduced."""
    return _softmax(shape, device)
