"""Kernels compiled ahead of time for a machine with a GPU: what both calls launch there is found compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Collects what would be compiled, compiles every hundredth, and asks for these again with a compiler that refuses.
PROGRAM = """
import json, os, sys
from tests.triton import carried_kernels as carried
from rhythm_kernels.backend.triton import configs
os.environ |= {"TRITON_CACHE_DIR": sys.argv[1], "TRITON_STORE_BINARY_ONLY": "1"}
kernels = carried.wanted("sm_90")
carried._WANTED[:] = [("sm_90", *kernel) for kernel in kernels[::100]]
for index in range(len(carried._WANTED)):
    carried._compile(index)
files = sorted(path for _, _, paths in os.walk(sys.argv[1]) for path in paths)
from triton.backends.nvidia.compiler import CUDABackend
def refuse(*_, **__):
    raise AssertionError("compiled again")
CUDABackend.add_stages = refuse
for index in range(len(carried._WANTED)):
    carried._compile(index)
print(json.dumps({"names": sorted({source.name for source, _ in kernels}), "count": len(kernels),
                  "candidates": sorted(configs.CANDIDATES["sm_90"]), "files": files}))
"""


@pytest.mark.long
def test_what_is_carried_is_found(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    passes = ("band_rows", "band_columns", "row_stats", "column_stats", "attention", "attention_dq", "attention_dkv")
    assert {f"{name}_kernel" for name in passes} <= set(found["names"])
    assert found["count"] > 300
    assert found["candidates"] and any(name.endswith(".cubin") for name in found["files"])
    assert not any(name.endswith((".ptx", ".llir", ".ttgir")) for name in found["files"]), "binaries alone travel"
