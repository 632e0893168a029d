"""Which modules of a decoder are softmax self-attention that can be measured, and why others are not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import CodeType

from torch import nn

from ..canonical import MAX_HEAD_SIZE

_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
# Names of the functions by which a forward makes the masks of a decoder; those for encoders are left out.
_MAKES_MASKS = re.compile(r"create_(?!bidirectional|\w*vision)\w*masks?(_\w+)?$|\w*_update_causal_mask$")


def find_attentions(decoder: nn.Module) -> tuple[dict[int, nn.Module], dict[int, str]]:
    """Layer -> its softmax self-attention, and layer -> why its attention is left out.

    Layers without attention that goes through transformers' registry (linear attention, Mamba, functions of a model's
    own) are in neither.
    """
    blocks = _blocks(decoder)
    named = [(layers, child) for child in decoder.modules() if (layers := _layers_of(child, blocks))]
    # Where a model has further stacks inside, only its own list of layers is the decoder.
    of_stack = [(layers, child) for layers, child in named if id(child) in blocks]
    found: dict[int, nn.Module] = {}
    left_out: dict[int, str] = {}
    for layers, child in of_stack or named:
        why = _why_not(child, layers)
        for layer in layers:
            if why is None and not of_stack and layer in found:
                why = f"{type(found[layer]).__name__} and {type(child).__name__} both call themselves layer {layer}"
            if why is not None:
                left_out.setdefault(layer, why)
            found.setdefault(layer, child)
    return {layer: child for layer, child in found.items() if layer not in left_out}, left_out


def makes_masks(module: nn.Module) -> bool:
    """Whether this module's forward makes the attention masks of the modules inside of it."""
    return any(_MAKES_MASKS.match(name) for name in forward_names(module))


def forward_names(module: nn.Module) -> set[str]:
    """The globals and attributes that this module's forward names."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set() if code is None else set(_names(code))


def _names(code: CodeType) -> Iterator[str]:
    """The globals and attributes that a function names, also inside of its lambdas and comprehensions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _blocks(decoder: nn.Module) -> dict[int, list[int]]:
    """id of a module -> the positions, in the decoder's list of layers, of the layers that hold it."""
    longest: list[nn.Module] = []
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) > len(longest):
            longest = list(child)
    positions: dict[int, list[int]] = {}
    for position, block in enumerate(longest):
        for child in block.modules():
            positions.setdefault(id(child), []).append(position)
    return positions


def _layers_of(module: nn.Module, blocks: dict[int, list[int]]) -> list[int]:
    """The layers in which this module is causal self-attention, by its `layer_idx`, else by its place; may be empty.

    Zamba's shared attention has no `layer_idx`: each layer that uses it holds a module of its own, with shared weights.
    """
    if not hasattr(module, "config") or not hasattr(module, "layer_idx") or not _calls_registry(module):
        return []
    if not _is_causal_self_attention(module):
        return []
    layer = module.layer_idx
    if isinstance(layer, int) and layer >= 0:
        return [layer]
    return blocks.get(id(module), [])


def _is_causal_self_attention(module: nn.Module) -> bool:
    """Whether it says that it is causal, and is no cross-attention."""
    if not getattr(module, "is_causal", True) or getattr(module, "is_cross_attention", False):
        return False
    return "CrossAttention" not in type(module).__name__


def _calls_registry(module: nn.Module) -> bool:
    """Whether a forward of its class, or of one that this derives from, names transformers' registry of attention.

    A module whose class is named attention may also reach the registry through a function of its file.
    """
    named_so = "Attention" in type(module).__name__
    for cls in type(module).__mro__:
        forward = inspect.unwrap(vars(cls).get("forward", _nothing))
        code = getattr(forward, "__code__", None)
        if code is not None and (_REGISTRY in _names(code) or (named_so and _REGISTRY in forward.__globals__)):
            return True
    return False


def _nothing() -> None: ...


def _why_not(attention: nn.Module, layers: list[int]) -> str | None:
    """Why this attention cannot be measured, whatever the batch; None: it can."""
    name = type(attention).__name__
    if getattr(attention, "compressor", None) is not None:
        return f"it attends to compressed keys beside the tokens' own ({name}), which the measures do not know"
    if getattr(attention, "indexer", None) is not None or getattr(attention, "skip_topk", False):
        return f"it chooses its keys ({name}: sparse attention), which the measures do not know"
    size = getattr(attention, "qk_head_dim", None) or getattr(attention, "head_dim", None)
    if isinstance(size, int) and size > MAX_HEAD_SIZE:
        return f"its heads are of size {size} ({name}), and the measures know sizes up to {MAX_HEAD_SIZE}"
    if len(layers) > 1:
        return f"it shares one {name} with layers {layers}, whose calls cannot be told apart"
    return None
