"""The compiled extension `rhythm_kernels._C` (`csrc/`): loading it, and telling what it holds.

Importing this module loads nothing; the extension is loaded when it is first asked for. Which instruction set runs is
chosen from what the processor has; the environment variable `RHYTHM_CPU_CAPABILITY` forces one of those that
`build_info()` lists, which is meant for tests.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch

__all__ = ["build_info", "registered", "unusable"]

_NOT_BUILT = (
    "the compiled kernels were not built: with torch and a C++17 compiler installed, "
    "run `pip install --no-build-isolation .`"
)


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The extension, whose import registers `torch.ops.rhythm_kernels_native`, or why there is none."""
    try:
        return importlib.import_module("rhythm_kernels._C"), ""
    except ModuleNotFoundError:
        return None, _NOT_BUILT
    except ImportError as error:  # built for another torch or machine
        return None, f"the compiled kernels cannot be loaded: {error}"


def unusable() -> str:
    """Why there is no extension to run; empty where there is one."""
    return _load()[1]


def build_info() -> dict[str, Any]:
    """What was compiled, and what of it is in use.

    `torch`: the version built with (the binary runs on it and on later ones); `compiler`; `capabilities`: each
    instruction set compiled -> whether this processor can run it; `capability`: the one in use; `threads`; `cuda`:
    whether the CUDA kernels were `built`, then `archs` (compute capabilities, `+PTX` where later ones can compile for
    themselves) and the version of `nvcc`, else the `reason`. Without the extension, `available` says why and nothing
    else is known.
    """
    extension, reason = _load()
    if extension is None:
        return {"available": False, "reason": reason}
    capabilities: dict[str, bool] = extension.capabilities()
    best = [name for name, runs in capabilities.items() if runs][-1]
    return {
        "available": True,
        "torch": extension.torch_version,
        "compiler": extension.compiler,
        "capabilities": capabilities,
        "capability": os.environ.get("RHYTHM_CPU_CAPABILITY", best),
        "threads": torch.get_num_threads(),
        "cuda": _cuda(extension),
    }


def _cuda(extension: ModuleType) -> dict[str, Any]:
    if extension.cuda_reason:
        return {"built": False, "reason": extension.cuda_reason}
    return {"built": True, "archs": extension.cuda_archs.split(";"), "nvcc": extension.nvcc}


def registered() -> Any:
    """`torch.ops.rhythm_kernels_native`, once the extension is loaded; RuntimeError where there is none."""
    reason = unusable()
    if reason:
        raise RuntimeError(reason)
    return torch.ops.rhythm_kernels_native
