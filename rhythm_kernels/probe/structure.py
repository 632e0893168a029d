"""Finding a causal model's decoder, its attention modules and the place where its forward can be watched."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..heads import HeadGroups
from .alibi import refuse_alibi
from .measurable import find_attentions, makes_masks

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
After = Callable[[bool], None]


@dataclass(frozen=True)
class HeadShards:
    """Tensor parallelism: each of `size` ranks of `group` attends with its own block of the query heads."""

    group: Any
    rank: int
    size: int

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        import torch.distributed as dist

        dist.all_reduce(x, group=self.group)
        return x


@dataclass
class Decoder:
    """The stack of decoder layers of a transformers model, however deep it is wrapped (DDP, FSDP, PEFT, compile).

    Attributes:
        module: the innermost `PreTrainedModel` that holds the layers, given token masks and positions.
        watched: the module whose call is hooked: `module` itself, or the compiled module around it.
        attentions: layer -> the module of its softmax self-attention; layers of other kinds are absent.
        heads: layer -> number of query heads.
        num_layers: all layers, of whatever kind.
        left_out: layer -> why its attention cannot be measured.
        shards: how the query heads are spread over ranks; None: every rank has them all.
    """

    module: nn.Module
    watched: nn.Module
    attentions: dict[int, nn.Module]
    heads: dict[int, int]
    num_layers: int
    left_out: dict[int, str]
    shards: HeadShards | None = None

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def layer_of(self) -> dict[int, int]:
        """id of an attention module -> its layer."""
        return {id(module): layer for layer, module in self.attentions.items()}

    def check(self, groups: HeadGroups) -> None:
        """Raise `ValueError` where the groups do not fit this model or name a layer that cannot be measured."""
        for layer, _ in [*groups.local, *groups.global_]:
            if layer in self.left_out:
                raise ValueError(
                    f"groups must be of layers that can be measured, got layer {layer}: {self.left_out[layer]}"
                )
        groups.check(self.config, self.heads)

    def on_forward(self, before: Before, after: After) -> list[Callable[[], None]]:
        """Call `before(module, args, kwargs)` and `after(failed)` around each forward; returns what undoes it."""
        target = self.watched
        compiled: Callable[..., Any] | None = getattr(target, "_compiled_call_impl", None)
        if compiled is not None:
            # `module.compile()` puts hooks inside of the compiled call, which may not run those that are added later.
            compiled_call = compiled

            def watched_call(*args: Any, **kwargs: Any) -> Any:
                try:
                    before(target, args, kwargs)
                    result = compiled_call(*args, **kwargs)
                except BaseException:
                    after(True)
                    raise
                after(False)
                return result

            target._compiled_call_impl = watched_call

            def restore() -> None:
                target._compiled_call_impl = compiled_call

            return [restore]

        def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before(module, args, kwargs)

        def post_hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            after(result is None)

        return [
            target.register_forward_pre_hook(_Hook(target, pre_hook), with_kwargs=True).remove,
            target.register_forward_hook(_Hook(target, post_hook), always_call=True).remove,
        ]


class _Hook:
    """A hook of one module. Copies and pickles of the module carry it along, and in those it does nothing."""

    def __init__(self, module: nn.Module | None = None, hook: Callable[..., None] | None = None) -> None:
        self._module = module
        self._hook = hook

    def __call__(self, module: nn.Module, *arguments: Any) -> None:
        if self._hook is not None and module is self._module:
            self._hook(module, *arguments)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def find_decoder(model: nn.Module) -> Decoder:
    """Look a model up.

    Raises:
        TypeError: `model` holds no transformers model.
        ValueError: its decoder has ALiBi, or no softmax self-attention that goes through transformers' registry, its
            masks are made outside of its decoder, or the model is wrapped in a way that cannot be measured.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model (or a wrapper around one), got {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "model must be the one that computes, got nn.DataParallel, which copies it at every forward: use "
            "DistributedDataParallel"
        )
    outer = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if outer is None:
        raise TypeError(f"model must be or hold a transformers PreTrainedModel, got {type(model).__name__}")
    _refuse_prompt_learning(model)
    module = outer.get_decoder()
    if not isinstance(module, nn.Module) or not hasattr(module, "config"):
        module = outer
    refuse_alibi(module)
    attentions, left_out = find_attentions(module)
    if not attentions:
        why = f": {next(iter(left_out.values()))}" if left_out else ""
        raise ValueError(
            f"no layer of {type(module).__name__} has causal softmax attention that goes through transformers' "
            f"attention registry, so there is nothing to measure{why}"
        )
    _refuse_outer_masks(outer, module)
    config = module.config.get_text_config(decoder=True)
    num_layers = getattr(config, "num_hidden_layers", None) or max(attentions) + 1
    heads = {layer: _query_heads(attention, config) for layer, attention in attentions.items()}
    return Decoder(module, _watched(model, module), attentions, heads, int(num_layers), left_out, _shards(outer))


