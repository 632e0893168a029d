"""The one case list: every backend runs every case and is held to the dense float64 definition of the same inputs.

A new attention variant is one more row here. :func:`check` has one comparison a pass; a backend with fewer passes says
so. Triton's interpreter, which is slow, runs the rows marked `quick`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rhythm_kernels as rk
from rhythm_kernels import reference

from . import bounds

BANDS = ("band_rows", "band_columns")
MEASURES = (*BANDS, "row_stats", "column_stats")
PASSES = (*MEASURES, "attention")


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
    value_dim: int | None = None  # head size of v; None: that of q and k
    quick: bool = False

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

    def values(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """v for such q and k, and an upstream gradient of attention's output."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        size = self.value_dim or self.dim
        return tuple(torch.randn(*x.shape[:-1], size, generator=generator).to(x) for x in (k, q))


CASES = [
    Case("plain"),
    Case("one token", length=1, batch=3, heads=2, kv_heads=1, quick=True),
    Case("shorter than the window", length=7),
    Case("one past a tile", length=257, batch=1, heads=2, kv_heads=1),
    Case("multi-query", heads=6, kv_heads=1, dim=32),
    Case("no grouping", heads=3, kv_heads=3, dim=24),
    Case("odd head size", dim=13),
    Case("head size one", dim=1, length=33, batch=1, heads=2, kv_heads=1, quick=True),
    Case("head size 80", dim=80, length=40),
    Case("head size 256", dim=256, length=24, heads=2, kv_heads=1, quick=True),
    Case("values of another size", batch=1, heads=2, kv_heads=1, dim=24, value_dim=9, quick=True),
    Case("narrow keys, wide values", dim=8, value_dim=256, length=20, batch=1, heads=2, kv_heads=1, quick=True),
    Case("head sizes 96 and 112", dim=96, value_dim=112, length=34, batch=1, heads=2, kv_heads=1, quick=True),
    Case("head sizes 192 and 128", dim=192, value_dim=128, length=36, batch=1, heads=2, kv_heads=1, quick=True),
    Case("left padding", starts=(3, 41), response=(9, 44), quick=True),
    Case("right padding", ends=(50, 70), response=(12, 0), value_dim=5),
    Case("padding on both sides, an empty row", batch=3, starts=(5, 20, 70), ends=(61, 20, 70), response=(30, 22, 70),
         quick=True),
    Case("response past the end", ends=(50, 70), response=(50, 1000)),
    Case("packed", lengths=(17, 0, 1, 40, 33, 0), quick=True),
    Case("packed responses", lengths=(30, 45, 2), response=(11, 50, -3)),
    Case("head subset, any order", options={"heads": [3, 0]}),
    Case("one head, per head", options={"heads": [2], "per_head": True}),
    Case("all heads, per head", options={"per_head": True}),
    Case("head tensor", options={"heads": torch.tensor([1, 2])}),
    Case("window of one", batch=1, heads=2, kv_heads=1, options={"window_size": (0, 0)}, quick=True),
    Case("window below W", options={"window_size": (6, -1)}, value_dim=40),
    Case("window above W", options={"window_size": (23, 0)}, length=90),
    Case("window nearer than any row that counts", options={"window_size": (3, 0)}, length=150, min_distance=9,
         horizon=(12, None)),
    Case("packed responses behind a window", lengths=(130, 0, 75, 9), response=(20, 0, 70, 0), horizon=(4, None),
         options={"window_size": (20, 0)}),
    Case("short sequences", lengths=(8,) * 21, horizon=(0, 7)),
    Case("short sequences of all kinds", lengths=(3, 0, 16, 1, 20, 8, 0, 8, 90, 2, 7, 31), horizon=(1, 12), window=40,
         response=(1, 0, 0, 0, 15, 2, 0, 8, 60, 0, 6, 1), sinks=True, options={"per_head": True}, value_dim=19),
    Case("one head of several groups", heads=12, kv_heads=4, length=140, options={"heads": [11, 0, 7]}, dim=24),
    Case("softcap", options={"softcap": 1.5}, magnitude=2.0),
    Case("softcap far above the logits", batch=1, heads=2, kv_heads=1, options={"softcap": 1e5}, magnitude=2.0,
         quick=True),
    Case("sinks", sinks=True, value_dim=19),
    Case("ALiBi", slopes="of heads", length=101, horizon=(10, None), value_dim=19),
    Case("ALiBi of each row", slopes="of sequences", starts=(3, 20), response=(9, 44), quick=True,
         options={"per_head": True}),
    Case("ALiBi of each packed sequence", slopes="of sequences", lengths=(30, 0, 45, 2), response=(11, 0, 20, -3)),
    Case("ALiBi of short sequences", slopes="of sequences", lengths=(8,) * 21, horizon=(0, 7)),
    Case("ALiBi with everything", slopes="of sequences", sinks=True, lengths=(40, 3, 90), response=(7, 0, 30),
         options={"softcap": 3.0, "heads": [3, 1], "window_size": (19, 0), "softmax_scale": 0.7}, horizon=(3, 25),
         quick=True),
    Case("ALiBi in bfloat16", slopes="of heads", dtype=torch.bfloat16, dim=64, length=130),
    Case("everything", sinks=True, lengths=(40, 3, 30), response=(7, 0, 9), options={"softcap": 3.0, "heads": [3, 1],
         "window_size": (19, 0), "softmax_scale": 0.7}, horizon=(3, 25), quick=True, value_dim=19),
    Case("everything, per head", sinks=True, lengths=(50, 1, 0, 40), response=(20, 0, 0, 2), value_dim=20, quick=True,
         options={"softcap": 3.0, "heads": [3, 1], "window_size": (33, 0), "per_head": True}, horizon=(3, 9)),
    Case("bfloat16", dtype=torch.bfloat16),
    Case("float16", dtype=torch.float16),
    Case("bfloat16 with everything", dtype=torch.bfloat16, sinks=True, starts=(0, 13), response=(20, 30),
         options={"softcap": 5.0, "window_size": (30, 0)}, quick=True, value_dim=13),
    Case("views of a fused projection", fused=True, dim=32),
    Case("own scale", options={"softmax_scale": 0.05}),
    Case("negative scale", batch=1, heads=2, kv_heads=1, length=40, options={"softmax_scale": -0.3}, quick=True),
    Case("no scale", batch=1, heads=2, kv_heads=1, length=40, options={"softmax_scale": 0.0}, quick=True),
    Case("full horizon", horizon=(10, None), length=101),
    Case("horizon of one distance", horizon=(5, 5)),
    Case("horizon from zero", horizon=(0, 3)),
    Case("horizon beyond the end", horizon=(60, 5000)),
    Case("wide window", window=64, length=90),
    Case("window of one token", window=1),
    Case("distance zero moments", min_distance=0),
    Case("sharp attention", batch=1, heads=2, kv_heads=1, magnitude=6.0, quick=True),
]  # fmt: skip
QUICK = [case for case in CASES if case.quick]


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
            (None, 5, 16, 40)[(seed + i) % 4],
        )


