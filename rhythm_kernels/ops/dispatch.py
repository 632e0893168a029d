"""Which backend runs a pass: the one place that knows."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..canonical import last_contiguous

BACKENDS = ("cuda", "triton", "cpu", "torch", "reference")

# The passes of the interface, as the door asks for them; `attention` comes with its backward.
_PASSES = ("band_rows", "band_columns", "row_stats", "column_stats", "attention", "credit")

# The rule: the first usable backend of the list that has the pass: of the list of that pass where it has one, else of
# the device's.
_PREFERENCE = {"cuda": ("triton", "cuda", "torch"), "cpu": ("cpu", "torch")}

# The passes that several compiled backends have, on the devices where they have them: a line each, so that the winner
# of a measurement becomes the default by one line. Rows of such measurements are kept in benchmarks/results/; none of
# a GPU is there yet, and until then the bands stay with Triton.
_PREFERS: dict[tuple[str, str], tuple[str, ...]] = {
    ("cuda", "band_rows"): ("triton", "cuda", "torch"),
    ("cuda", "band_columns"): ("triton", "cuda", "torch"),
}

# A backend and the module of `rhythm_kernels.backend` that is its room.
_ROOMS = {"cuda": "cuda", "triton": "triton", "cpu": "cpu", "torch": "tiled_torch"}


@functools.cache
def _room(backend: str) -> ModuleType:
    """The module that has a backend's passes, imported when it is first needed."""
    return importlib.import_module(f"..backend.{_ROOMS[backend]}", __package__)


def _unusable(name: str, device: torch.device) -> str:
    """Why `name` cannot serve tensors on `device`; empty where it can."""
    if name == "reference":
        return ""
    if name not in _ROOMS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {name!r}")
    return str(_room(name).available(device))


def _has(name: str, pass_name: str) -> bool:
    """Whether a backend has a pass: a function, not the module of that name which its room may have besides."""
    return callable(getattr(_room(name), pass_name, None))


def _lacks(name: str, pass_name: str, device: torch.device) -> str:
    """That a backend has no such pass, what it has, and who has it on this device; empty where it has it."""
    if name == "reference" or _has(name, pass_name):
        return ""
    has = ", ".join(x for x in _PASSES if _has(name, x))
    others = " or ".join(repr(x) for x in _ROOMS if _has(x, pass_name) and not _unusable(x, device))
    return f"it has {has} and no {pass_name}: leave backend at None, or say {others}"


@functools.cache
def choose(pass_name: str, backend: str | None, device: torch.device) -> str:
    """The backend that will run `pass_name` on `device`; a forced one that cannot is a ValueError that says why."""
    if backend is None:
        order = _PREFERS.get((device.type, pass_name)) or _PREFERENCE.get(device.type, ())
        usable = (name for name in order if not _unusable(name, device))
        return next((name for name in usable if _has(name, pass_name)), "torch")
    reason = _unusable(backend, device) or _lacks(backend, pass_name, device)
    if reason:
        raise ValueError(f"backend must be one that runs {pass_name} on {device.type} tensors, got {backend!r}: {reason}")
    return backend


def _laid_out(x: Tensor) -> Tensor:
    """A tensor as every backend may read it: heads `(B, T, H, D)` with a contiguous last dimension and any other
    strides; tables, sinks and measures in one piece. A log-sum-exp, of three dimensions, has any strides.

    Tensors that carry gradients, and those that come straight through `torch.ops`, have met no other check. Nothing is
    copied that lies so already.
    """
    rank = x.dim()
    if rank == 3:
        return x
    return last_contiguous(x) if rank == 4 else x.contiguous()


def run(pass_name: str, backend: str | None, args: Sequence[Any], fold: Callable[..., tuple[Any, ...]]) -> Any:
    """Call the pass of a backend with what `fold` makes of the arguments, laid out as kernels read them.

    Outside of autocast and autograd.
    """
    device = args[0].device
    chosen = choose(pass_name.removesuffix("_backward"), backend, device)
    if chosen not in _ROOMS:
        raise ValueError(f"backend must be one that has operators, got {backend!r}: it is for the functions of rhythm_kernels")
    # To leave autocast costs more than to ask whether it is on, which it hardly ever is here.
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return run(pass_name, backend, args, fold)
    with torch.no_grad():
        laid_out = [_laid_out(x) if isinstance(x, Tensor) else x for x in args]
        return getattr(_room(chosen), pass_name)(*fold(*laid_out))


def backends() -> dict[str, str]:
    """Name of each backend -> `""` where it is usable on this machine, else the reason it is not."""
    cuda = torch.device("cuda") if torch.cuda.is_available() else None
    devices = [torch.device("cpu")] + ([cuda] if cuda else [])
    found = {}
    for name in BACKENDS:
        reasons = [_unusable(name, device) for device in devices]
        found[name] = "" if "" in reasons else reasons[-1]
    return found
