"""One kernel on one workload: whether a tile runs, spills, gives the results of the table's tile, and how fast it is.

Times are those of a whole pass: `attention_dq` and `attention_dkv`, two kernels of one pass, have the same.
"""

from __future__ import annotations

import inspect
import sys
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import triton as passes
from ..backend.triton import choosing
from ..backend.triton.configs import Tile
from ..backend.triton.interpreted import INTERPRETED
from ..rule import Rule

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Kernel: the pass that runs it, further arguments of the pass, and what its outputs are.
RUNS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "band_rows": ("band_rows", {}, ("waad",)),
    "band_columns": ("band_columns", {}, ("fai",)),
    "column_stats": ("column_stats", {"moments": False}, ("fai",)),
    "column_moments": ("column_stats", {"moments": True}, ("moments",)),
    "row_stats": ("row_stats", {}, ("lse", "waad", "span")),
    "attention": ("attention", {}, ("tokens", "lse", "waad", "span")),
    "attention_alone": ("attention", {}, ("tokens", "lse", "waad", "span")),
    "attention_dq": ("attention_backward", {}, ("tokens", "tokens", "tokens")),
    "attention_dkv": ("attention_backward", {}, ("tokens", "tokens", "tokens")),
}


class Workload(NamedTuple):
    """What a trial runs: random tokens of one sequence, `length` of them."""

    length: int
    heads: int
    kv_heads: int
    head_size: int
    dtype: str


def arguments(workload: Workload, device: torch.device, full_rule: bool) -> dict[str, Any]:
    """The arguments of every pass, with the plain score rule, or with softcap, sliding window and sinks at once.

    The full rule has no ALiBi slopes: of what ALiBi makes of a kernel, the tuner sees nothing.
    """
    generator = torch.Generator().manual_seed(0)

    def tokens(heads: int) -> Tensor:
        x = torch.randn(1, workload.length, heads, workload.head_size, generator=generator)
        return x.to(device, DTYPES[workload.dtype])

    given = {
        "q": tokens(workload.heads), "k": tokens(workload.kv_heads), "v": tokens(workload.kv_heads),
        "grad_out": tokens(workload.heads),
        "window": 10, "lo": 10, "hi": 100, "min_distance": 4, "per_head": False,
    }  # fmt: skip
    given["rule"] = Rule(
        seqs=torch.tensor([[0, 0, workload.length, 0]], dtype=torch.int32, device=device),
        heads=torch.arange(workload.heads, dtype=torch.int32, device=device)[:, None].repeat(1, 2),
        max_seqlen=workload.length,
        scale=workload.head_size**-0.5,
        softcap=20.0 if full_rule else 0.0,
        window_left=workload.length // 3 if full_rule else -1,
        sinks=torch.randn(workload.heads, generator=generator).to(device) if full_rule else None,
    )
    given["out"], given["lse"] = outputs("attention", given)[:2]
    return given


def outputs(kernel: str, given: dict[str, Any]) -> list[Tensor]:
    """Run the pass of a kernel."""
    name, fixed, _ = RUNS[kernel]
    if kernel == "attention_alone":
        rule = given["rule"]
        given = given | {"rule": rule._replace(heads=rule.heads[:1])}  # the kernel runs heads that are not selected
    function = getattr(passes, name)
    wanted = inspect.signature(function).parameters
    found = function(**{key: value for key, value in (given | fixed).items() if key in wanted})
    return [found] if isinstance(found, Tensor) else list(found)


def limit(kind: str, want: Tensor, eps: float) -> Tensor:
    """How far an output may be from that of the table's tile: at most what the tests allow from the definition."""
    size = want.abs()
    if kind == "tokens":  # roundings of the dtype, at the size of the token's vector
        return 2 * max(eps, 1e-4) * (size.amax(-1, keepdim=True) + size.max() / 64)
    if kind == "moments":
        return 1e-3 * torch.maximum(size, size.amax(-1, keepdim=True).clamp(max=1))
    if kind == "lse":
        return 1e-4 * size.clamp(min=1)
    return 1e-4 * (size.max() if kind == "span" else size.max().clamp(max=1))


def compiled() -> list[dict[Any, Any]]:
    """The caches in which Triton keeps the passes' compiled kernels, one for each kernel; none where it interprets."""
    modules = [sys.modules[f"{passes.__name__}.{name}"] for name in passes.__all__ if name != "available"]
    return [x.device_caches for module in modules for x in vars(module).values() if hasattr(x, "device_caches")]


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _wait() -> None:
    if not INTERPRETED:
        torch.cuda.synchronize()


class Trial:
    """One kernel on one workload: the results of the table's tile, to which those of a candidate are compared."""

    def __init__(self, kernel: str, given: dict[str, Any]) -> None:
        self.kernel, self.given = kernel, given
        self.want, self.spilled = self._run()

    def _run(self) -> tuple[list[Tensor], int]:
        """The outputs, and how many 32-bit words the kernels that were launched spill, all together."""
        _wait()  # clearing a cache unloads its kernels, which must have ended
        for cache in compiled():
            cache.clear()  # then it holds only what this run launches; Triton still has the binaries on disk
        found = outputs(self.kernel, self.given)
        _wait()
        kernels = {id(x): x for cache in compiled() for device in cache.values() for x in device[0].values()}
        return found, sum(kernel.n_spills for kernel in kernels.values())

    def objection(self, tile: Tile) -> str:
        """Why a tile is refused; empty where it runs, spills no more than the table's tile and agrees with it."""
        from triton.errors import TritonError

        try:
            with choosing.forced({self.kernel: tile}):
                found, spilled = self._run()
        except (TritonError, RuntimeError) as error:
            return f"does not run: {first_line(error)}"
        if spilled > self.spilled:
            return f"spills: {spilled} words, the table's {self.spilled}"
        for kind, x, want in zip(RUNS[self.kernel][2], found, self.want):
            eps = torch.finfo(want.dtype).eps
            # `not all within` rather than `any beyond`: a NaN compares false, and must be refused.
            if not bool(((x.float() - want.float()).abs() <= limit(kind, want.float(), eps)).all()):
                return f"wrong: {kind}"
        return ""

    def milliseconds(self, tile: Tile) -> float:
        """The median time of the pass; interpreted, of one call by the wall clock."""
        with choosing.forced({self.kernel: tile}):
            if INTERPRETED:
                begin = time.perf_counter()
                outputs(self.kernel, self.given)
                return 1000 * (time.perf_counter() - begin)
            from triton.testing import do_bench

            return float(do_bench(lambda: outputs(self.kernel, self.given), warmup=10, rep=60, return_mode="median"))
