"""The shapes each suite is run at, by device and profile: `tiny` (tests), `quick` (a minute or two), `full`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

DEVICES = ("cpu", "cuda")
PROFILES = ("tiny", "quick", "full")


@dataclass(frozen=True)
class AttentionShape:
    """One attention call: `q (batch, length, heads, dim)`, `k` with `kv_heads`; W, and the horizon of FAI."""

    length: int
    batch: int = 1
    heads: int = 16
    kv_heads: int = 8
    dim: int = 64
    dtype: str = "float32"
    window: int = 10
    lo: int = 10
    hi: int = 100

    @property
    def name(self) -> str:
        return f"B{self.batch} T{self.length} H{self.heads}/{self.kv_heads} D{self.dim} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ModelShape:
    """One forward pass of a Qwen3-shaped decoder with random weights."""

    length: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    intermediate: int
    batch: int = 1
    vocabulary: int = 1024
    dtype: str = "float32"
    window: int = 10
    lo: int = 10
    hi: int = 100

    @property
    def name(self) -> str:
        return f"B{self.batch} T{self.length} L{self.layers} E{self.hidden} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class CreditShape:
    """WAAD, FAI and mask of a batch of responses."""

    batch: int
    length: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"B{self.batch} T{self.length}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Shape = AttentionShape | ModelShape | CreditShape

_TINY = AttentionShape(64, batch=2, heads=2, kv_heads=1, dim=16)
_TINY_OTHERS: dict[str, Shape] = {
    "probe": ModelShape(80, layers=2, hidden=64, heads=4, kv_heads=2, dim=16, intermediate=96, batch=2),
    "credit": CreditShape(4, 60),
    "probe_memory": ModelShape(80, layers=1, hidden=32, heads=2, kv_heads=1, dim=16, intermediate=64),
}


def _cpu(*lengths: int) -> tuple[Shape, ...]:
    return tuple(AttentionShape(length) for length in lengths)


def _cuda(*lengths: int) -> tuple[Shape, ...]:
    return tuple(AttentionShape(length, dim=128, dtype="bfloat16") for length in lengths)


def _small_model(*lengths: int) -> tuple[Shape, ...]:
    """Four layers, 512 wide: what two CPU cores can run."""
    return tuple(
        ModelShape(length, layers=4, hidden=512, heads=8, kv_heads=4, dim=64, intermediate=1536) for length in lengths
    )


def _long_model(*lengths: int) -> tuple[Shape, ...]:
    """One narrow layer: a hundred thousand tokens take seconds, and little else fills the memory."""
    return tuple(
        ModelShape(length, layers=1, hidden=32, heads=2, kv_heads=1, dim=16, intermediate=64) for length in lengths
    )


def _qwen3_06b(*lengths: int) -> tuple[Shape, ...]:
    return tuple(
        ModelShape(length, 28, 1024, 16, 8, 128, intermediate=3072, vocabulary=151_936, dtype="bfloat16")
        for length in lengths
    )


_BANDS = {
    ("cpu", "quick"): _cpu(1024),
    ("cpu", "full"): _cpu(1024, 4096, 8192, 32_768),
    ("cuda", "quick"): _cuda(8192),
    ("cuda", "full"): (
        AttentionShape(4096, batch=8, dim=128, dtype="bfloat16"),
        *_cuda(8192, 32_768, 131_072, 1_048_576),
    ),
}
_STREAMS = {
    ("cpu", "quick"): _cpu(1024),
    ("cpu", "full"): _cpu(1024, 4096, 8192),
    ("cuda", "quick"): _cuda(8192),
    ("cuda", "full"): (*_cuda(4096, 8192, 32_768, 131_072), AttentionShape(8192, dim=64, dtype="float16")),
}

# suite -> (device, profile) -> shapes; `tiny` is the same for every suite of a kind.
SHAPES: dict[str, dict[tuple[str, str], tuple[Shape, ...]]] = {
    "band_rows": _BANDS,
    "band_columns": _BANDS,
    "row_stats": _STREAMS,
    "column_stats": _STREAMS,
    "column_moments": _STREAMS,
    "attention": _STREAMS,
    "probe": {
        ("cpu", "quick"): _small_model(512),
        ("cpu", "full"): _small_model(1024, 4096),
        ("cuda", "quick"): _qwen3_06b(8192),
        ("cuda", "full"): _qwen3_06b(2048, 8192, 32_768, 131_072),
    },
    "probe_memory": {
        ("cpu", "quick"): _long_model(1024, 16_384),
        ("cpu", "full"): _long_model(*(1024 << i for i in range(8))),
        ("cuda", "quick"): (),
        ("cuda", "full"): (),
    },
    "credit": {
        ("cpu", "quick"): (CreditShape(64, 1024),),
        ("cpu", "full"): (CreditShape(32, 512), CreditShape(512, 1024)),
        ("cuda", "quick"): (CreditShape(512, 1024),),
        ("cuda", "full"): (CreditShape(512, 1024), CreditShape(512, 8192)),
    },
    "native_targets": {
        ("cpu", "quick"): _cpu(1024),
        ("cpu", "full"): _cpu(4096, 8192),
        ("cuda", "quick"): (),
        ("cuda", "full"): (),
    },
}


def shapes(suite: str, device: str, profile: str) -> tuple[Shape, ...]:
    """The shapes of a suite on a device type under a profile."""
    if profile == "tiny":
        return (_TINY_OTHERS.get(suite, _TINY),)
    return SHAPES[suite][device, profile]


def every_shape(suite: str) -> Iterator[Shape]:
    """Every shape the suite has anywhere."""
    yield from shapes(suite, "cpu", "tiny")
    for found in SHAPES[suite].values():
        yield from found
