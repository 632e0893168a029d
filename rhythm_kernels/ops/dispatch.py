"""Which backend runs a pass: the one place that knows."""

from __future__ import annotations

import contextlib
import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..canonical import last_contiguous

BACKENDS = ("cuda", "triton", "cpu", "torch", "reference")

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

_MODULES = {"cuda": "cuda", "cpu": "native", "triton": "triton", "torch": "fallback"}

_NO_STREAMS = "the CUDA C++ backend has the bands and credit: leave backend at None, or say 'triton'"

# Passes that a backend does not have, and why. What is not named here is there.
_LACKS = {
    ("cuda", "row_stats"): _NO_STREAMS,
    ("cuda", "column_stats"): _NO_STREAMS,
    ("cuda", "attention"): _NO_STREAMS,
    ("triton", "credit"): "the Triton backend has no credit: leave backend at None, or say 'torch'",
}


def _unusable(name: str, device: torch.device) -> str:
    """Why `name` cannot serve tensors on `device`; empty where it can."""
    if name in ("torch", "reference"):
        return ""
    if name == "cpu":
        from .. import native

        return native.available() if device.type == "cpu" else f"it serves CPU tensors, not {device.type}"
    if name == "triton":
        from .. import triton

        return triton.available(device)
    if name == "cuda":
        from .. import cuda

        return cuda.available(device)
    raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {name!r}")


@functools.cache
def choose(pass_name: str, backend: str | None, device: torch.device) -> str:
    """The backend that will run `pass_name` on `device`; a forced one that cannot is a ValueError that says why."""
    if backend is None:
        order = _PREFERS.get((device.type, pass_name)) or _PREFERENCE.get(device.type, ())
        usable = (name for name in order if (name, pass_name) not in _LACKS)
        return next((name for name in usable if not _unusable(name, device)), "torch")
    reason = _unusable(backend, device) or _LACKS.get((backend, pass_name), "")
    if reason:
        raise ValueError(f"backend={backend!r} cannot run {pass_name} on {device.type} tensors: {reason}")
    return backend


def _laid_out(x: Any) -> Any:
    """An argument as every backend may read it: heads `(B, T, H, D)` with a contiguous last dimension and any other
    strides; tables, sinks and measures in one piece. A log-sum-exp, of three dimensions, has any strides.

    Tensors that carry gradients, and those that come straight through `torch.ops`, have met no other check. Nothing is
    copied that lies so already.
    """
    if not isinstance(x, Tensor) or x.dim() == 3:
        return x
    return last_contiguous(x) if x.dim() == 4 else x.contiguous()


def run(pass_name: str, backend: str | None, *args: Any) -> Any:
    """Call the pass of a backend, outside of autocast and autograd, on tensors laid out as kernels read them."""
    device = args[0].device
    chosen = choose(pass_name.removesuffix("_backward"), backend, device)
    if chosen not in _MODULES:
        raise ValueError(f"backend={backend!r} has no operators: it is for the functions of rhythm_kernels")
    # To leave autocast costs more than to ask whether it is on, which it hardly ever is here.
    no_autocast = (
        torch.autocast(device.type, enabled=False)
        if torch.is_autocast_enabled(device.type)
        else contextlib.nullcontext()
    )
    with torch.no_grad(), no_autocast:
        return getattr(_module(chosen), pass_name)(*map(_laid_out, args))


@functools.cache
def _module(backend: str) -> ModuleType:
    """The module of a backend's passes, imported when it is first needed."""
    return importlib.import_module(f"..{_MODULES[backend]}", __package__)


def backends() -> dict[str, str]:
    """Name of each backend -> `""` where it is usable on this machine, else the reason it is not."""
    cuda = torch.device("cuda") if torch.cuda.is_available() else None
    devices = [torch.device("cpu")] + ([cuda] if cuda else [])
    found = {}
    for name in BACKENDS:
        reasons = [_unusable(name, device) for device in devices]
        found[name] = "" if "" in reasons else reasons[-1]
    return found
