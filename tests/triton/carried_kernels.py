"""Compile for one GPU, ahead of time, all that the GPU's tests and benchmarks launch, into a folder that can travel.

On the GPU each kernel costs seconds of a processor, and there are hundreds. Triton finds them by the hash of their
source, options and its own files: the folder serves a machine with the same Python, Triton and sources, and is harmless
on any other. The passes are called as the tests call them, with a stand-in for the GPU's driver, and what they would
compile is kept. Needs no GPU; a process that interprets kernels cannot do it.

    python -m tests.triton.carried_kernels FOLDER [ARCH]
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rhythm_kernels as rk
import rhythm_kernels.backend.triton as passes
from benchmarks.shapes import SHAPES, AttentionShape
from rhythm_kernels.backend.triton import choosing, configs
from rhythm_kernels.backend.triton.interpreted import INTERPRETED

from ..cases import Case, random_cases
from ..gpu.test_on_device import DEVICE_CASES, SEEDS

_WANTED: list[tuple[str, Any, dict[str, Any]]] = []  # the workers, which are forks, find it here


def cases() -> Iterator[Case]:
    """What the GPU tests give to the passes."""
    yield from DEVICE_CASES
    for seed in SEEDS:
        yield from random_cases(seed, 5)
    for dtype in (torch.float32, torch.bfloat16):
        yield Case("captured", length=130, heads=4, kv_heads=2, dim=32, dtype=dtype)
    for suite in ("attention", "band_rows"):
        for shape in SHAPES[suite]["cuda", "full"]:
            assert isinstance(shape, AttentionShape)
            yield Case("benchmark", length=70, heads=2, kv_heads=1, dim=shape.dim, dtype=shape.torch_dtype)


def measure(case: Case) -> None:
    """Call every function of the package on a case, forward and backward."""
    q, k, options = case.inputs()
    lse = torch.zeros(q.shape[:-1]).transpose(-1, -2).contiguous()  # (B, H, T) or (H, total)
    for known in (lse, None):
        rk.waad(q, k, known, window=case.window, backend="triton", **options)
    rk.fai(q, k, lse, horizon=(3, 25), backend="triton", **options)
    rk.fai(q, k, lse, horizon=(3, None), backend="triton", **options)
    rk.column_moments(q, k, lse, backend="triton", **options)
    v, _ = case.values(q, k)
    inputs: list[Tensor] = [x.detach().requires_grad_() for x in (q, k, v)]
    out = rk.attention_with_rhythm(*inputs, window=case.window, backend="triton", **options)[0]
    torch.autograd.grad(out, inputs, torch.zeros_like(out))


def wanted(arch: str) -> list[tuple[Any, dict[str, Any]]]:
    """`(source, options)` of every kernel that would be compiled, each once."""
    import triton
    import triton.compiler

    from tests.triton.without_gpu import Driver

    found: dict[str, tuple[Any, dict[str, Any]]] = {}

    def note(source: Any, target: Any, options: dict[str, Any], **_: Any) -> None:
        key = f"{source.hash()}{sorted((name, str(value)) for name, value in options.items())}"
        found.setdefault(key, (source, dict(options)))

    before = triton.compiler.compile, choosing.architecture, passes.available
    triton.compiler.compile = note
    choosing.architecture, passes.available = lambda device: arch, lambda device: ""
    triton.runtime.driver.set_active(Driver(arch))
    try:
        for case in cases():
            measure(case)
        for kernel, tiles in configs.CANDIDATES.get(arch, {}).items():
            for tile in tiles:
                with choosing.forced({kernel: tile}):
                    for heads in ([0, 1, 2, 3], [0]):  # attention has a kernel of its own for heads not selected
                        measure(Case("candidate", dim=128, dtype=torch.bfloat16, options={"heads": heads}))
    finally:
        triton.compiler.compile, choosing.architecture, passes.available = before
    return list(found.values())


def _compile(index: int) -> str:
    """Compile one kernel; returns the name of its folder."""
    import triton
    from triton.runtime.cache import get_cache_manager

    from tests.triton.without_gpu import TARGETS

    arch, source, options = _WANTED[index]
    kernel = triton.compile(source, target=TARGETS[arch], options=options)
    return Path(get_cache_manager(kernel.hash).cache_dir).name


def compile_all(folder: Path, arch: str = "sm_90") -> int:
    """Fill `folder`, which Triton takes as TRITON_CACHE_DIR at the same path; returns how many kernels it holds.

    What is there already is not compiled again, and what no kernel of today is found by goes.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: a process that interprets kernels cannot compile them")
    os.environ |= {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
    _WANTED[:] = [(arch, *kernel) for kernel in wanted(arch)]
    print(f"{len(_WANTED)} kernels for {arch}", flush=True)
    context = multiprocessing.get_context("fork")
    with context.Pool(os.cpu_count()) as pool:
        found = set()
        for done, name in enumerate(pool.imap_unordered(_compile, range(len(_WANTED))), 1):
            found.add(name)
            if done % 50 == 0:
                print(f"{done} compiled", flush=True)
    for stale in folder.iterdir():
        if stale.name not in found:
            shutil.rmtree(stale)
    return len(_WANTED)


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]), *sys.argv[2:])
