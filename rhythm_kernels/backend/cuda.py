"""The CUDA C++ kernels (`csrc/cuda`): the two bands and credit, on NVIDIA GPUs from compute capability 8.0.

They are part of the extension that :mod:`.extension` loads, where nvcc was there when it was built.
"""

from __future__ import annotations

import ctypes
import re

import torch
from torch import Tensor

from ..rule import Choice, Rule, per_token
from . import extension

__all__ = ["available", "band_columns", "band_rows", "credit"]

_REBUILD = "with nvcc installed, run `pip install --no-build-isolation .`"


def available(device: torch.device) -> str:
    """The reason why the kernels cannot run on tensors of this device; empty where they can."""
    info = extension.build_info()
    if not info["available"]:
        return info["reason"]
    if not info["cuda"]["built"]:
        return f"the CUDA kernels were not built ({info['cuda']['reason']}): {_REBUILD}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if device.type != "cuda":
        return f"the CUDA kernels serve CUDA tensors, not {device.type} ones"
    return _unserved(torch.cuda.get_device_capability(device), info["cuda"]["archs"], info["cuda"]["nvcc"], _driver())


def _driver() -> tuple[int, int]:
    """The CUDA version that the driver was made for; torch's own tensors on a GPU mean that it is there."""
    number = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    return number.value // 1000, number.value % 1000 // 10


def _unserved(capability: tuple[int, int], archs: list[str], nvcc: str, driver: tuple[int, int]) -> str:
    """Why kernels built for `archs` by that `nvcc` cannot run on a device and its driver; empty where they can."""
    name = "{}.{}".format(*capability)
    if capability < (8, 0):
        return f"the CUDA kernels need compute capability 8.0 or later, the device has {name}"
    compiled = later = False  # whether there is machine code for it, PTX for it
    for arch in archs:
        match = re.fullmatch(r"(\d+)(\d)([af]?)(\+PTX)?", arch)
        assert match is not None, arch
        built, special, ptx = (int(match[1]), int(match[2])), match[3], match[4]
        # Machine code runs on the same major version from its minor version on; that of an `a` on that chip alone, that
        # of an `f` and plain code on the family. PTX is compiled for any later chip, that of an `a` is not.
        same_chip = capability == built
        family = capability[0] == built[0] and capability >= built and special != "a"
        compiled |= same_chip or family
        later |= bool(ptx) and not special and capability >= built
    if not compiled and not later:
        return (
            f"the CUDA kernels were built for {', '.join(archs)}, the device has {name}: set RHYTHM_CUDA_ARCHS; "
            f"{_REBUILD}"
        )
    # A driver runs all code of its major version's nvccs, and compiles the PTX of those no newer than itself.
    major, minor = (int(part) for part in nvcc.split("."))
    if driver < (major, 0 if compiled else minor):
        return (
            f"the CUDA kernels were built by nvcc {nvcc}, the driver is of CUDA {driver[0]}.{driver[1]}: "
            f"install a newer driver, or an older nvcc and build again; {_REBUILD}"
        )
    return ""


def _result(q: Tensor, rule: Rule, per_head: bool) -> Tensor:
    """Memory for `(B, [Hs,] T)` float32, every position of which the kernels write, where there is something to do."""
    out = per_token(q, rule, per_head)
    return out if rule.seqs.shape[0] and rule.max_seqlen else out.zero_()


def band_rows(q: Tensor, k: Tensor, lse: Tensor, rule: Rule, window: int, per_head: bool) -> Tensor:
    """WAAD (eq. 9), `(B, [Hs,] T)`: `W rowsum - sum A (W - (t - s))` over the last `window` keys of each row."""
    out = _result(q, rule, per_head)
    extension.registered().cuda_band_rows.default(q, k, lse, *rule, window, per_head, out)
    return out


def band_columns(q: Tensor, k: Tensor, lse: Tensor, rule: Rule, lo: int, hi: int, per_head: bool) -> Tensor:
    """FAI (eq. 10), `(B, [Hs,] T)`: the mean of A over the rows at distance `lo .. hi` after each key."""
    out = _result(q, rule, per_head)
    extension.registered().cuda_band_columns.default(q, k, lse, *rule, lo, hi, per_head, out)
    return out


def _credit_scratch(waad: Tensor) -> int:
    """Bytes for all responses; credit_scratch() of csrc/include/rhythm/credit.h gives those of one."""
    batch, tokens = waad.shape
    return batch * ((tokens * (3 * (8 if waad.dtype == torch.float64 else 4) + 9) + 63) // 64 * 64)


def credit(waad: Tensor, fai: Tensor, score: Tensor | None, mask: Tensor, choice: Choice) -> Tensor:
    """Gamma (eqs. 14 to 19), `(B, T)` float32, all responses in one launch."""
    scratch = torch.empty(_credit_scratch(waad), dtype=torch.uint8, device=mask.device)
    out = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
    extension.registered().cuda_credit.default(waad, fai, score, mask, *choice, scratch, out)
    return out
