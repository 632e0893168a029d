"""Every kernel compiles ahead of time for every target: no spills, shared memory that fits, tensor cores in use."""

from __future__ import annotations

import json

import pytest
import triton

from rhythm_kernels.backend.triton import configs

from . import compiling

# Shared memory a block may use, in bytes; the table of sm_80 also serves sm_86, sm_89 and sm_120.
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Instructions that spill: none with the Triton that the launch choices were made with. Other versions bring other
# register allocators, with which a few may appear.
SPILLS = 0 if triton.__version__.startswith("3.8.") else 64
# An empty kernel compiles without an error, to 4 registers; the least that a kernel of ours takes is 64.
REGISTERS = 40
FULL_RULE = "softcap,sliding_window,sinks"
# (architecture, inputs, head sizes of q and k and of v, rule): every architecture with 16-bit and 32-bit inputs, every
# kind of head size (one chunk, two, a masked one), the plain rule and the full one, but not all their combinations.
POINTS = [
    ("sm_80", "bf16", "16", FULL_RULE),
    ("sm_80", "bf16", "112", ""),
    ("sm_80", "fp32", "160", FULL_RULE),
    ("sm_90", "bf16", "128", FULL_RULE),
    ("sm_90", "bf16", "256", ""),
    ("sm_90", "fp32", "112", ""),
    ("sm_100", "bf16", "128", FULL_RULE),
    ("sm_100", "fp16", "64", ""),
    ("sm_100", "fp32", "80", ""),
    ("gfx942", "bf16", "128", FULL_RULE),
    ("gfx942", "fp16", "192", ""),
    ("gfx942", "fp32", "64", FULL_RULE),
]
# Attention has launch choices for more head sizes and rules, some of whose kernels once spilled, and unequal sizes.
ATTENTION = {"attention", "attention_alone", "attention_dq", "attention_dkv"}
ATTENTION_POINTS = [
    ("sm_80", "bf16", "144", FULL_RULE),
    ("sm_80", "bf16", "192,128", ""),
    ("sm_90", "fp16", "112", ""),
    ("sm_90", "bf16", "128", "sliding_window"),
    ("sm_90", "bf16", "160", FULL_RULE),
    ("sm_100", "bf16", "192", ""),
]


def compile_kernels(*arguments: str) -> list[dict]:
    """Reports of the script, in a process that does not interpret."""
    return [json.loads(line) for line in compiling.output("aot_compile", *arguments).splitlines()]


def check(reports: list[dict], kernels: set[str]) -> None:
    """All of these kernels were compiled, none is empty or spills, shared memory fits, tensor cores are used."""
    assert {report["kernel"] for report in reports} == kernels
    for report in reports:
        assert report["registers"] >= REGISTERS, report
        assert report["spills"] <= SPILLS, report
        assert report["shared"] <= SHARED[report["arch"]], report
        assert report["dtype"] == "fp32" or report["tensor_core"], report


def test_every_kernel_for_hopper() -> None:
    check(compile_kernels("--arch", "sm_90", "--dtype", "bf16", "--head-size", "128"), set(configs.TILES["sm_90"]))


@pytest.mark.long
@pytest.mark.parametrize(("arch", "dtype", "sizes", "rule"), POINTS)
def test_every_target(arch: str, dtype: str, sizes: str, rule: str) -> None:
    point = ("--arch", arch, "--dtype", dtype, "--head-size", sizes, "--feature", rule)
    check(compile_kernels(*point), set(configs.TILES[arch]))


@pytest.mark.long
@pytest.mark.parametrize(("arch", "dtype", "sizes", "rule"), ATTENTION_POINTS)
def test_attention_at_other_head_sizes(arch: str, dtype: str, sizes: str, rule: str) -> None:
    point = ("--arch", arch, "--dtype", dtype, "--head-size", sizes, "--feature", rule)
    chosen = [argument for name in sorted(ATTENTION) for argument in ("--kernel", name)]
    check(compile_kernels(*point, *chosen), ATTENTION)
