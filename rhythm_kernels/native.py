"""The compiled CPU passes and credit (`csrc/`): every backend's functions, on the extension `rhythm_kernels._C`.

Attention itself is torch's (:mod:`rhythm_kernels.torch_attention`); its statistics are the compiled row pass.

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
from torch import Tensor

from . import torch_attention
from .fallback import attention_backward as attention_backward  # torch's own, whichever pass made the statistics
from .torch_credit import gamma_levels

__all__ = [
    "attention",
    "attention_backward",
    "available",
    "band_columns",
    "band_rows",
    "build_info",
    "column_stats",
    "credit",
    "row_stats",
]

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


def available() -> str:
    """`""` where the compiled passes can run, else the reason."""
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
    reason = available()
    if reason:
        raise RuntimeError(reason)
    return torch.ops.rhythm_kernels_native


def _per_token(q: Tensor, heads: Tensor, per_head: bool, *planes: int) -> Tensor:
    """Memory for `(*planes, B, [Hs,] T)` float32; the op writes all of it."""
    shape = (*planes, q.shape[0], *((heads.shape[0],) if per_head else ()), q.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _within(window: int, q: Tensor) -> int:
    """The same measure by a window no larger than the length: `W - (W - d)` cancels where W is large."""
    return min(window, q.shape[1])


def band_rows(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    seqs: Tensor,
    heads: Tensor,
    max_seqlen: int,
    scale: float,
    softcap: float,
    window_left: int,
    sinks: Tensor | None,
    window: int,
    per_head: bool,
) -> Tensor:
    """WAAD (eq. 9), `(B, [Hs,] T)`: `W rowsum - sum A (W - (t - s))` over the last `window` keys of each row."""
    window = _within(window, q)
    out = _per_token(q, heads, per_head)
    registered().band_rows(q, k, lse, seqs, heads, scale, softcap, window_left, sinks, window, per_head, out)
    return out


def band_columns(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    seqs: Tensor,
    heads: Tensor,
    max_seqlen: int,
    scale: float,
    softcap: float,
    window_left: int,
    sinks: Tensor | None,
    lo: int,
    hi: int,
    per_head: bool,
) -> Tensor:
    """FAI (eq. 10), `(B, [Hs,] T)`: the mean of A over the rows at distance `lo .. hi` after each key."""
    out = _per_token(q, heads, per_head)
    registered().band_columns(q, k, lse, seqs, heads, scale, softcap, window_left, sinks, lo, hi, per_head, out)
    return out


def row_stats(
    q: Tensor,
    k: Tensor,
    seqs: Tensor,
    heads: Tensor,
    max_seqlen: int,
    scale: float,
    softcap: float,
    window_left: int,
    sinks: Tensor | None,
    window: int,
    per_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp `(B, Hs, T)`, WAAD and span `(B, [Hs,] T)` of each row, in one pass over its keys."""
    window = _within(window, q)
    lse = _per_token(q, heads, True)
    waad, span = _per_token(q, heads, per_head), _per_token(q, heads, per_head)
    registered().row_stats(q, k, seqs, heads, scale, softcap, window_left, sinks, window, per_head, lse, waad, span)
    return lse, waad, span


def column_stats(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    seqs: Tensor,
    heads: Tensor,
    max_seqlen: int,
    scale: float,
    softcap: float,
    window_left: int,
    sinks: Tensor | None,
    min_distance: int,
    moments: bool,
    per_head: bool,
) -> Tensor:
    """`(1, B, [Hs,] T)` mean of A over the rows `t >= s + min_distance`, or with `moments` `(5, B, [Hs,] T)`.

    The five are count, mean, population variance, skewness and kurtosis (`m4 / m2**2`).
    """
    out = _per_token(q, heads, per_head, 5 if moments else 1)
    registered().column_stats(
        q, k, lse, seqs, heads, scale, softcap, window_left, sinks, min_distance, moments, per_head, out
    )
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqs: Tensor,
    heads: Tensor,
    max_seqlen: int,
    scale: float,
    softcap: float,
    window_left: int,
    sinks: Tensor | None,
    window: int,
    per_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention, log-sum-exp, WAAD and span: torch's own attention and the compiled row pass."""
    rule = (scale, softcap, window_left, sinks)
    out, lse = torch_attention.forward(q, k, v, seqs, *rule)
    _, waad, span = row_stats(q, k, seqs, heads, max_seqlen, *rule, window, per_head)
    return out, lse, waad, span


def credit(
    waad: Tensor,
    fai: Tensor,
    score: Tensor | None,
    mask: Tensor,
    mode: str,
    gamma_amp: float,
    top: float,
    alpha: float,
    neighbors: int,
    bottom: bool,
    tau_waad: float | None,
    tau_delta: float | None,
) -> Tensor:
    """Gamma (eqs. 14 to 19), `(B, T)` float32, each response by one thread."""
    out = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
    levels = gamma_levels(gamma_amp, alpha)
    registered().credit(waad, fai, score, mask, mode, top, neighbors, bottom, tau_waad, tau_delta, levels, out)
    return out
