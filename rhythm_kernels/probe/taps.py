"""Wrapping transformers' attention functions under their own names, and putting them back.

transformers looks the attention function up by `config._attn_implementation` at every call. A function of ours under
the same name is met by every layer without touching the model, its configuration or its masks (a new name would lose
the mask function that is registered under the old one). The wrapper calls the function it found, and hands the call to
a tap where the calling module has one; every other module, of this or another model, passes straight through.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

AttentionFunction = Callable[..., Any]


class Tap(Protocol):
    """What is called in place of the attention function, for one attention module."""

    def __call__(
        self,
        function: AttentionFunction,
        name: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> Any: ...


@dataclass
class _Installed:
    original: AttentionFunction | None  # None: "eager", which transformers keeps outside of its registry
    local: bool  # whether the registry instance (not the class) held it
    users: int


_taps: dict[int, Tap] = {}
_installed: dict[tuple[int, str], _Installed] = {}
_wrappers: dict[tuple[int, str], AttentionFunction] = {}


class _WhileMeasuring(dict[str, AttentionFunction]):
    """What a registry's local mapping is while wrappers are in it.

    Code that torch compiled while a name was in the mapping does not guard that the name is there, and would raise a
    KeyError once it is not. It does guard the type of the mapping: with a type of its own for the time of the wrappers,
    such code is compiled anew afterwards.
    """


def registry_of(module: nn.Module) -> Any:
    """The attention registry in the file of `module`'s class: one model of transformers has its own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return getattr(sys.modules[_defining_class(module).__module__], "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)


def _defining_class(module: nn.Module) -> type:
    """The class whose `forward` this module runs (FSDP2 and users subclass; the function stays where it was)."""
    return next(cls for cls in type(module).__mro__ if "forward" in vars(cls))


def eager_function(module: nn.Module) -> AttentionFunction:
    """The eager attention of the modelling file that `module` comes from, which is the one it would call itself."""
    names = inspect.unwrap(vars(_defining_class(module))["forward"]).__globals__
    function = names.get("eager_attention_forward") or next(
        (value for name, value in names.items() if name.endswith("eager_attention_forward")), None
    )
    if function is None:
        raise NotImplementedError(
            f"{type(module).__name__} keeps its eager attention under a name that is not known; "
            "call model.set_attn_implementation('sdpa') before measuring"
        )
    return function


def _wrapper(registry: Any, name: str) -> AttentionFunction:
    """One wrapper per name for the life of the process, so that compiled models find it by identity."""
    place = (id(registry), name)
    if place not in _wrappers:
        # The parameters have transformers' names: some models pass them by keyword.
        def tapped(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
        ) -> Any:
            entry = _installed.get(place)
            function = entry.original if entry is not None else None
            if function is None:
                function = eager_function(module) if name == "eager" else type(registry)._global_mapping[name]
            tap = _taps.get(id(module))
            if tap is None:
                return function(module, query, key, value, attention_mask, **kwargs)
            return tap(function, name, module, query, key, value, attention_mask, kwargs)

        # A graph break: a traced wrapper would stay in the graph with the tap that it had when it was traced.
        _wrappers[place] = torch.compiler.disable(tapped)
    return _wrappers[place]


def install(taps: dict[int, Tap], modules: list[nn.Module]) -> list[tuple[Any, str]]:
    """Put wrappers under every name that `modules` look up, and route the modules of `taps` (by id) to their taps.

    Returns what `uninstall` takes back.
    """
    places: dict[tuple[int, str], Any] = {}
    for module in modules:
        config: Any = module.config
        places[id(registry_of(module)), config._attn_implementation] = registry_of(module)
    used = []
    for key, registry in places.items():
        name = key[1]
        entry = _installed.get(key)
        if entry is None:
            local = name in registry._local_mapping
            original = registry.get(name)
            if original is None and name != "eager":
                raise NotImplementedError(f"attention implementation {name!r} is not in transformers' registry")
            _installed[key] = _Installed(original, local, users=1)
            if not isinstance(registry._local_mapping, _WhileMeasuring):
                registry._local_mapping = _WhileMeasuring(registry._local_mapping)
            registry[name] = _wrapper(registry, name)
        else:
            entry.users += 1
        used.append((registry, name))
    _taps.update(taps)
    return used


def uninstall(taps: dict[int, Tap], used: list[tuple[Any, str]]) -> None:
    """Undo one `install`; the last user of a name puts the function back that was found there."""
    for module_id in taps:
        _taps.pop(module_id, None)
    for registry, name in used:
        key = (id(registry), name)
        entry = _installed[key]
        entry.users -= 1
        if entry.users:
            continue
        del _installed[key]
        if registry._local_mapping.get(name) is _wrappers[key]:  # else someone set theirs meanwhile: it stays
            if entry.local:
                registry[name] = entry.original
            else:
                del registry[name]
        if not any(place == key[0] for place, _ in _installed):
            registry._local_mapping = dict(registry._local_mapping)
