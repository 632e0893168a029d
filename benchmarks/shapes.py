"""The shapes each suite is run at, by device and profile: `tiny` (tests), `quick` (a minute or two), `full`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

DEVICES = ("cpu", "cuda")
PROFILES = ("tiny", "quick", "full")


class _Shape:
    """What all shapes, frozen dataclasses with a `dtype`, have in common."""

    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True)
class AttentionShape(_Shape):
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
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize


@dataclass(frozen=True)
class PartShape(AttentionShape):
    """A call that needs a part of its tensors: the keys in a sliding window of `left` tokens, the heads `selected`, or
    sequences of `short` tokens, packed in one batch row, in place of one of `length`."""

    left: int = -1
    selected: tuple[int, ...] = ()
    short: int = 0

    @property
    def name(self) -> str:
        parts = {"left": self.left >= 0 and self.left, "heads": self.selected, "short": self.short}
        marks = (f" {what} {','.join(map(str, x)) if isinstance(x, tuple) else x}" for what, x in parts.items() if x)
        return super().name + "".join(marks)


@dataclass(frozen=True)
class ModelShape(_Shape):
    """One forward of a Qwen3-shaped decoder with random weights, without a language head.

    `padded`: batch rows of different lengths, padded on the left, with an attention mask. `gradients`: the forward of a
    training step, which keeps what the backward pass needs.
    """

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
    padded: bool = False
    gradients: bool = False

    @property
    def name(self) -> str:
        marks = " padded" * self.padded + " gradients" * self.gradients
        return f"B{self.batch} T{self.length} L{self.layers} E{self.hidden} {self.dtype}{marks}"


@dataclass(frozen=True)
class StepShape(ModelShape):
    """Forward and backward of a GRPO step on such a decoder with a small head: `prompt` of its `length` tokens, padded
    on the left, before responses of different lengths; `checkpointing`: each layer is computed again backwards."""

    prompt: int = 0
    checkpointing: bool = False

    @property
    def name(self) -> str:
        return super().name + " checkpointing" * self.checkpointing


@dataclass(frozen=True)
class TrainerShape(_Shape):
    """`steps` steps of the trainer of training/recipes/countdown_tiny.yaml: `batch` responses of up to `length`."""

    batch: int = 128
    length: int = 128
    steps: int = 2
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"B{self.batch} T{self.length} countdown_tiny"


@dataclass(frozen=True)
class CreditShape(_Shape):
    """WAAD, FAI and mask of a batch of responses."""

    batch: int
    length: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"B{self.batch} T{self.length}"


Shape = AttentionShape | ModelShape | CreditShape | TrainerShape

_TINY = AttentionShape(64, batch=2, heads=2, kv_heads=1, dim=16)
_TINY_OTHERS: dict[str, Shape] = {
    "window": PartShape(150, heads=2, kv_heads=1, dim=16, left=12),
    "few_heads": PartShape(150, heads=4, kv_heads=2, dim=16, selected=(0, 3)),
    "short_sequences": PartShape(152, heads=2, kv_heads=1, dim=16, lo=0, hi=7, short=8),
    "probe": ModelShape(80, layers=2, hidden=64, heads=4, kv_heads=2, dim=16, intermediate=96, batch=2),
    "credit": CreditShape(4, 60),
    "probe_memory": ModelShape(80, layers=1, hidden=32, heads=2, kv_heads=1, dim=16, intermediate=64),
    "grpo_step": StepShape(96, layers=3, hidden=64, heads=4, kv_heads=2, dim=16, intermediate=96, batch=4, prompt=16),
    "countdown_step": TrainerShape(batch=16, length=24),
}
_TINY_OTHERS["grpo_step_memory"] = _TINY_OTHERS["grpo_step"]


def _cpu(*lengths: int) -> tuple[Shape, ...]:
    return tuple(AttentionShape(length) for length in lengths)


def _cuda(*lengths: int) -> tuple[Shape, ...]:
    return tuple(AttentionShape(length, dim=128, dtype="bfloat16") for length in lengths)


def _small_model(*lengths: int, **more: Any) -> tuple[Shape, ...]:
    """Four layers, 512 wide: what two CPU cores can run."""
    return tuple(
        ModelShape(length, layers=4, hidden=512, heads=8, kv_heads=4, dim=64, intermediate=1536, **more)
        for length in lengths
    )


def _long_model(*lengths: int) -> tuple[Shape, ...]:
    """One narrow layer: a hundred thousand tokens take seconds, and little else fills the memory."""
    return tuple(
        ModelShape(length, layers=1, hidden=32, heads=2, kv_heads=1, dim=16, intermediate=64) for length in lengths
    )


# Qwen3's sizes without its head over 151,936 words, which would hide what the layers take.
_QWEN3_06B: dict[str, Any] = {
    "layers": 28,
    "hidden": 1024,
    "heads": 16,
    "kv_heads": 8,
    "dim": 128,
    "intermediate": 3072,
    "dtype": "bfloat16",
}
_QWEN3_4B: dict[str, Any] = {**_QWEN3_06B, "layers": 36, "hidden": 2560, "heads": 32, "intermediate": 9728}
# A forward at 400 TFLOP/s (`Suite.work`): 0.6B 0.04 s at 8,192 and 0.4 s at 32,768 tokens; 4B 0.2 s, 1.4 s, and 5 s at
# 131,072 of 12 layers. A shape takes four of them to be admitted, then two rounds of two or 8 s: 4B at 131,072 tokens
# 40 s, all others 10 to 20 s. The same number of layers is measured in 12 as in 36, so the measures' share there is
# three times the whole model's.
_MODELS_8K = (ModelShape(8192, **_QWEN3_06B), ModelShape(8192, **_QWEN3_4B))
# Under a mask no attention kernel leaves out what it hides: 30 TFLOP, 0.1 s.
_PADDED = ModelShape(4096, **_QWEN3_06B, batch=4, padded=True)
_MODELS = (
    *_MODELS_8K,
    _PADDED,
    replace(_PADDED, gradients=True),  # keeps about 40 GB
    ModelShape(32_768, **_QWEN3_06B),
    ModelShape(32_768, **_QWEN3_4B),
    ModelShape(131_072, **{**_QWEN3_4B, "layers": 12}),
)


def _step(*lengths: int) -> tuple[Shape, ...]:
    """One response at a time, in a decoder of 17M weights in Qwen3's proportions.

    As in Qwen3-0.6B the query heads are together twice as wide as the hidden state, and the MLP three times; 12 heads
    of 64 share 4 key heads. What is measured weighs more than there: heads of 4 layers of 8 in place of 5 of 28. A
    response alone has no padding, so attention is causal and skips half of its work: credit has the least to hide
    behind.
    """
    return tuple(
        StepShape(length, layers=8, hidden=384, heads=12, kv_heads=4, dim=64, intermediate=1152, prompt=64)
        for length in lengths
    )


def _small_step(length: int, **more: Any) -> Shape:
    return StepShape(
        length, layers=4, hidden=256, heads=4, kv_heads=2, dim=64, intermediate=768, batch=4, prompt=64, **more
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
    ("cuda", "full"): (*_cuda(4096, 8192, 32_768, 131_072), AttentionShape(4096, dim=64, dtype="float16")),
}


def _parts(*full: PartShape) -> dict[tuple[str, str], tuple[Shape, ...]]:
    """On a CPU: `quick` has a quarter of the first one's tokens."""
    quick = (replace(full[0], length=full[0].length // 4),)
    return {("cpu", "quick"): quick, ("cpu", "full"): full, ("cuda", "quick"): (), ("cuda", "full"): ()}


# suite -> (device, profile) -> shapes; `tiny` is the same for every suite of a kind.
SHAPES: dict[str, dict[tuple[str, str], tuple[Shape, ...]]] = {
    "band_rows": _BANDS,
    "band_columns": _BANDS,
    "row_stats": _STREAMS,
    "column_stats": _STREAMS,
    "column_moments": _STREAMS,
    "attention": _STREAMS,
    "attention_backward": _STREAMS,
    "window": _parts(PartShape(16_384, heads=4, kv_heads=2, left=127)),
    "few_heads": _parts(
        PartShape(8192, heads=32, kv_heads=8, selected=(0, 11, 23)),
        PartShape(8192, heads=32, kv_heads=8, dim=128, dtype="bfloat16", selected=(0, 11, 23)),
    ),
    "short_sequences": _parts(PartShape(8192, lo=0, hi=7, short=8)),
    "probe": {
        ("cpu", "quick"): (*_small_model(512), *_small_model(512, batch=2, padded=True, gradients=True)),
        ("cpu", "full"): (*_small_model(1024, 4096), *_small_model(1024, batch=2, padded=True, gradients=True)),
        ("cuda", "quick"): _MODELS_8K,
        ("cuda", "full"): _MODELS,
    },
    "grpo_step": {
        ("cpu", "quick"): (_small_step(256),),
        # Of 23 GB, 16,384 tokens take 6 and 32,768 would take 12, for ten minutes a call.
        ("cpu", "full"): (*_step(*(512 << i for i in range(6))), _small_step(1024, checkpointing=True)),
        # 35 TFLOP forward and backward, 0.1 to 0.2 s; six calls and 8 s of rounds.
        ("cuda", "quick"): (StepShape(2048, **_QWEN3_06B, batch=4, prompt=256),),
        ("cuda", "full"): (
            StepShape(2048, **_QWEN3_06B, batch=4, prompt=256),
            # 200 TFLOP, of which 140 are attention under a mask: 0.5 to 1.1 s; six calls and 8 s of rounds.
            StepShape(8192, **_QWEN3_06B, batch=2, prompt=512, checkpointing=True),
        ),
    },
    # Peaks to a megabyte, which tell a hundredth of a short step; those of the longer ones are in `grpo_step`.
    "grpo_step_memory": {
        ("cpu", "quick"): _step(512),
        ("cpu", "full"): _step(512, 1024, 2048, 4096),
        ("cuda", "quick"): (),
        ("cuda", "full"): (),
    },
    "probe_memory": {
        ("cpu", "quick"): _long_model(1024, 16_384),
        ("cpu", "full"): _long_model(*(1024 << i for i in range(8))),
        ("cuda", "quick"): (),
        ("cuda", "full"): (),
    },
    # A step writes 128 tokens one by one: about a second on any GPU; four calls of two steps, then 8 s of rounds.
    "countdown_step": {
        ("cpu", "quick"): (TrainerShape(batch=32, length=64),),
        ("cpu", "full"): (TrainerShape(),),
        ("cuda", "quick"): (TrainerShape(),),
        ("cuda", "full"): (TrainerShape(),),
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
