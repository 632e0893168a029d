"""The keyword arguments that all measures share, declared once: their types, their defaults, and how `help` shows them.

The documented functions and the dense definitions take the same ones; this file is all that the two have in common.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypedDict, TypeVar, get_type_hints

from torch import Tensor

__all__ = ["DEFAULTS", "Options", "check_names", "spelled_out"]


class Options(TypedDict, total=False):
    """How a logit is made of q.k, which heads are measured, and where the sequences lie."""

    heads: Tensor | Sequence[int] | None
    softmax_scale: float | None
    window_size: tuple[int, int]
    softcap: float
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | Tensor | None
    seq_start: Tensor | None
    seq_end: Tensor | None
    response_start: Tensor | None


DEFAULTS: dict[str, Any] = dict.fromkeys(Options.__annotations__)
DEFAULTS |= {"window_size": (-1, -1), "softcap": 0.0, "per_head": False}

_Function = TypeVar("_Function", bound=Callable[..., Any])


def check_names(function: str, given: Iterable[str], options: type = Options) -> None:
    """Raise the TypeError of an unknown keyword argument in the name of the function that the caller called."""
    for name in given:
        if name not in options.__annotations__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def spelled_out(options: type) -> Callable[[_Function], _Function]:
    """`help`, completion and `inspect.signature` show each argument of `**options`; the function stays as it is.

    The function's own arguments come first, but `per_head` and `backend` last.
    """

    def show(function: _Function) -> _Function:
        signature, types = inspect.signature(function), get_type_hints(function) | get_type_hints(options)
        own = [x for x in signature.parameters.values() if x.kind != inspect.Parameter.VAR_KEYWORD]
        last = [x for x in own if x.name in ("per_head", "backend")]
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=DEFAULTS[name])
            for name in options.__annotations__
        ]
        ordered = [*(x for x in own if x not in last), *shared, *last]
        parameters = [x.replace(annotation=types[x.name]) for x in ordered]
        function.__annotations__ = {x.name: x.annotation for x in parameters} | {"return": types["return"]}
        function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            parameters, return_annotation=types["return"]
        )
        return function

    return show
