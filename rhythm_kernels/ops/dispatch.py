"""Which backend runs a pass. Nothing else decides it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..arguments import last_contiguous

BACKENDS = ("cuda", "triton", "cpu", "torch", "reference")

# The passes, by the names of their ops; a backend that has `attention` has its backward pass too.
_PASSES = ("band_rows", "band_columns", "row_stats", "column_stats", "attention", "credit")

# Of these backends the first that is usable and has the pass is chosen, in the order of the device ...
_PREFERENCE = {"cuda": ("triton", "cuda", "torch"), "cpu": ("cpu", "torch")}

# ... unless the pass has an order of its own there. These are the passes that several compiled backends have: the one
# that a benchmark finds faster goes first in the pass's line. While benchmarks/results/ has no results of a GPU, the
# bands stay with Triton.
_PREFERS: dict[tuple[str, str], tuple[str, ...]] = {
    ("cuda", "band_rows"): ("triton", "cuda", "torch"),
    ("cuda", "band_columns"): ("triton", "cuda", "torch"),
}

# Backend -> its module in `rhythm_kernels.backend`.
_MODULES = {"cuda": "cuda", "triton": "triton", "cpu": "cpu", "torch": "tiled_torch"}


@functools.cache
def _module(backend: str) -> ModuleType:
    """The module that has a backend's passes, imported when it is first needed."""
    return importlib.import_module(f"..backend.{_MODULES[backend]}", __package__)


def _unusable(name: str, device: torch.device) -> str:
    """Why `name` cannot serve tensors on `device`; empty where it can."""
    if name == "reference":
        return ""
    if name not in _MODULES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {name!r}")
    return str(_module(name).available(device))


def _has(name: str, pass_name: str) -> bool:
    """Whether a backend has a pass, which is a function: its package may also have a submodule of that name."""
    return callable(getattr(_module(name), pass_name, None))


def _lacks(name: str, pass_name: str, device: torch.device) -> str:
    """An error's reason: the passes that a backend has, and the backends that have this one; empty where it has it."""
    if name == "reference" or _has(name, pass_name):
        return ""
    has = ", ".join(x for x in _PASSES if _has(name, x))
    others = " or ".join(repr(x) for x in _MODULES if _has(x, pass_name) and not _unusable(x, device))
    return f"it has {has} and no {pass_name}: leave backend at None, or say {others}"


@functools.cache
def choose(pass_name: str, backend: str | None, device: torch.device) -> str:
    """The backend that runs `pass_name` on `device`. Where `backend` cannot, a ValueError says why."""
    if backend is None:
        order = _PREFERS.get((device.type, pass_name)) or _PREFERENCE.get(device.type, ())
        usable = (name for name in order if not _unusable(name, device))
        return next((name for name in usable if _has(name, pass_name)), "torch")
    reason = _unusable(backend, device) or _lacks(backend, pass_name, device)
    if reason:
        can = f"one that runs {pass_name} on {device.type} tensors"
        raise ValueError(f"backend must be {can}, got {backend!r}: {reason}")
    return backend


def _laid_out(x: Tensor) -> Tensor:
    """A tensor with the strides that backends read, copied where it has others.

    `(B, T, H, D)` needs a contiguous last dimension, a log-sum-exp `(B, X, T)` nothing, all others (tables, sinks,
    measures) are contiguous. This is not left to :func:`.canonical.canonical`: tensors that carry gradients, and those
    given to `torch.ops` directly, do not pass through it.
    """
    rank = x.dim()
    if rank == 3:
        return x
    return last_contiguous(x) if rank == 4 else x.contiguous()


def run(pass_name: str, backend: str | None, args: Sequence[Any], fold: Callable[..., tuple[Any, ...]]) -> Any:
    """Call the pass of a backend, without autocast and autograd, on arguments that `fold` makes of the op's own."""
    device = args[0].device
    chosen = choose(pass_name.removesuffix("_backward"), backend, device)
    if chosen not in _MODULES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, _MODULES))} in an op, got {backend!r}")
    # Asked first, since it is seldom on and leaving it costs more than asking.
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return run(pass_name, backend, args, fold)
    with torch.no_grad():
        laid_out = [_laid_out(x) if isinstance(x, Tensor) else x for x in args]
        return getattr(_module(chosen), pass_name)(*fold(*laid_out))


def backends() -> dict[str, str]:
    """Each backend's name -> `""` where it is usable on this machine, else the reason why not."""
    cuda = torch.device("cuda") if torch.cuda.is_available() else None
    devices = [torch.device("cpu")] + ([cuda] if cuda else [])
    found = {}
    for name in BACKENDS:
        reasons = [_unusable(name, device) for device in devices]
        found[name] = "" if "" in reasons else reasons[-1]
    return found
