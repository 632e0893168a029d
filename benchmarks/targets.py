"""The project's performance targets as data, and whether saved entries meet them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .entries import Entry


@dataclass(frozen=True)
class Target:
    """`rival`'s median over `against`'s at most `bound`; or, with `against` empty, its bandwidth share at least that.

    `rival`: a name, or several of which the fastest counts. `length`: the shape's tokens; `layout`: other dimensions
    that tell shapes of one length apart. `as_speedup`: print the ratio the other way round. `memory`: of peak memory in
    place of the time. `by_cpu_time`: met as well where the ratio of the median CPU times is (two long calls on a shared
    machine: the clock alone is too noisy).
    """

    suite: str
    device: str
    length: int
    rival: str | tuple[str, ...]
    against: str
    bound: float
    as_speedup: bool = False
    by_cpu_time: bool = False
    memory: bool = False
    layout: tuple[tuple[str, Any], ...] = ()


def _cuda(suite: str, against: str, bound: float, *lengths: int, **more: Any) -> list[Target]:
    rival = more.pop("rival", "rhythm triton")
    return [Target(suite, "cuda", length, rival, against, bound, **more) for length in lengths]


def _part(suite: str, measure: str, part: str, bound: float, dim: int) -> list[Target]:
    """What a part costs of the whole, on the compiled and on the torch backend."""
    return [
        Target(
            suite,
            "cpu",
            8192,
            f"rhythm {backend}: {measure} of {part}",
            f"rhythm {backend}: {measure}",
            bound,
            by_cpu_time=True,
            layout=(("dim", dim),),
        )
        for backend in ("cpu", "torch")
    ]


_BANDS = ("rhythm triton", "rhythm cuda")  # whichever is faster serves the users: `ops/dispatch.py` follows
_STREAMS: dict[str, Any] = {"layout": (("batch", 1), ("dim", 128), ("dtype", "bfloat16"))}
_QWEN3_4B = (("hidden", 2560), ("batch", 1))

STEP_LENGTHS = tuple(512 << i for i in range(6))
_ONE = (("batch", 1), ("layers", 8))
_CREDIT = ("step + credit", "step alone")

TARGETS: list[Target] = [
    Target("native_targets", "cpu", 8192, "waad: rhythm cpu", "SDPA forward", 0.004),
    Target("native_targets", "cpu", 8192, "fai: rhythm cpu", "SDPA forward", 0.016),
    Target("native_targets", "cpu", 4096, "waad: rhythm cpu", "waad: eager maps", 1 / 500, as_speedup=True),
    Target("native_targets", "cpu", 4096, "fai: rhythm cpu", "fai: eager maps", 1 / 200, as_speedup=True),
    *(
        Target(
            "window", "cpu", 16_384, f"rhythm {backend}: {measure}", f"rhythm {backend}: span", 3.0, by_cpu_time=True
        )
        for backend in ("cpu", "torch")
        for measure in ("moments", "fai to the end")
    ),
    Target("attention", "cpu", 4096, "rhythm cpu", "SDPA forward", 1.3, by_cpu_time=True),
    *_part("few_heads", "waad", "3 heads", 0.20, dim=64),
    *_part("few_heads", "fai", "3 heads", 0.12, dim=64),
    *_part("few_heads", "waad", "3 heads", 0.20, dim=128),
    *_part("few_heads", "fai", "3 heads", 0.12, dim=128),
    *_part("short_sequences", "waad", "short ones", 1.5, dim=64),
    *_part("short_sequences", "fai", "short ones", 1.5, dim=64),
    Target("probe", "cpu", 4096, "forward + probe", "forward alone", 1.03, by_cpu_time=True),
    *_cuda("band_rows", "", 0.85, 32_768, 131_072, 1_048_576, rival=_BANDS),
    *_cuda("band_columns", "", 0.75, 32_768, 131_072, 1_048_576, rival=_BANDS),
    *(
        target
        for suite in ("band_rows", "band_columns")
        for target in (
            *_cuda(suite, "eager maps", 1 / 100, 8192, rival=_BANDS, as_speedup=True),
            *_cuda(suite, "eager maps", 1 / 500, 8192, rival=_BANDS, as_speedup=True, memory=True),
        )
    ),
    *_cuda("attention", "SDPA FlashAttention", 1.0, 8192, 32_768, **_STREAMS),
    *_cuda("attention", "SDPA cuDNN", 1.6, 8192, 32_768, **_STREAMS),
    *_cuda("row_stats", "SDPA FlashAttention", 0.5, 8192, 32_768, **_STREAMS),
    *_cuda("column_stats", "flash-colreduce", 0.5, 8192, 32_768, **_STREAMS),
    *(
        Target("probe", "cuda", length, "probe's own kernels", "forward alone", bound, layout=_QWEN3_4B)
        for length, bound in ((8192, 0.015), (32_768, 0.005), (131_072, 0.001))
    ),
    *_cuda("grpo_step", "step alone", 1.02, 2048, 8192, rival="step + credit"),
    *(Target("grpo_step", "cpu", length, *_CREDIT, 1.03, by_cpu_time=True, layout=_ONE) for length in STEP_LENGTHS),
    *(
        # Where a hundredth of the step is less than the allocator keeps of freed blocks, the suite where it keeps none.
        Target(
            "grpo_step" if length > 4096 else "grpo_step_memory",
            "cpu",
            length,
            *_CREDIT,
            1.01,
            memory=True,
            layout=_ONE,
        )
        for length in STEP_LENGTHS
    ),
    *_cuda("countdown_step", "trainer, no credit", 1.02, 128, rival="trainer, coupled credit"),
]


def _quantity(entry: Entry, target: Target) -> float | None:
    return entry.peak_bytes if target.memory else entry.median


def _contests(entries: Iterable[Entry]) -> list[dict[str, Entry]]:
    """The entries by rival of each shape that was run, in order; those of one shape were timed together."""
    found: list[dict[str, Entry]] = []
    last = None
    for entry in entries:
        if (entry.suite, entry.shape) != last or entry.rival in found[-1]:
            found.append({})
            last = entry.suite, entry.shape
        found[-1][entry.rival] = entry
    return found


def _is_of(entry: Entry, target: Target) -> bool:
    """Whether an entry is of the shape that a target is about, and was measured."""
    return (
        entry.suite == target.suite
        and entry.environment.get("device_type") == target.device
        and entry.dimensions.get("length") == target.length
        and all(entry.dimensions.get(name) == value for name, value in target.layout)
        and bool(_quantity(entry, target))
    )


def _latest(entries: Iterable[Entry], target: Target) -> tuple[Entry, Entry | None] | None:
    """The rival's entry, the best of several names, and `against`'s beside it, of the latest run that has them."""
    names = (target.rival,) if isinstance(target.rival, str) else target.rival
    for contest in reversed(_contests(entries)):
        found = [contest[name] for name in names if name in contest and _is_of(contest[name], target)]
        other = contest.get(target.against)
        if found and (not target.against or (other is not None and _is_of(other, target))):
            return min(found, key=lambda entry: _quantity(entry, target) or 0.0), other
    return None


def verdict(target: Target, entries: list[Entry]) -> str | None:
    """One line, or None where the entries do not hold what the target is about."""
    found = _latest(entries, target)
    if found is None:
        return None
    entry, other = found
    where = f"{target.suite} T={target.length}: {entry.rival}"
    if other is None:
        if entry.bandwidth_share is None:
            return None
        met = entry.bandwidth_share >= target.bound
        share = f"{entry.bandwidth_share:.1%} of the machine's bandwidth (at least {target.bound:.0%})"
        return f"{where}: {share}: {_word(met)}"
    ratio = (_quantity(entry, target) or 0.0) / (_quantity(other, target) or math.inf)
    met = ratio <= target.bound
    if target.as_speedup:
        kind = "less memory" if target.memory else "faster"
        factor = f"{1 / ratio:.0f} times {kind} than {target.against} (at least {1 / target.bound:.0f})"
        return f"{where}: {factor}: {_word(met)}"
    if target.by_cpu_time and entry.cpu and other.cpu:
        met = met or entry.cpu / other.cpu <= target.bound
    of = f"the memory of {target.against}" if target.memory else target.against
    percent = f"{ratio:.2%} of {of} (at most {target.bound:.1%})"
    on_cpu = entry.cpu and other.cpu and target.device == "cpu" and not target.memory
    by_cpu = f"; by CPU time {entry.cpu / other.cpu:.2%}" if on_cpu else ""
    return f"{where}: {percent}{by_cpu}: {_word(met)}"


def verdicts(entries: list[Entry]) -> list[str]:
    """A line for each target that these entries can judge."""
    return [line for target in TARGETS if (line := verdict(target, entries)) is not None]


def _word(met: bool) -> str:
    return "met" if met else "missed"
