"""The one case list: every backend runs every case and is held to the dense float64 definition of the same inputs.

A new attention variant is one more row here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import rhythm_kernels as rk
from rhythm_kernels import reference

from . import bounds


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call; tensors are drawn from `seed`."""

    name: str
    batch: int = 2
    length: int = 70
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    dtype: torch.dtype = torch.float32
    magnitude: float = 1.0
    window: int = 10
    horizon: tuple[int, int | None] = (10, 50)  # below the length, so that both of its ends are met
    min_distance: int = 4
    sinks: bool = False
    slopes: str = ""  # ALiBi's: "of heads" as its paper has them, "of sequences": random, some negative, a row each
    fused: bool = False  # q, k are views of one fused projection, in (heads, tokens) order
    options: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] | None = None  # packed: the sequences' lengths
    starts: tuple[int, ...] | None = None
    ends: tuple[int, ...] | None = None
    response: tuple[int, ...] | None = None
    seed: int = 0

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, dict[str, Any]]:
        """q, k and the keyword arguments shared by the measures; the same values on every device."""
        generator = torch.Generator().manual_seed(self.seed)
        length = sum(self.lengths) if self.lengths is not None else self.length
        batch = 1 if self.lengths is not None else self.batch
        n = self.heads + self.kv_heads
        if self.fused:
            fused = torch.randn(batch, n, length, self.dim + 3, generator=generator).to(device)
            fused = fused.transpose(1, 2)[..., : self.dim]
        else:
            fused = torch.randn(batch, length, n, self.dim, generator=generator).to(device)
        fused = (fused * self.magnitude).to(self.dtype)
        q, k = fused[:, :, : self.heads], fused[:, :, self.heads :]
        options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        if self.sinks:
            options["sinks"] = torch.randn(self.heads, generator=generator).to(device)
        if self.slopes == "of heads":
            options["alibi_slopes"] = 2.0 ** (-8.0 * torch.arange(1, self.heads + 1, device=device) / self.heads)
        elif self.slopes:
            rows = self.batch if self.lengths is None else len(self.lengths)
            options["alibi_slopes"] = (0.2 * torch.randn(rows, self.heads, generator=generator)).to(device)
        if self.lengths is not None:
            options["cu_seqlens"] = torch.tensor([0, *self.lengths], device=device).cumsum(0).int()
            q, k = q[0], k[0]
        for key, values in (("seq_start", self.starts), ("seq_end", self.ends), ("response_start", self.response)):
            if values is not None:
                options[key] = torch.tensor(values, dtype=torch.int32, device=device)
        return q, k, options


