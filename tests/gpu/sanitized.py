"""Small cases of every kernel once, for `compute-sanitizer python -m tests.gpu.sanitized`; checks nothing itself.

`--backend cuda` leaves Triton's kernels out, which take long to compile and whose bounds Triton's own masks keep.

`PYTORCH_NO_CUDA_MEMORY_CACHING=1` gives every tensor an allocation of its own, so that the sanitizer sees its bounds.
"""

from __future__ import annotations

import argparse
import sys

import torch

import rhythm_kernels as rk
from rhythm_kernels.settings import CREDIT_MODES

from ..cases import CASES, Case
from . import on_device

NAMES = (
    "one past a tile",
    "head size 80",
    "padding on both sides, an empty row",
    "packed responses",
    "everything",
    "bfloat16",
)


def run(case: Case, backend: str, device: str) -> None:
    q, k, options = case.inputs(device)
    packed = case.lengths is not None
    heads, length = (q.shape[1], q.shape[0]) if packed else (q.shape[2], q.shape[1])
    lse = torch.zeros((heads, length) if packed else (q.shape[0], heads, length), device=device)
    rk.waad(q, k, lse, window=case.window, backend=backend, **options)
    rk.fai(q, k, lse, horizon=(3, 25), backend=backend, **options)
    if not on_device.lacks(backend, device, "row_stats", "column_stats"):
        rk.span(q, k, backend=backend, **options)
        rk.column_moments(q, k, lse, backend=backend, **options)
    if not on_device.lacks(backend, device, "attention"):
        rk.attention_with_rhythm(q, k, k, backend=backend, **options)


def run_credit(device: str) -> None:
    """The best backend of the device: on a GPU the CUDA kernel where it was built."""
    waad, fai, mask = on_device.credit_inputs(device, 0)
    for mode in CREDIT_MODES:
        for dtype in (torch.float32, torch.float64):
            print("credit", mode, dtype, flush=True)
            rk.rhythm_credit(waad.to(dtype), fai.to(dtype), mask, mode, entropy=fai)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.sanitized", description=__doc__)
    parser.add_argument("--backend", action="append", choices=("cuda", "triton"), help="default: both")
    wanted = parser.parse_args(arguments).backend or ("cuda", "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = [name for name in wanted if not on_device.lacks(name, device, "band_rows", "band_columns")]
    for backend in backends:
        for case in CASES:
            if case.name in NAMES:
                print(backend, case.name, flush=True)
                run(case, backend, device)
    run_credit(device)
    if device == "cuda":
        torch.cuda.synchronize()
    return 0 if backends else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
