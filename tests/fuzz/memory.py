"""How a tensor may lie in memory: each layout keeps its numbers, and what lies between them is NaN."""

from __future__ import annotations

import torch
from torch import Tensor

AXES = ("batch", "tokens", "heads", "size")

# Name -> (the dimensions from the outermost in memory to the innermost, counted from the last; the step between
# neighbours along the innermost; entries more than there are, in every dimension, before and behind).
LAYOUTS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "contiguous": ((-4, -3, -2, -1), 1, 0),
    "heads before tokens": ((-4, -2, -3, -1), 1, 0),
    "tokens outermost": ((-3, -4, -2, -1), 1, 0),
    "size not innermost": ((-4, -2, -1, -3), 1, 0),
    "reversed": ((-1, -2, -3, -4), 1, 0),
    "cut out of a larger one": ((-4, -3, -2, -1), 1, 3),
    "every second, cut out": ((-4, -3, -2, -1), 2, 1),
    "cut out of another order": ((-2, -4, -3, -1), 1, 1),
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The numbers of `x`, of at most four dimensions, with the strides of a layout."""
    order, step, margin = LAYOUTS[layout]
    order = tuple(x.dim() + i for i in order if x.dim() + i >= 0)
    shape = [x.shape[i] * (step if i == order[-1] else 1) + 2 * margin for i in order]
    memory = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    cut = memory[tuple(slice(margin, n - margin) for n in shape)]
    view = cut[..., ::step].permute([order.index(i) for i in range(x.dim())])
    return view.copy_(x)
