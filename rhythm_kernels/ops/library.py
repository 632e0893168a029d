"""How an op is defined: a flat schema, a kernel that calls a backend, and a fake kernel that gives tracers shapes."""

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

    `fold` makes the arguments of a backend's pass from those of the op. Passes have no gradients (their results are
    detached), so one kernel below autograd serves all devices.
    """
    LIBRARY.define(f"{name}({arguments}, str? backend) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))

    def kernel(*args: Any) -> Any:
        return dispatch.run(name, args[-1], args[:-1], fold)

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rhythm_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.rhythm_kernels, name).default


def define_pass(name: str, tensors: str, distances: str, returns: str, fake: Callable[..., Any]) -> Any:
    """The op of a pass, whose schema is its tensors, the fields of the rule, and its `distances` and flags.

    `fake` and the backends take `(*tensors, rule, ...)`. Every integer that backends get, those of the rule too, is at
    most T: longer distances mean the same, fit 32 bits no more, and make `W - (W - distance)` cancel.
    """
    arguments = ", ".join(filter(None, (tensors, rule.SCHEMA, distances)))
    first = tensors.count("Tensor ")
    rest = first + len(Rule._fields)
    integers = [i for i, each in enumerate(arguments.split(", ")) if each.startswith("SymInt ")]

    def fold(*args: Any) -> tuple[Any, ...]:
        near = list(args)
        length = args[0].shape[1]
        for i in integers:
            if near[i] > length:
                near[i] = length
        return (*near[:first], Rule._make(near[first:rest]), *near[rest:])

    def traced(*args: Any) -> Any:
        return fake(*args[:first], Rule(*args[first:rest]), *args[rest:-1])

    return define(name, arguments, returns, traced, fold)
