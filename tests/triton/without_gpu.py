"""Call the passes with a stand-in for the GPU's driver: what would be compiled, and with which options.

For scripts of their own, because a process that interprets kernels cannot compile them. Every pass is called as users
call it; its launcher chooses the tile and makes the arguments; Triton computes the key under which it keeps a compiled
kernel, and is stopped where it would compile.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import rhythm_kernels.backend.triton as passes
from rhythm_kernels.backend.triton import choosing, configs
from rhythm_kernels.rule import Rule

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PASSES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    **{name: (getattr(passes, name), {}) for name in passes.__all__ if name not in ("available", "kernels")},
    "column_stats": (passes.column_stats, {"moments": False}),
    "column_moments": (passes.column_stats, {"moments": True}),
}


class Launch(NamedTuple):
    """One kernel that a pass launched: its name among the launch choices, and what Triton would compile."""

    name: str
    tile: configs.Tile
    key: str
    source: ASTSource
    options: dict[str, Any]


class Driver:
    """What a launch asks of a driver before it compiles. Triton keeps one target a device: each has its own."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.arch)

    def get_current_stream(self, device: int) -> int:
        return 0


def tokens(length: int, heads: int, batch: int, layout: str, size: int, dtype: torch.dtype) -> Tensor:
    """`(batch, length, heads, size)` in one of the layouts that models have."""
    if layout == "heads first":
        return torch.zeros(batch, heads, length, size, dtype=dtype).transpose(1, 2)
    if layout == "fused":
        return torch.zeros(batch, length, 3 * heads, size, dtype=dtype)[:, :, heads : 2 * heads]
    return torch.zeros(batch, length, heads, size, dtype=dtype)


def arguments(
    length: int = 70, batch: int = 2, sequences: int = 2, heads: int = 4, kv_heads: int = 2, selected: int = 2,
    layout: str = "tokens first", lse_offset: int = 0, size: int = 64, v_size: int = 0,
    dtype: torch.dtype = torch.bfloat16, **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """The arguments of every pass, as the ops give them; the values in the tensors are never read.

    `changes`: fields of the rule, and other arguments of passes (window, lo, hi, min_distance, per_head).
    """

    def make(n_heads: int, width: int) -> Tensor:
        return tokens(length, n_heads, batch, layout, width, dtype)

    lse = torch.zeros(batch * heads * length + lse_offset)[lse_offset:].view(batch, heads, length)
    v_size = v_size or size
    rule = Rule(
        torch.zeros(sequences, 4, dtype=torch.int32), torch.zeros(selected, 2, dtype=torch.int32), length,
        0.125, 0.0, -1, None,
    )._replace(**{name: value for name, value in changes.items() if name in Rule._fields})  # fmt: skip

    def near(x: Any) -> Any:
        return min(x, length) if type(x) is int else x

    read = {"window": 10, "lo": 10, "hi": 100, "min_distance": 4, "per_head": False}
    read |= {name: value for name, value in changes.items() if name not in Rule._fields}
    return {
        "q": make(heads, size), "k": make(kv_heads, size), "v": make(kv_heads, v_size),
        "out": make(heads, v_size), "grad_out": make(heads, v_size), "lse": lse, "rule": Rule(*map(near, rule)),
        **{name: near(value) for name, value in read.items()},
    }  # fmt: skip


def launches(arch: str, name: str, given: dict[str, Any]) -> list[Launch]:
    """Everything that a pass would compile for these arguments on this architecture."""
    function, fixed = PASSES[name]
    chosen: list[tuple[str, configs.Tile]] = []
    found: list[Launch] = []
    choose = choosing.choose

    def note_choice(kernel: str, *rest: Any) -> configs.Tile:
        chosen.append((kernel, choose(kernel, *rest)))
        return chosen[-1][1]

    def stop(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
        every = json.loads(compile["specialization_data"])["options"]
        options = {name: every[name] for name in ("num_warps", "num_stages", "maxnreg") if every.get(name)}
        found.append(Launch(*chosen[-1], f"{fn.name} {key}", source, options))
        return True  # do not compile

    before = choosing.architecture, knobs.runtime.jit_cache_hook
    choosing.architecture, choosing.choose = lambda device: arch, note_choice
    knobs.runtime.jit_cache_hook = stop
    triton.runtime.driver.set_active(Driver(arch))
    try:
        wanted = inspect.signature(function).parameters
        function(**{key: value for key, value in (given | fixed).items() if key in wanted})
    finally:
        choosing.architecture, knobs.runtime.jit_cache_hook = before
        choosing.choose = choose
    assert found, f"{name} launched nothing"
    return found
