"""`probe`: one forward pass of a model, with and without the measures."""

from __future__ import annotations

from ..shapes import ModelShape
from ..work import Work, pairs


def parameters(shape: ModelShape) -> int:
    """Weights of the decoder's matrices: attention, gated MLP; the head reads one position and is left out."""
    attention = shape.hidden * shape.dim * (2 * shape.heads + 2 * shape.kv_heads)
    return shape.layers * (attention + 3 * shape.hidden * shape.intermediate)


def work(shape: ModelShape) -> Work:
    """The forward alone: weights once, two operations a weight and token, and causal attention."""
    tokens = shape.batch * shape.length
    attention = 4 * shape.dim * shape.heads * shape.layers * shape.batch * pairs(shape.length, 0, None)
    itemsize = shape.torch_dtype.itemsize
    return Work(parameters(shape) * itemsize, 2 * parameters(shape) * tokens + attention)
