"""Checks of single arguments. Every error reads `NAME must be WHAT, got VALUE`, and is raised before any kernel runs.

The checks also run while a compiler traces. Sizes and integers may then be symbols whose values are not known yet: a
check that cannot be decided becomes an assertion of the traced graph (:func:`holds`). Values in tensors are not read
then (:func:`readable`), nor are those on a GPU: kernels clamp them into range.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .tensor_cache import ordinary

__all__ = [
    "MAX_LENGTH",
    "as_int",
    "check_horizon",
    "check_int",
    "check_int_tensor",
    "check_number",
    "check_tensor",
    "check_window",
    "holds",
    "last_contiguous",
    "readable",
    "same_shape",
    "smaller",
]

# More tokens than any sequence has. Its sum with the size of a tile still fits 32 bits.
MAX_LENGTH = 2**31 - 2**16


def holds(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes is met. One that a tracer cannot decide counts as met, and the graph asserts it."""
    if not (torch.compiler.is_compiling() or isinstance(condition, torch.SymBool)):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    if not guard_or_true(condition):
        return False
    torch._check(cast(bool, condition))
    return True


def same_shape(shape: Sequence[int], want: Sequence[int]) -> bool:
    """Whether two shapes are the same, decided as :func:`holds` decides."""
    return len(shape) == len(want) and all(holds(size == other) for size, other in zip(shape, want))


def readable(x: Tensor) -> bool:
    """Whether this tensor's values may be read here: it is on the CPU, and nothing traces or transforms the call."""
    return x.device.type == "cpu" and ordinary()


def last_contiguous(x: Tensor) -> Tensor:
    """`x`, copied where its last dimension is not contiguous: kernels read that in vectors. Other strides are free."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check_tensor(name: str, value: object) -> Tensor:
    """`value`, if it is a dense tensor of one process; else an error that says how to get one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if type(value) is not Tensor and hasattr(value, "to_local"):
        raise TypeError(
            f"{name} must be a plain tensor, got a {type(value).__name__}: each process takes its own sequences or "
            f"heads, {name}.to_local()"
        )
    if value.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one: packed input is the values() of jagged tensors, with "
            "cu_seqlens=offsets()"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {value.layout}: {name}.to_dense() is one")
    if value.is_quantized:
        raise TypeError(f"{name} must be a plain tensor, got a quantized {value.dtype}: {name}.dequantize() is one")
    return value


def as_int(name: str, value: Any) -> int:
    """An integer: an int, anything with `__index__`, or a tensor that holds one on the CPU."""
    if type(value) is int:  # the usual case, so first
        return value
    if isinstance(value, Tensor):
        check_int_tensor(name, value)
        if value.device.type != "cpu":
            raise TypeError(f"{name} must be an int, got a tensor on {value.device}, which the host would wait for")
        return cast(int, value.item())  # while tracing a symbol, whose value int() would fix
    if isinstance(value, torch.SymInt):
        return cast(int, value)
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:  # not an integer, or an array of several
        pass
    raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")


def check_int_tensor(name: str, value: Tensor) -> None:
    """An error unless the tensor holds one integer, on any device."""
    check_tensor(name, value)
    if value.dim() or value.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be an int, got a tensor of {value.dtype} and shape {tuple(value.shape)}")


def check_int(name: str, value: Any, low: int) -> int:
    """A distance or a length of at least `low`, of any type that :func:`as_int` takes, else an error that names it.

    Larger values than `MAX_LENGTH` become that: no sequence is so long, so all of them mean the same.
    """
    value = as_int(name, value)
    if not holds(value >= low):
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return smaller(value, MAX_LENGTH)


def smaller(value: int, limit: int) -> int:
    """`min(value, limit)`, symbolic where one is a symbol. (Dynamo shows symbols as ints, and traces `min` itself.)"""
    symbols = isinstance(value, torch.SymInt) or isinstance(limit, torch.SymInt)
    return torch.sym_min(value, limit) if symbols else min(value, limit)


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_window(window: int, name: str = "window") -> int:
    """The window W of eq. 9, in tokens: an int of at least 1, else an error that calls it `name`."""
    return check_int(name, window, 1)


def check_horizon(horizon: Sequence[int | None], name: str = "horizon") -> tuple[int, int | None]:
    """`(H_lo, H_hi)` of eq. 10, in tokens: `0 <= H_lo <= H_hi`, or `H_hi` None; else an error that calls it `name`."""
    if not isinstance(horizon, tuple | list) or len(horizon) != 2:
        raise ValueError(f"{name} must be a pair (first, last) of distances, got {horizon!r}; last may be None")
    low = check_int(f"{name}[0]", horizon[0], 0)
    return low, None if horizon[1] is None else check_int(f"{name}[1]", horizon[1], low)


def check_number(name: str, value: Any) -> float:
    """A real number, Python's or NumPy's, else an error that names it. NaN and infinity are let through."""
    if isinstance(value, bool) or not isinstance(value, int | float | numbers.Real):
        raise TypeError(f"{name} must be a float, got {type(value).__name__} {value!r}")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(f"{name} must be a float, got a number beyond all of them") from error
    return value if isinstance(value, int | float) else number