def bind_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name, positional ones named after the transformers model that receives them."""
    from transformers import PreTrainedModel

    if not args:
        return kwargs
    receiver = next((m for m in module.modules() if isinstance(m, PreTrainedModel)), module)
    names = [
        name
        for name, parameter in inspect.signature(receiver.forward).parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    return {**dict(zip(names, args)), **kwargs}


def attention_layers(decoder: Decoder, layers: str | Sequence[int]) -> list[int]:
    """The layers to sample.

    Args:
        layers: `"middle5"`: five evenly spaced layers from `floor(L/3)` to `floor(2L/3)`, rounded, without duplicates;
            `"all"`; or layer indices. The first two leave out layers that have no softmax attention, or one that cannot
            be measured.
    """
    total = decoder.num_layers
    if layers == "middle5":
        low, high = total // 3, 2 * total // 3
        wanted = sorted({round(low + (high - low) * i / 4) for i in range(5)})
        return _known(decoder, [layer for layer in wanted if layer in decoder.attentions], layers)
    if layers == "all":
        return _known(decoder, sorted(decoder.attentions), layers)
    if isinstance(layers, str):
        raise ValueError(f"layers must be 'middle5', 'all' or a list of layer indices, got {layers!r}")
    try:
        layers = [operator.index(layer) for layer in layers]
    except TypeError as error:
        raise TypeError(f"layers must be 'middle5', 'all' or a list of layer indices, got {layers!r}") from error
    for layer in layers:
        if layer in decoder.left_out:
            raise ValueError(f"layers must be those that can be measured, got layer {layer}: {decoder.left_out[layer]}")
        if layer not in decoder.attentions:
            raise ValueError(
                f"layers must have softmax attention to measure, got layer {layer}: this model has it in "
                f"{sorted(decoder.attentions)}"
            )
    return _known(decoder, sorted(set(layers)), layers)


def _known(decoder: Decoder, layers: list[int], asked: str | Sequence[int]) -> list[int]:
    if not layers:
        raise ValueError(
            f"layers must hold one with softmax attention, got {asked!r}: this model has it in "
            f"{sorted(decoder.attentions)}"
        )
    return layers


def _query_heads(attention: nn.Module, config: Any) -> int:
    for owner in (attention, getattr(attention, "config", config), config):
        for name in ("num_attention_heads", "num_heads", "n_head"):
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    raise ValueError(f"the number of query heads of {type(attention).__name__} is not known to the probe")


def _shards(model: nn.Module) -> HeadShards | None:
    """The tensor-parallel ranks of a model that transformers has sharded by its `tp_plan`."""
    mesh: Any = getattr(model, "_device_mesh", None)
    if mesh is None or "tp" not in (mesh.mesh_dim_names or ()):
        return None
    ranks = mesh["tp"]
    return HeadShards(ranks.get_group(), ranks.get_local_rank(), ranks.size()) if ranks.size() > 1 else None


def _watched(model: nn.Module, decoder: nn.Module) -> nn.Module:
    """The outermost compiled module around the decoder, else the decoder: hooks inside of a graph may not be seen."""
    for module in model.modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        if compiled and any(child is decoder for child in module.modules()):
            return module
    return decoder


def _refuse_outer_masks(outer: nn.Module, decoder: nn.Module) -> None:
    """Raise where a module around the decoder makes its masks, as models with image tokens do that see each other.

    The decoder is then given ready masks, and only in a forward with an image, in the middle of a run, would they show
    that its tokens see each other.
    """
    for module in outer.modules():
        if module is decoder or not makes_masks(module) or all(child is not decoder for child in module.modules()):
            continue
        alone = _text_model(decoder)
        raise ValueError(
            f"{type(module).__name__} makes the attention masks outside of its language model, where image "
            "tokens may see each other in both directions, which the probe does not support: load the language model "
            f"alone{f' ({alone})' if alone else ''}, without images"
        )


def _text_model(decoder: nn.Module) -> str | None:
    """The causal language model class around this decoder alone, if transformers has one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config: Any = decoder.config
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)


def _refuse_prompt_learning(model: nn.Module) -> None:
    for module in model.modules():
        configs: Any = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and any(c.is_prompt_learning for c in configs.values()):
            raise ValueError(
                "PEFT prompt learning adds keys or tokens inside the model, which the probe does not support"
            )
