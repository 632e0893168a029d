"""The passes in Triton: NVIDIA from sm_80, AMD gfx942, and CPU tensors in Triton's interpreter.

Importing this module imports triton, and so only the dispatcher does, when it needs to. :func:`available` says why the
passes cannot run where they cannot.
"""

from __future__ import annotations

import torch

from .interpreted import INTERPRETED, read_scalars_under_any_numpy

try:
    if INTERPRETED:
        read_scalars_under_any_numpy()
    from .attention import attention
    from .attention_backward import attention_backward
    from .band_columns import band_columns
    from .band_rows import band_rows
    from .column_stats import column_stats
    from .row_stats import row_stats
except ImportError as error:
    _import_error = f"triton cannot be imported: {error}"
else:
    _import_error = ""

__all__ = [
    "attention", "attention_backward", "available", "band_columns", "band_rows", "column_stats", "row_stats",
]  # fmt: skip


def available(device: torch.device) -> str:
    """The reason why the passes cannot run on tensors of this device; empty where they can."""
    if _import_error:
        return _import_error
    if INTERPRETED:
        return ""
    if device.type != "cuda":
        return f"Triton kernels need a GPU, got a {device.type} tensor (TRITON_INTERPRET=1 interprets them)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton kernels need compute capability 8.0 or later"
    return ""
