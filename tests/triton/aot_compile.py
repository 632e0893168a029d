"""Compile Triton kernels ahead of time, without a GPU, and print what they cost as JSON lines.

A script of its own, because a process that interprets kernels cannot compile them:
``python tests/triton/aot_compile.py --arch sm_90 --dtype bf16 --head-size 128 --kernel band_rows``.
Each argument may be given several times; features are switched on by ``--feature softcap,window,sinks``.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rhythm_kernels.triton import configs, kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
INSTRUCTIONS = {
    "sm_80": ("ptx", "mma.sync"),
    "sm_90": ("ptx", "mma.sync|wgmma.mma_async"),
    "sm_100": ("ptx", "mma.sync|tcgen05.mma"),
    "gfx942": ("amdgcn", "v_mfma_"),
}
SCALARS = {"tl.int64": "i64", "tl.int32": "i32", "tl.float32": "fp32"}


def compile_one(name: str, arch: str, dtype: str, head_size: int, features: frozenset[str]) -> dict[str, Any]:
    """Compile one kernel as its launcher would, and read registers, shared memory, spills and instructions."""
    kernel, variant = kernels()[name]
    bits = 32 if dtype == "fp32" else 16
    tile = configs.choose(name, arch, bits, head_size)
    low, high = configs.chunks(head_size)
    constants: dict[str, Any] = {
        "ALIGN": 16, "D": head_size, "D0": low, "D1": high, "UPCAST": False,
        "HAS_SOFTCAP": "softcap" in features, "HAS_WINDOW": "window" in features,
        "ROWS": tile.rows, "KEYS": tile.keys, "BAND_KEYS": min(32, tile.keys), **variant,
    }  # fmt: skip
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    if "sinks" not in features:
        constants["sinks"] = None
    signature, attributes = {}, {}
    for index, (argument, parameter) in enumerate(inspect.signature(kernel.fn).parameters.items()):
        if argument in constants:
            signature[argument] = "constexpr"
        elif isinstance(parameter.annotation, str):
            signature[argument] = SCALARS[parameter.annotation]
        else:
            fixed = {"seqs": "*i32", "heads": "*i32"}
            half = argument in ("q", "k", "v", "grad_out")
            signature[argument] = fixed.get(argument, f"*{dtype}" if half else "*fp32")
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.registers:
        options["maxnreg"] = tile.registers
    compiled = triton.compile(source, target=TARGETS[arch], options=options)
    language, pattern = INSTRUCTIONS[arch]
    report = {
        "kernel": name, "arch": arch, "dtype": dtype, "head_size": head_size, "features": sorted(features),
        "tile": tile._asdict(), "shared": compiled.metadata.shared,
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


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", action="append", choices=sorted(kernels()))
    parser.add_argument("--arch", action="append", choices=sorted(TARGETS))
    parser.add_argument("--dtype", action="append", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--head-size", action="append", type=int)
    parser.add_argument("--feature", action="append", default=None)
    given = parser.parse_args(arguments)
    features = [frozenset(filter(None, text.split(","))) for text in given.feature or [""]]
    for case in itertools.product(
        given.kernel or kernels(), given.arch or TARGETS, given.dtype or ["bf16"], given.head_size or [128], features
    ):
        print(json.dumps(compile_one(*case)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
