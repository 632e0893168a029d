"""The peers: attention libraries that nobody here wrote, interpreted on CPU tensors.

They have an environment of their own (the row `peers` of tests/matrix.sh). Elsewhere their tests are skipped; the row
sets PEERS=required, under which a package that is missing is an error.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import pytest
import torch

SKIPPED = "peer environment: run by `bash tests/matrix.sh PYTHON peers`"


def require(name: str) -> ModuleType:
    """The module of a peer, or the test module that asks for it is skipped (never under PEERS=required)."""
    if os.environ.get("PEERS") == "required":
        return importlib.import_module(name)
    if torch.cuda.is_available():  # Triton compiles there; the benchmarks' gate is where peers meet a GPU
        pytest.skip(SKIPPED, allow_module_level=True)
    return pytest.importorskip(name, reason=SKIPPED)


@functools.cache
def flash_attn() -> ModuleType:
    """flash-attn 2 on CPU tensors: its Triton backend, which in 2.8.3 drops windows and softcap, and whose bfloat16
    the interpreter gets wrong; so float32 and float16, without either."""
    os.environ.setdefault("FLASH_ATTENTION_TRITON_AMD_ENABLE", "TRUE")  # read when flash_attn is imported
    package = require("flash_attn")
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    for name in ("forward", "backward", "varlen_forward", "varlen_backward"):
        operator = getattr(interface, f"_flash_attn_{name}")
        operator.register_kernel("cpu")(operator._init_fn)  # the package registers them for CUDA alone
    return package