CASES = [
    Case("plain"),
    Case("one token", length=1, batch=3),
    Case("shorter than the window", length=7),
    Case("one past a tile", length=257, batch=1, heads=2, kv_heads=1),
    Case("multi-query", heads=6, kv_heads=1, dim=32),
    Case("no grouping", heads=3, kv_heads=3, dim=24),
    Case("odd head size", dim=13),
    Case("head size 80", dim=80, length=40),
    Case("head size 256", dim=256, length=24, heads=2, kv_heads=1),
    Case("left padding", starts=(3, 41), response=(9, 44)),
    Case("right padding", ends=(50, 70), response=(12, 0)),
    Case("padding on both sides, an empty row", batch=3, starts=(5, 20, 70), ends=(61, 20, 70), response=(30, 22, 70)),
    Case("response past the end", ends=(50, 70), response=(50, 1000)),
    Case("packed", lengths=(17, 0, 1, 40, 33, 0)),
    Case("packed responses", lengths=(30, 45, 2), response=(11, 50, -3)),
    Case("head subset, any order", options={"heads": [3, 0]}),
    Case("one head, per head", options={"heads": [2], "per_head": True}),
    Case("all heads, per head", options={"per_head": True}),
    Case("head tensor", options={"heads": torch.tensor([1, 2])}),
    Case("window of one", options={"window_size": (0, 0)}),
    Case("window below W", options={"window_size": (6, -1)}),
    Case("window above W", options={"window_size": (23, 0)}, length=90),
    Case("window nearer than any row that counts", options={"window_size": (3, 0)}, length=150, min_distance=9,
         horizon=(12, None)),
    Case("packed responses behind a window", lengths=(130, 0, 75, 9), response=(20, 0, 70, 0), horizon=(4, None),
         options={"window_size": (20, 0)}),
    Case("short sequences", lengths=(8,) * 21, horizon=(0, 7)),
    Case("short sequences of all kinds", lengths=(3, 0, 16, 1, 20, 8, 0, 8, 90, 2, 7, 31), horizon=(1, 12), window=40,
         response=(1, 0, 0, 0, 15, 2, 0, 8, 60, 0, 6, 1), sinks=True, options={"per_head": True}),
    Case("one head of several groups", heads=12, kv_heads=4, length=140, options={"heads": [11, 0, 7]}, dim=24),
    Case("softcap", options={"softcap": 1.5}, magnitude=2.0),
    Case("softcap far above the logits", options={"softcap": 1e5}, magnitude=2.0),
    Case("sinks", sinks=True),
    Case("ALiBi", slopes="of heads", length=101, horizon=(10, None)),
    Case("ALiBi of each row", slopes="of sequences", starts=(3, 20), response=(9, 44), options={"per_head": True}),
    Case("ALiBi of each packed sequence", slopes="of sequences", lengths=(30, 0, 45, 2), response=(11, 0, 20, -3)),
    Case("ALiBi of short sequences", slopes="of sequences", lengths=(8,) * 21, horizon=(0, 7)),
    Case("ALiBi with everything", slopes="of sequences", sinks=True, lengths=(40, 3, 90), response=(7, 0, 30),
         options={"softcap": 3.0, "heads": [3, 1], "window_size": (19, 0), "softmax_scale": 0.7}, horizon=(3, 25)),
    Case("ALiBi in bfloat16", slopes="of heads", dtype=torch.bfloat16, dim=64, length=130),
    Case("everything", sinks=True, lengths=(40, 3, 30), response=(7, 0, 9), options={"softcap": 3.0, "heads": [3, 1],
         "window_size": (19, 0), "softmax_scale": 0.7}, horizon=(3, 25)),
    Case("bfloat16", dtype=torch.bfloat16),
    Case("float16", dtype=torch.float16),
    Case("bfloat16 with everything", dtype=torch.bfloat16, sinks=True, starts=(0, 13), response=(20, 30),
         options={"softcap": 5.0, "window_size": (30, 0)}),
    Case("views of a fused projection", fused=True, dim=32),
    Case("own scale", options={"softmax_scale": 0.05}),
    Case("no scale", options={"softmax_scale": 0.0}),
    Case("full horizon", horizon=(10, None), length=101),
    Case("horizon of one distance", horizon=(5, 5)),
    Case("horizon from zero", horizon=(0, 3)),
    Case("horizon beyond the end", horizon=(60, 5000)),
    Case("wide window", window=64, length=90),
    Case("window of one token", window=1),
    Case("distance zero moments", min_distance=0),
    Case("sharp attention", magnitude=6.0),
]  # fmt: skip