def close(name: str, got: Tensor, want: Tensor, bound: Tensor | float) -> None:
    assert got.dtype == torch.float32, f"{name}: {got.dtype}"
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, want {tuple(want.shape)}"
    assert got.is_contiguous(), f"{name} has strides {got.stride()}"
    same = got.double() == want  # infinities of the same sign
    error = torch.where(same, 0.0, (got.double() - want).abs() / bound)
    assert not error.isnan().any(), f"{name}: not a number at {error.isnan().nonzero()[0].tolist()}"
    assert float(error.max()) < 1, f"{name}: {float(error.max()):.3g} times the tolerance at {error.argmax()}"


def check(
    case: Case, backend: str | None, device: torch.device | str = "cpu", passes: tuple[str, ...] = PASSES
) -> None:
    """Hold what these passes of a backend give to the dense float64 definition.

    band_rows: WAAD given a log-sum-exp. band_columns: FAI given one, of a finite horizon. row_stats: the log-sum-exp,
    the span, and WAAD and FAI without a given one. column_stats: FAI to the end and the moments, with and without one.
    attention: out, log-sum-exp, WAAD, span and the gradients.
    """
    q, k, options = case.inputs(device)
    q64, k64 = q.double(), k.double()
    lse_options = {name: x for name, x in options.items() if name not in ("heads", "per_head", "response_start")}
    lse64 = reference.attention_lse(q64, k64, **lse_options)
    lse = lse64.float()
    if case.lengths is None:
        # Any strides: torch's CPU attention gives (B, H, T) with a strided last dimension.
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)

    def hold_waad(given: Tensor | None) -> None:
        waad = rk.waad(q, k, given, window=case.window, backend=backend, **options)
        want = reference.waad(q64, k64, window=case.window, **options)
        # Logits of 80 and more: a float32 log-sum-exp is itself known to |x| 2^-24, and W rowsum takes W times that.
        known = 0.0 if given is None else case.window * float(given.nan_to_num(neginf=0).abs().max()) * 2**-22
        close(f"waad {_tag(given)}", waad, want, max(bounds.waad(case.window), known))
        assert float(waad.min()) >= 0 and float(waad.max()) <= case.window

    def hold_fai(given: Tensor | None, horizon: tuple[int, int | None]) -> None:
        fai = rk.fai(q, k, given, horizon=horizon, backend=backend, **options)
        want = reference.fai(q64, k64, horizon=horizon, **options)
        close(f"fai of {horizon} {_tag(given)}", fai, want, bounds.fai())
        assert float(fai.min()) >= 0

    if "band_rows" in passes:
        hold_waad(lse)
    if "band_columns" in passes and case.horizon[1] is not None:
        hold_fai(lse, case.horizon)
    if "row_stats" in passes:
        close("attention_lse", rk.attention_lse(q, k, backend=backend, **lse_options), lse64, bounds.lse(lse64))
        hold_waad(None)
        if ("column_stats" if case.horizon[1] is None else "band_columns") in passes:
            hold_fai(None, case.horizon)
        span = rk.span(q, k, backend=backend, **options)
        close("span", span, reference.span(q64, k64, **options), bounds.span(q.shape[-3]))
    if "column_stats" in passes:
        hold_fai(lse, (case.horizon[0], None))
        for given in (lse, None):
            moments = rk.column_moments(q, k, given, min_distance=case.min_distance, backend=backend, **options)
            check_moments(case, moments, device)
    if "attention" in passes:
        check_attention(case, backend, device)


