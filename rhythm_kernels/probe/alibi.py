"""Models with ALiBi: they add a bias to their scores, linear in the distance, each in a place of its own.

The probe is given q, k and a mask. A bias that is added inside of the attention function is in none of them, and the
probe would silently measure attention without it. So a model is refused when the probe is built, where its
configuration, its modules or the code of their forwards show ALiBi.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .measurable import forward_names

WAY_OUT = "rk.waad and rk.fai measure q and k of your own with alibi_slopes=..."


def refuse_alibi(decoder: nn.Module) -> None:
    """Raise `ValueError`, with the way out, for a decoder whose configuration or modules show ALiBi."""
    shown = _shown_by_config(decoder.config) or _shown_by_modules(decoder.modules())
    if shown:
        raise ValueError(
            f"{type(decoder).__name__} adds ALiBi to its scores ({shown}), a bias that the probe cannot read: {WAY_OUT}"
        )


def _shown_by_config(config: Any) -> str:
    """The setting that turns ALiBi on; empty: none does. MPT has a part of its configuration for attention."""
    text = config.get_text_config(decoder=True)
    for owner in (text, getattr(text, "attn_config", None)):
        settings = owner if isinstance(owner, Mapping) else getattr(owner, "__dict__", {})
        for name, on in (("alibi", True), ("use_alibi", True), ("position_embedding_type", "alibi")):
            if settings.get(name) == on:
                return f"its configuration says {name}={on!r}"
    return ""


def _shown_by_modules(modules: Iterable[nn.Module]) -> str:
    """What is called alibi: a tensor, a module or a switch that a module holds, or a function that its forward calls.

    A module with a switch that is False has no ALiBi, although its forward may name it (Falcon's does).
    """
    for module in modules:
        held = {name: value for name, value in _held(module) if "alibi" in name.lower()}
        if any(value is False for value in held.values()):
            continue
        called = {name for name in forward_names(module) if "alibi" in name.lower()} - held.keys()
        on = [name for name, value in held.items() if value is True or isinstance(value, Tensor | nn.Module)]
        for name in (*on, *sorted(called)):
            return f"{name} of {type(module).__name__}"
    return ""


def _held(module: nn.Module) -> Iterable[tuple[str, Any]]:
    for names in (vars(module), module._buffers, module._parameters, module._modules):
        yield from names.items()
