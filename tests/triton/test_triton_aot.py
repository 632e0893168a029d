"""Every kernel compiles ahead of time for every target: no spills, shared memory that fits, tensor cores in use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("aot_compile.py")
ROOT = SCRIPT.parents[2]
# Shared memory a block may use, in bytes.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


def compile_kernels(*arguments: str) -> list[dict]:
    """Reports of the script, in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(report: dict) -> None:
    what = {name: report[name] for name in ("kernel", "arch", "dtype", "head_size", "features")}
    assert report["spills"] == 0, what
    assert report["shared"] <= SHARED[report["arch"]], what
    if report["dtype"] != "fp32":
        assert report["tensor_core"], what


def test_every_kernel_for_hopper() -> None:
    reports = compile_kernels("--arch", "sm_90", "--dtype", "bf16", "--head-size", "128")
    assert {report["kernel"] for report in reports} == {
        "band_columns", "band_rows", "column_moments", "column_stats", "row_stats",
    }  # fmt: skip
    for report in reports:
        check(report)


@pytest.mark.long
@pytest.mark.parametrize("arch", list(SHARED))
def test_every_target(arch: str) -> None:
    features = ("--feature", "", "--feature", "softcap,window,sinks")
    for report in compile_kernels("--arch", arch, "--dtype", "bf16", "--head-size", "128", *features):
        check(report)
