"""Which modules of a decoder are softmax self-attention that can be measured, and why others are not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from torch import nn

_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
# What a forward calls that makes the masks of a decoder. Those of its own encoders are another matter.
_MAKES_MASKS = re.compile(r"create_(?!bidirectional|\w*vision)\w*masks?(_\w+)?$|\w*_update_causal_mask$")


def find_attentions(decoder: nn.Module) -> tuple[dict[int, nn.Module], dict[int, str]]:
    """Layer -> its softmax self-attention, and layer -> why its attention is left out.

    Layers without attention that goes through transformers' registry (linear attention, Mamba, ALiBi models with
    functions of their own) are in neither.
    """
    found: dict[int, nn.Module] = {}
    left_out: dict[int, str] = {}
    blocks = _blocks(decoder)
    for child in decoder.modules():
        layers = _layers_of(child, blocks)
        if not layers or not _is_causal_self_attention(child):
            continue
        why = _why_not(child, layers)
        for layer in layers:
            if why is not None:
                left_out.setdefault(layer, why)
            elif layer not in found:
                found[layer] = child
    return found, {layer: why for layer, why in left_out.items() if layer not in found}


def makes_masks(module: nn.Module) -> bool:
    """Whether this module's forward makes the attention masks of the modules inside of it."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and any(_MAKES_MASKS.match(name) for name in _names(code))


def _names(code: CodeType) -> Iterator[str]:
    """The globals and attributes that a function names, also inside of its lambdas and comprehensions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _blocks(decoder: nn.Module) -> dict[int, list[int]]:
    """id of a module -> the positions, in the decoder's list of layers, of the layers that hold it."""
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    positions: dict[int, list[int]] = {}
    for position, block in enumerate(max(lists, key=len, default=nn.ModuleList())):
        for child in block.modules():
            positions.setdefault(id(child), []).append(position)
    return positions


def _layers_of(module: nn.Module, blocks: dict[int, list[int]]) -> list[int]:
    """The layers that this module attends in, if it is an attention module: by its own word, else by its place.

    Zamba's shared attention names no layer: weights are shared, each layer that has it holds a module of its own.
    """
    if "Attention" not in type(module).__name__ or not hasattr(module, "config") or not hasattr(module, "layer_idx"):
        return []
    layer = module.layer_idx
    if isinstance(layer, int) and layer >= 0:
        return [layer]
    return blocks.get(id(module), [])


def _is_causal_self_attention(module: nn.Module) -> bool:
    """Whether it says that it is causal, is no cross-attention, and comes from a file that knows the registry."""
    if not getattr(module, "is_causal", True) or getattr(module, "is_cross_attention", False):
        return False
    if "CrossAttention" in type(module).__name__:
        return False
    forwards = [vars(cls)["forward"] for cls in type(module).__mro__ if "forward" in vars(cls)]
    return any(_REGISTRY in _globals(forward) for forward in forwards)


def _globals(forward: Callable[..., Any]) -> dict[str, Any]:
    return getattr(inspect.unwrap(forward), "__globals__", {})


def _why_not(attention: nn.Module, layers: list[int]) -> str | None:
    """Why this attention cannot be measured, whatever the batch; None: it can."""
    name = type(attention).__name__
    if getattr(attention, "compressor", None) is not None:
        return f"it attends to compressed keys beside the tokens' own ({name}), which the measures do not know"
    if getattr(attention, "indexer", None) is not None or getattr(attention, "skip_topk", False):
        return f"it chooses its keys ({name}: sparse attention), which the measures do not know"
    if len(layers) > 1:
        return f"it shares one {name} with layers {layers}, whose calls cannot be told apart"
    return None
