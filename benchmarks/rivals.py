"""The registry: who competes in each suite, on which devices, with what needs and limits.

A rival that cannot run on a machine has an entry there all the same, which says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .contenders import backward, ceilings, chunked, credit, eager, flex, models, ours, parts, peers, step, trainer
from .gate import Results
from .shapes import DEVICES, Shape
from .suites import attention, attention_backward, band_columns, band_rows, column_stats, row_stats
from .suites import credit as credit_suite
from .suites import step as step_suite
from .work import Work


def _nothing(device: torch.device) -> str:
    return ""


@dataclass(frozen=True)
class Rival:
    """One contender of a suite.

    Attributes:
        name: as entries and plots have it; ours begin with "rhythm".
        make: from a problem to the call that is timed, which returns named results for the gate.
        devices: device types it competes on.
        unavailable: from a device to "" or the reason it cannot run there.
        memory: from a shape and a device type to the bytes it needs beside its inputs; None: little.
        longest: device type -> tokens beyond which it is not asked: one call would take many seconds.
        work: where it must do something else than the suite's pass: its own count, from a shape and a device type.
        slack: dtype -> factor on the gate's tolerance. Rivals that compute in 16 bits err as 16 bits do; ours are
            held to 1 everywhere.
        ceiling: "bytes" or "flops" where it measures what the machine can do at most; the highest of a kind counts.
        graph: on CUDA, time a captured graph of it (launches cost the same whatever the host does).
        told_by: the rival whose call tells the seconds of this entry by its `own_seconds()`: one above it in the suite,
            of which this is a part (`make` is then not called), or itself, where the clock would count too much.
    """

    name: str
    make: Callable[[Any], Callable[[], Results]]
    devices: tuple[str, ...] = DEVICES
    unavailable: Callable[[torch.device], str] = _nothing
    memory: Callable[[Shape, str], int] | None = None
    longest: dict[str, int] = field(default_factory=dict)
    work: Callable[[Any, str], Work] | None = None
    slack: dict[str, float] = field(default_factory=dict)
    ceiling: str = ""
    graph: bool = False
    told_by: str = ""

    @property
    def is_part(self) -> bool:
        """Whether it has no call of its own."""
        return self.told_by not in ("", self.name)


# Logits rounded to 16 bits before the softmax: relative errors of A up to |x| 2^-9 (2^-12) and, for maps kept in 16
# bits, as much again.
_HALF = {"bfloat16": 2000.0, "float16": 250.0}
_ROUNDED = {"bfloat16": 10.0, "float16": 10.0}  # float32 inside, the result alone in 16 bits
_EAGER_LONGEST = {"cpu": 4096, "cuda": 8192}
_SDPA_LONGEST = {"cpu": 8192, "cuda": 131_072}
_FLEX_LONGEST = {"cpu": 4096, "cuda": 8192}  # on a GPU each shape is compiled anew
# Tile by tile from Python: the kernels that a GPU is given grow with the square of the length.
_LONGEST = {"cpu": 8192, "cuda": 8192}
_CUDA = ("cuda",)
_CPU = ("cpu",)


def _ours(
    pass_name: str, make: Callable[[str], Any], backends: tuple[str, ...] = ("cuda", "triton", "cpu", "torch")
) -> tuple[Rival, ...]:
    """One rival a backend; the dense backend is the definition, not a contender."""
    devices = {"cpu": _CPU, "cuda": _CUDA}
    return tuple(
        Rival(
            f"rhythm {backend}",
            make(backend),
            devices.get(backend, DEVICES),
            ours.unavailable(pass_name, backend),
            longest=_LONGEST if backend == "torch" else {},
            graph=backend != "torch",  # it launches a kernel or ten for each tile
        )
        for backend in backends
    )


def _eager(make: Any) -> Rival:
    memory = eager.moments_memory if make is eager.column_moments else eager.memory
    return Rival("eager maps", make, memory=lambda shape, device: memory(shape), longest=_EAGER_LONGEST, slack=_HALF)


def _chunked(make: Any) -> Rival:
    return Rival("chunked torch", make, longest=_LONGEST, slack=_HALF)


def _flex(make: Any) -> Rival:
    return Rival("FlexAttention", make, memory=flex.memory, longest=_FLEX_LONGEST)


def _forward_work(shape: Any, device: str) -> Work:
    return attention.forward_work(shape)


_SDPA = (
    Rival("SDPA forward", peers.sdpa, longest=_SDPA_LONGEST, work=_forward_work, graph=True),
    Rival(
        "SDPA FlashAttention",
        peers.sdpa_flash,
        _CUDA,
        longest=_SDPA_LONGEST,
        work=_forward_work,
        graph=True,
    ),
    Rival(
        "SDPA cuDNN",
        peers.sdpa_cudnn,
        _CUDA,
        longest=_SDPA_LONGEST,
        work=_forward_work,
        graph=True,
    ),
    Rival(
        "flash-attn 2",
        peers.flash_attn,
        _CUDA,
        peers.installed("flash_attn"),
        longest=_SDPA_LONGEST,
        work=_forward_work,
        graph=True,
    ),
)


def _read_work(shape: Any, device: str) -> Work:
    return ceilings.read_work(device)


_READ = (
    Rival("read loop", ceilings.read_loop, _CPU, ceilings.uncompiled, work=_read_work, ceiling="bytes"),
    Rival("sum of a buffer", ceilings.read_sum, _CPU, work=_read_work, ceiling="bytes"),
)
_FMA = Rival(
    "multiply-add loop",
    ceilings.fma_loop,
    _CPU,
    ceilings.uncompiled,
    work=lambda shape, device: ceilings.fma_work(device),
    ceiling="flops",
)
_GEMM = Rival("matrix product", ceilings.gemm, work=lambda shape, device: ceilings.gemm_work(device), ceiling="flops")


def _copy(work: Callable[..., Work]) -> Rival:
    def copied(shape: Any, device: str) -> Work:
        return Work(8 * ceilings.copy_floats(work(shape).bytes), 0)

    return Rival("copy kernel", ceilings.copy(work), _CUDA, work=copied, ceiling="bytes", graph=True)


def _ceilings(work: Callable[..., Work]) -> tuple[Rival, ...]:
    return (*_READ, _copy(work), _FMA, _GEMM)


_COLREDUCE = Rival(
    "flash-colreduce",
    peers.flash_colreduce,
    _CUDA,
    peers.installed("flash_colreduce"),
    longest=_SDPA_LONGEST,
    slack=_ROUNDED,
)


def _targets() -> tuple[Rival, ...]:
    """WAAD and FAI as users call them, beside the forward and the maps that the CPU targets are stated in."""

    def named(prefix: str, rivals: tuple[Rival, ...], work: Callable[..., Work]) -> tuple[Rival, ...]:
        return tuple(
            replace(rival, name=f"{prefix}: {rival.name}", work=lambda shape, device: work(shape))
            for rival in rivals
            if rival.name in ("rhythm cpu", "eager maps")
        )

    waad = (*_ours("band_rows", ours.band_rows), _eager(eager.band_rows))
    fai = (*_ours("band_columns", ours.band_columns), _eager(eager.band_columns))
    return (*named("waad", waad, band_rows.work), *named("fai", fai, band_columns.work), *_SDPA, *_READ, _FMA, _GEMM)


def _parts(part: str, passes: dict[str, str], makers: dict[str, Any]) -> tuple[Rival, ...]:
    """Of both CPU backends: the measures that `passes` names with their passes; with `part`, each of it too."""
    return tuple(
        replace(rival, name=f"{rival.name}: {measure}{suffix}")
        for measure, pass_name in passes.items()
        for suffix in (("", f" of {part}") if part else ("",))
        for rival in _ours(
            pass_name,
            (lambda backend, make=makers[measure], suffix=suffix: make(backend, bool(suffix)))
            if part
            else makers[measure],
            ("cpu", "torch"),
        )
    )


_WINDOWED = {"span": "row_stats", "moments": "column_stats", "fai to the end": "column_stats"}
_BANDED = {"waad": "band_rows", "fai": "band_columns"}

_STEP = (
    Rival("step alone", step.alone, memory=step_suite.memory),
    Rival("step + credit", step.with_credit, memory=step_suite.memory),
    Rival("credit's own kernels", step.with_credit, told_by="step + credit"),
    Rival("step + eager, all maps", step.with_all_maps, memory=step_suite.maps_memory),
    Rival("step + eager, by layer", step.WithMaps, memory=step_suite.layer_memory),
)

RIVALS: dict[str, tuple[Rival, ...]] = {
    "window": tuple(
        replace(rival, devices=_CPU, longest={})
        for rival in _parts(
            "", _WINDOWED, {"span": parts.span, "moments": parts.moments, "fai to the end": parts.fai_to_the_end}
        )
    ),
    **{
        suite: tuple(
            replace(rival, devices=_CPU) for rival in _parts(part, _BANDED, {"waad": parts.waad, "fai": parts.fai})
        )
        for suite, part in (("few_heads", "3 heads"), ("short_sequences", "short ones"))
    },
    "band_rows": (
        *_ours("band_rows", ours.band_rows),
        _eager(eager.band_rows),
        _chunked(chunked.band_rows),
        _flex(flex.band_rows),
        *_SDPA,
        *_ceilings(band_rows.work),
    ),
    "band_columns": (
        *_ours("band_columns", ours.band_columns),
        _eager(eager.band_columns),
        _chunked(chunked.band_columns),
        _flex(flex.band_columns),
        *_SDPA,
        *_ceilings(band_columns.work),
    ),
    "row_stats": (
        *_ours("row_stats", ours.row_stats),
        _eager(eager.row_stats),
        _chunked(chunked.row_stats),
        _flex(flex.row_stats),
        *_SDPA,
        *_ceilings(row_stats.work),
    ),
    "column_stats": (
        *_ours("column_stats", ours.column_stats),
        _eager(eager.column_stats),
        _chunked(chunked.column_stats),
        _flex(flex.column_stats),
        _COLREDUCE,
        *_SDPA,
        *_ceilings(column_stats.work),
    ),
    "column_moments": (
        *_ours("column_stats", ours.column_moments),
        _eager(eager.column_moments),
        _chunked(chunked.column_moments),
        *_SDPA,
        *_ceilings(column_stats.moments_work),
    ),
    "attention": (
        *_ours("attention", ours.attention),
        _eager(eager.attention),
        _flex(flex.attention),
        *_SDPA,
        *_ceilings(attention.work),
    ),
    "attention_backward": (
        *(replace(rival, graph=False) for rival in _ours("attention", backward.ours, ("triton", "torch"))),
        Rival("SDPA backward", backward.sdpa, longest=_SDPA_LONGEST),
        Rival("SDPA FlashAttention", backward.sdpa_flash, _CUDA, longest=_SDPA_LONGEST),
        Rival("SDPA cuDNN", backward.sdpa_cudnn, _CUDA, longest=_SDPA_LONGEST),
        *_ceilings(attention_backward.work),
    ),
    "probe": (
        Rival("forward alone", models.forward),
        Rival("forward + probe", models.probe),
        Rival("probe's own kernels", models.probe, told_by="forward + probe"),
        Rival("eager with maps", models.eager_maps, memory=models.maps_memory),
        Rival("eager with hooks", models.eager_hooks, memory=models.layer_memory),
    ),
    "grpo_step": _STEP,
    "grpo_step_memory": _STEP,
    "countdown_step": tuple(
        Rival(name, make, unavailable=trainer.unavailable, told_by=name)
        for name, make in (
            ("trainer, no credit", trainer.without_credit),
            ("trainer, coupled credit", trainer.coupled),
        )
    ),
    "probe_memory": (
        Rival("forward alone", models.forward),
        Rival("forward + probe", models.probe),
        Rival("eager with hooks", models.eager_hooks, memory=models.layer_memory),
    ),
    "credit": (
        *(replace(rival, graph=True) for rival in _ours("credit", credit.ours, ("cuda", "cpu", "torch"))),
        Rival("token loop", credit.loop, _CPU),
        *_READ,
        _copy(credit_suite.work),
    ),
    "native_targets": _targets(),
}
