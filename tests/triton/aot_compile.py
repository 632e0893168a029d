"""Compile Triton kernels ahead of time, without a GPU, and print what they cost as JSON lines.

A script of its own, because a process that interprets kernels cannot compile them:
``python -m tests.triton.aot_compile --arch sm_90 --dtype bf16 --head-size 128 --kernel band_rows``.
Each argument may be given several times; features are switched on by ``--feature softcap,sliding_window,sinks,alibi``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from rhythm_kernels.tuning.trial import RUNS

from .without_gpu import DTYPES, PASSES, TARGETS, Launch, arguments, launches

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = {
    "sm_80": ("ptx", "mma.sync"),
    "sm_90": ("ptx", "mma.sync|wgmma.mma_async"),
    "sm_100": ("ptx", "mma.sync|tcgen05.mma"),
    "gfx942": ("amdgcn", "v_mfma_"),
}


def launched(
    arch: str, dtype: str, head_size: int, v_size: int, features: frozenset[str], only: str = ""
) -> Iterator[Launch]:  # fmt: skip
    """Every kernel that the passes launch for such inputs, each variant once; `only`: those of one kernel's pass."""
    rule: dict[str, Any] = {"size": head_size, "v_size": v_size, "dtype": DTYPES[dtype]}
    if "sliding_window" in features:
        rule["window_left"] = 20
    if "softcap" in features:
        rule["softcap"] = 30.0
    if "sinks" in features:
        rule["sinks"] = torch.zeros(4)
    if "alibi" in features:
        rule["alibi_slopes"] = torch.zeros(2, 4)
    for name in PASSES if not only else (RUNS[only][0] if only != "column_moments" else only,):
        yield from launches(arch, name, arguments(**rule))


def compile_one(launch: Launch, arch: str) -> dict[str, Any]:
    """Compile it as its launcher would, and read registers, shared memory, spills and instructions."""
    compiled = triton.compile(launch.source, target=TARGETS[arch], options=launch.options)
    language, pattern = INSTRUCTIONS[arch]
    report = {
        "kernel": launch.name, "tile": launch.tile._asdict(), "shared": compiled.metadata.shared,
        "tensor_core": sorted(set(re.findall(pattern, compiled.asm[language]))),
    }  # fmt: skip
    return report | (amd_resources(compiled.asm) if arch == "gfx942" else nvidia_resources(compiled.asm))


def nvidia_resources(asm: dict[str, Any]) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([TOOLS / "nvdisasm", "-c", cubin.name], capture_output=True, text=True, check=True).stdout
    return {
        "registers": max(int(n) for n in re.findall(r"REG:(\d+)", usage)),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
    }


def amd_resources(asm: dict[str, Any]) -> dict[str, int]:
    text = asm["amdgcn"]

    def last(key: str) -> int:
        return max((int(n) for n in re.findall(rf"\.{key}:\s+(\d+)", text)), default=0)

    return {
        "registers": last("vgpr_count"),
        "spills": last("vgpr_spill_count"),  # scalar registers spill into vector lanes, not memory
    }


def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", action="append")
    parser.add_argument("--arch", action="append", choices=sorted(TARGETS))
    parser.add_argument("--dtype", action="append", choices=sorted(DTYPES))
    parser.add_argument("--head-size", action="append", help="of q and k, or of q and k and of v: 192,128")
    parser.add_argument("--feature", action="append", default=None)
    chosen = parser.parse_args(given)
    features = [frozenset(filter(None, text.split(","))) for text in chosen.feature or [""]]
    sizes = [[int(size) for size in text.split(",")] for text in chosen.head_size or ["128"]]
    for arch, dtype, size, used in itertools.product(
        chosen.arch or TARGETS, chosen.dtype or ["bf16"], sizes, features
    ):  # fmt: skip
        point = {"arch": arch, "dtype": dtype, "head_size": size[0], "v_size": size[-1], "features": sorted(used)}
        for launch in launched(arch, dtype, size[0], size[-1], used):
            if chosen.kernel is None or launch.name in chosen.kernel:
                print(json.dumps(point | compile_one(launch, arch)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
