"""Which backend runs a pass: the one place that knows."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("cuda", "triton", "cpu", "torch", "reference")

# The rule: the first usable backend of the device's list that has the pass. The order is to follow measurements; on a
# GPU none has been taken that compares the CUDA kernels with the Triton ones, so the bands stay with Triton, and CUDA
# has what Triton lacks: credit.
_PREFERENCE = {"cuda": ("triton", "cuda", "torch"), "cpu": ("cpu", "torch")}

_MODULES = {"cuda": "cuda", "cpu": "native", "triton": "triton", "torch": "fallback"}

_NO_STREAMS = "the CUDA C++ backend has the bands and credit: leave backend at None, or say 'triton'"

# Passes that a backend does not have, and why. What is not named here is there.
_LACKS = {
    ("cuda", "row_stats"): _NO_STREAMS,
    ("cuda", "column_stats"): _NO_STREAMS,
    ("cuda", "attention"): _NO_STREAMS,
    ("triton", "credit"): "the Triton backend has no credit: leave backend at None, or say 'torch'",
    ("cpu", "attention"): "attention on the CPU is torch's own: leave backend at None, or say 'torch'",
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
        usable = (name for name in _PREFERENCE.get(device.type, ()) if (name, pass_name) not in _LACKS)
        return next((name for name in usable if not _unusable(name, device)), "torch")
    reason = _unusable(backend, device) or _LACKS.get((backend, pass_name), "")
    if reason:
        raise ValueError(f"backend={backend!r} cannot run {pass_name} on {device.type} tensors: {reason}")
    return backend


def run(pass_name: str, backend: str | None, *args: Any) -> Any:
    """Call the pass of a backend, outside of autocast and autograd."""
    device = args[0].device
    chosen = choose(pass_name.removesuffix("_backward"), backend, device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return getattr(_module(chosen), pass_name)(*args)


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