def random_cases(seed: int, n: int) -> Iterator[Case]:
    """Random shapes with every feature crossed."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (1,), generator=g))]

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=g))

    for i in range(n):
        kv_heads, group = number(1, 3), number(1, 3)
        heads = kv_heads * group
        options: dict[str, Any] = {}
        if pick(True, False):
            options["heads"] = torch.randperm(heads, generator=g)[: number(1, heads)].tolist()
        options["per_head"] = pick(True, False)
        options["softcap"] = pick(0.0, 0.0, 2.5)
        options["window_size"] = (pick(-1, -1, 0, 5, 31), pick(-1, 0))
        options["softmax_scale"] = pick(None, None, 0.3)
        batch, length = number(1, 3), pick(1, 2, 9, 33, 64, 65, 100)
        lengths = starts = ends = response = None
        if pick(True, False):
            lengths = tuple(number(0, 40) for _ in range(number(1, 4)))
            lengths = lengths if sum(lengths) else (5,)
            response = pick(None, tuple(number(-2, 30) for _ in lengths))
        else:
            edges = [sorted((number(0, length), number(0, length))) for _ in range(batch)]
            starts = pick(None, tuple(a for a, _ in edges))
            ends = pick(None, tuple(b for _, b in edges))
            response = pick(None, tuple(number(-1, length + 1) for _ in range(batch)))
        lo = number(0, 12)
        yield Case(
            f"random {seed}.{i}",
            batch,
            length,
            heads,
            kv_heads,
            pick(8, 16, 20, 64),
            pick(torch.float32, torch.float32, torch.bfloat16, torch.float16),
            pick(0.5, 1.0, 3.0),
            number(1, 20),
            (lo, pick(None, lo, lo + number(0, 45))),
            number(0, 8),
            pick(True, False),
            ("", "of heads", "", "of sequences")[i % 4],
            pick(True, False),
            options,
            lengths,
            starts,
            ends,
            response,
            seed * 1000 + i,
        )


def _close(name: str, got: Tensor, want: Tensor, bound: Tensor | float) -> None:
    assert got.dtype == torch.float32, f"{name}: {got.dtype}"
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, want {tuple(want.shape)}"
    same = got.double() == want  # infinities of the same sign
    error = torch.where(same, 0.0, (got.double() - want).abs() / bound)
    assert not error.isnan().any(), f"{name}: not a number at {error.isnan().nonzero()[0].tolist()}"
    assert float(error.max()) < 1, f"{name}: {float(error.max()):.3g} times the tolerance at {error.argmax()}"


def check(case: Case, backend: str | None, device: torch.device | str = "cpu") -> None:
    """Hold every measure of a backend, with and without a given lse, to the dense float64 definition."""
    q, k, options = case.inputs(device)
    q64, k64 = q.double(), k.double()
    lse_options = {name: x for name, x in options.items() if name not in ("heads", "per_head", "response_start")}
    lse64 = reference.attention_lse(q64, k64, **lse_options)
    got_lse = rk.attention_lse(q, k, backend=backend, **lse_options)
    _close("attention_lse", got_lse, lse64, bounds.lse(lse64))
    if case.lengths is None:
        # Any strides: torch's CPU attention gives (B, H, T) with a strided last dimension.
        lse = lse64.float().transpose(1, 2).contiguous().transpose(1, 2)
    else:
        lse = lse64.float()
    length = q.shape[0] if case.lengths is not None else q.shape[1]
    for given in (lse, None):
        tag = "with lse" if given is not None else "without lse"
        waad = rk.waad(q, k, given, window=case.window, backend=backend, **options)
        want = reference.waad(q64, k64, window=case.window, **options)
        _close(f"waad {tag}", waad, want, bounds.waad(case.window))
        assert float(waad.min()) >= 0 and float(waad.max()) <= case.window
        fai = rk.fai(q, k, given, horizon=case.horizon, backend=backend, **options)
        _close(f"fai {tag}", fai, reference.fai(q64, k64, horizon=case.horizon, **options), bounds.fai())
        assert float(fai.min()) >= 0
        moments = rk.column_moments(q, k, given, min_distance=case.min_distance, backend=backend, **options)
        check_moments(case, moments, device)
    span = rk.span(q, k, backend=backend, **options)
    _close("span", span, reference.span(q64, k64, **options), bounds.span(length))


def check_moments(case: Case, got: reference.ColumnMoments, device: torch.device | str = "cpu") -> None:
    """All moments; the standardised ones where there is variance for float32 to see."""
    q, k, options = case.inputs(device)
    want = reference.column_moments(q.double(), k.double(), min_distance=case.min_distance, **options)
    per_head = {**options, "per_head": True}
    heads = reference.column_moments(q.double(), k.double(), min_distance=case.min_distance, **per_head)
    seen = bounds.seen(heads)
    if not options.get("per_head"):
        seen = seen.all(dim=-2)
    for name, bound in bounds.moments(want)._asdict().items():
        value, target = getattr(got, name), getattr(want, name)
        if name in ("skewness", "kurtosis"):
            value, target = torch.where(seen, value, 0.0), torch.where(seen, target, 0.0)
        _close(name, value, target, bound)
