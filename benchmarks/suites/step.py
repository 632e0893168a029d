"""`grpo_step`, `countdown_step`: a GRPO step with and without credit."""

from __future__ import annotations

from dataclasses import replace

from ..contenders import eager_model
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


def _of_a_layer(shape: StepShape) -> int:
    """About how many bytes the forward of one layer keeps for the backward pass."""
    itemsize = shape.torch_dtype.itemsize
    heads = (shape.heads + shape.kv_heads) * shape.dim
    # A norm keeps its input and the normalised input in float32; of 16 bits, the latter in its dtype as well. What the
    # two norms of the hidden state give is kept by the products after them, what those of q and k give by nothing.
    norms = 2 * 12 * shape.hidden + (8 if itemsize == 4 else 10) * heads
    # q, k, v and the output; under a mask (rows of different lengths), k and v are repeated for every query head.
    attention = 4 * shape.heads * shape.dim if shape.batch > 1 else 2 * heads
    return shape.batch * shape.length * (norms + itemsize * (attention + 4 * shape.intermediate))


def kept(shape: StepShape) -> int:
    """About how many bytes the forward keeps for the backward pass: of every layer, or of one at a time."""
    if not shape.checkpointing:
        return _of_a_layer(shape) * shape.layers
    hidden = shape.batch * shape.length * shape.hidden * shape.torch_dtype.itemsize
    return _of_a_layer(shape) + hidden * shape.layers


def memory(shape: Shape, device: str) -> int:
    """Bytes of the step's activations and gradients.

    Gradients of a layer are made where its activations go, so the peak is at one end of the backward pass: all that was
    kept, the log-probs (float32) and two gradients of their size; or all gradients and one layer's activations.
    """
    assert isinstance(shape, StepShape)
    head = 3 * 4 * shape.batch * shape.length * shape.vocabulary
    gradients = weights(shape) * shape.torch_dtype.itemsize
    return max(kept(shape) + head, gradients + _of_a_layer(shape))


def _with_second_model(shape: StepShape, maps: int, device: str) -> int:
    """Its pass ends before the step begins: the larger of the two, and its weights."""
    return max(maps, memory(shape, device)) + probe.parameters(shape) * shape.torch_dtype.itemsize


def layer_memory(shape: Shape, device: str) -> int:
    assert isinstance(shape, StepShape)
    return _with_second_model(shape, eager_model.layer_memory(shape, device), device)


def maps_memory(shape: Shape, device: str) -> int:
    assert isinstance(shape, StepShape)
    return _with_second_model(shape, eager_model.maps_memory(shape, device), device)


def trainer_work(shape: TrainerShape) -> Work:
    """The trainer's own bookkeeping is what takes its time; counted are the tokens it reads and writes, as int64."""
    tokens = shape.batch * shape.length * shape.steps
    return Work(16 * tokens, 0)
