"""Definition of an op: a flat schema, folded into what backends take; one real kernel, one fake kernel for tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import rule
from ..rule import Rule
from . import dispatch

LIBRARY = torch.library.Library("rhythm_kernels", "DEF")


def define(
    name: str, arguments: str, returns: str, fake: Callable[..., Any], fold: Callable[..., tuple[Any, ...]]
) -> Any:
    """Register `rhythm_kernels::name`, whose last argument is the backend (None: the best), and return its overload.

    `fold` makes of the arguments what the pass of a backend takes. The passes give no gradients (results are
    detached), so one kernel serves all devices, below autograd.
    """
    LIBRARY.define(f"{name}({arguments}, str? backend) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))

    def kernel(*args: Any) -> Any:
        return dispatch.run(name, args[-1], args[:-1], fold)

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rhythm_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.rhythm_kernels, name).default


def define_pass(name: str, tensors: str, distances: str, returns: str, fake: Callable[..., Any]) -> Any:
    """The op of a pass: its tensors, the rule, and what it reads of the map, integers of which are distances.

    `fake` and the backends take `(*tensors, rule, ...)`; no distance of what backends get exceeds the length.
    """
    first = tensors.count("Tensor ")
    rest = first + len(Rule._fields)

    def fold(*args: Any) -> tuple[Any, ...]:
        length = args[0].shape[1]
        near = (min(x, length) if type(x) is int else x for x in args[rest:])
        return (*args[:first], Rule(*args[first:rest]).within(length), *near)

    def traced(*args: Any) -> Any:
        return fake(*args[:first], Rule(*args[first:rest]), *args[rest:-1])

    arguments = ", ".join(filter(None, (tensors, rule.SCHEMA, distances)))
    return define(name, arguments, returns, traced, fold)