def _tag(given: Tensor | None) -> str:
    return "without lse" if given is None else "with lse"


def check_moments(case: Case, got: reference.ColumnMoments, device: torch.device | str = "cpu") -> None:
    """All moments; the standardised ones where there is variance for float32 to see."""
    q, k, options = case.inputs(device)
    want = reference.column_moments(q.double(), k.double(), min_distance=case.min_distance, **options)
    per_head = {**options, "per_head": True}
    heads = reference.column_moments(q.double(), k.double(), min_distance=case.min_distance, **per_head)
    seen = bounds.seen(heads)
    if not options.get("per_head"):
        seen = seen.all(dim=-2)
    close_moments(got, want, seen)


def close_moments(got: reference.ColumnMoments, want: reference.ColumnMoments, seen: Tensor) -> None:
    """`seen`: where float32 carries a third and a fourth moment."""
    for name, bound in bounds.moments(want)._asdict().items():
        value, target = getattr(got, name), getattr(want, name)
        assert bool(value.isfinite().all()), name
        assert not bool(value[want.count == 0].any()), f"{name} is not 0 at a key that no row counts for"
        if name in ("skewness", "kurtosis"):
            value, target = torch.where(seen, value, 0.0), torch.where(seen, target, 0.0)
        close(name, value, target, bound)


class Attended(NamedTuple):
    """Results of attention and the gradients of q, k and v."""

    out: Tensor
    lse: Tensor
    waad: Tensor
    span: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def attend(function: Callable[..., Any], tensors: Sequence[Tensor], dtype: torch.dtype, **options: Any) -> Attended:
    """What an `attention_with_rhythm` gives for q, k and v in `dtype`, and their gradients for an upstream one."""
    *leaves, upstream = (x.detach().to(dtype) for x in tensors)
    out, lse, stats = function(*(x.requires_grad_() for x in leaves), **options)
    assert not (lse.requires_grad or stats.waad.requires_grad or stats.span.requires_grad)
    return Attended(out.detach(), lse, *stats, *torch.autograd.grad(out, leaves, upstream))


def check_attention(case: Case, backend: str | None, device: torch.device | str = "cpu") -> None:
    """out and gradients err at most twice as much as float32 torch, beside what rounding brings; the rest as ever."""
    q, k, options = case.inputs(device)
    tensors = (q, k, *case.values(q, k))
    options["window"] = case.window
    want = attend(reference.attention_with_rhythm, tensors, torch.float64, **options)
    plain = attend(reference.attention_with_rhythm, tensors, torch.float32, **options)
    got = attend(rk.attention_with_rhythm, tensors, case.dtype, backend=backend, **options)
    lse, length = want.lse, got.out.shape[-3]
    for name, bound in (
        ("lse", bounds.lse(lse)), ("waad", bounds.waad(case.window)), ("span", bounds.span(length))
    ):  # fmt: skip
        close(name, getattr(got, name), getattr(want, name), bound)
    dead = lse.isinf().all(-2)  # tokens without attention
    for name in ("out", "dq", "dk", "dv"):
        g, w, p = (getattr(x, name) for x in (got, want, plain))
        assert g.dtype == case.dtype, f"{name}: {g.dtype}"
        assert g.shape == w.shape, f"{name}: {tuple(g.shape)}, want {tuple(w.shape)}"
        assert bool(g.isfinite().all()), f"{name} is not finite"
        assert not bool(g[dead].any()), f"{name} is not 0 at tokens without attention"
        interpreted = backend == "triton" and g.device.type == "cpu"
        rounding = bounds.attention(case.dtype, None if name == "out" else lse, interpreted)
        bound = 2 * float((p - w).abs().max()) + rounding * (1 + float(w.abs().max()))
        error = float((g.double() - w).abs().max())
        assert error <= bound, f"{name}: {error:.3g}, at most {bound:.3g}"
