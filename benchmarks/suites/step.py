"""`grpo_step`, `countdown_step`: a GRPO step with and without credit."""

from __future__ import annotations

from dataclasses import replace

from ..contenders.eager_model import layer_memory
from ..shapes import Shape, StepShape, TrainerShape
from ..work import Work
from . import probe


def weights(shape: StepShape) -> int:
    """Weights of the decoder's matrices, its embeddings and its head."""
    return probe.parameters(shape) + 2 * shape.vocabulary * shape.hidden


def work(shape: StepShape) -> Work:
    """The step alone: its backward pass is two forwards, and a third where the layers are computed again.

    The weights are read once a pass and the gradients written. Of attention the causal half is counted, although no
    kernel that reads a mask leaves the other half out.
    """
    forward = probe.work(replace(shape, padded=True))
    head = 2 * shape.vocabulary * shape.hidden * shape.batch * shape.length
    passes = 4 if shape.checkpointing else 3
    return Work((passes + 1) * forward.bytes, passes * (forward.flops + head))


def kept(shape: StepShape) -> int:
    """About how many bytes the forward keeps for the backward pass: of every layer, or of one at a time."""
    norms = 2 * shape.hidden + (shape.heads + shape.kv_heads) * shape.dim  # each in float32 and again in its dtype
    attention = (6 * shape.heads + 6 * shape.kv_heads) * shape.dim
    width = 3 * norms + attention + 4 * shape.intermediate
    size = shape.batch * shape.length * shape.torch_dtype.itemsize
    return size * (width + shape.hidden * shape.layers if shape.checkpointing else width * shape.layers)


def memory(shape: Shape, device: str) -> int:
    """Bytes of the step's activations and gradients."""
    assert isinstance(shape, StepShape)
    return kept(shape) + weights(shape) * shape.torch_dtype.itemsize


def maps_memory(shape: Shape, device: str) -> int:
    """The eager pass ends before the step begins: the larger of the two, and the second model's weights."""
    assert isinstance(shape, StepShape)
    return max(layer_memory(shape), memory(shape, device)) + weights(shape) * shape.torch_dtype.itemsize


def trainer_work(shape: TrainerShape) -> Work:
    """The trainer's own bookkeeping is what takes its time; counted are the tokens it reads and writes, as int64."""
    tokens = shape.batch * shape.length * shape.steps
    return Work(16 * tokens, 0)
