"""What hypothesis draws: sizes, options and a seed; the tensors are made of the seed, so that a case shrinks well.

A failing case prints as `Case(...)`, which `tests.fuzz.holding.hold` takes as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz.memory import AXES, LAYOUTS, laid_out
from tests.fuzz.oracle import Inputs, Stretch

KINDS = ("plain", "padded", "packed")
# What the numbers are like: those after the second have logits that are hard on float32.
VALUES = ("normal", "flat", "sharp", "equal", "lattice", "far", "tiny")
EXTREME = VALUES[2:]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EDGES = [0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257]
SIZES = [1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 24, 32, 33, 40, 64]
LARGE_SIZES = [65, 80, 96, 100, 128, 160, 192, 255, 256]
INTEGERS = {"int": int, "numpy": np.int64, "tensor": torch.tensor}
INT32, INT64 = 2**31 - 1, 2**63 - 1


@dataclass(frozen=True)
class Case:
    kind: str
    lengths: tuple[int, ...]  # packed: of each sequence; else that of every row
    tail: int  # packed: tokens that belong to no sequence, behind the last
    starts: tuple[int, ...] | None
    ends: tuple[int, ...] | None
    response: tuple[int, ...] | None
    kv_heads: int
    group: int
    size: int
    value_size: int
    dtype: str
    values: str
    left: int
    right: int
    softcap: float
    scale: float | None
    sinks: tuple[float, ...] | None
    sinks_dtype: str
    slopes: tuple[tuple[float, ...], ...] | None  # ALiBi's, of the heads: one row for all, or a row a sequence
    heads: tuple[int, ...] | None
    heads_as: str
    integers_as: str
    per_head: bool
    window: int
    horizon: tuple[int, int]
    nearest: int
    lse_given: bool
    max_seqlen: int | None
    layouts: tuple[tuple[str, str, str], ...]  # tensor, its layout, an axis of which all entries are the first, or ""
    wide_indices: bool  # int64, at stride 2
    poisoned: bool  # NaN in every token that belongs to no sequence
    seed: int

    @property
    def packed(self) -> bool:
        return self.kind == "packed"

    @property
    def batch(self) -> int:
        return 1 if self.packed else len(self.lengths)

    @property
    def length(self) -> int:
        return sum(self.lengths) + self.tail if self.packed else self.lengths[0]

    @property
    def n_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def selected(self) -> list[int]:
        return list(range(self.n_heads) if self.heads is None else self.heads)

    def integer(self, value: int) -> Any:
        """As one caller or another holds it."""
        return INTEGERS[self.integers_as](value)

    @property
    def stretches(self) -> list[Stretch]:
        found, at = [], 0
        for i, length in enumerate(self.lengths):
            if self.packed:
                row, start, end, origin = 0, at, at + length, at
                at = end
            else:
                row, origin, start = i, 0, 0 if self.starts is None else self.starts[i]
                end = length if self.ends is None else self.ends[i]
            first = start if self.response is None else origin + self.response[i]
            found.append(Stretch(row, start, end, min(max(first, start), end)))
        return found

    @property
    def traits(self) -> set[str]:
        """What the shares of a run are counted by."""
        named = {
            "strided": bool(self.layouts),
            "stride 0": any(axis for _, _, axis in self.layouts),
            "packed": self.packed,
            "padded": self.kind == "padded",
            "an empty sequence": any(at.end == at.start for at in self.stretches),
            "tokens of no sequence": self.tail > 0,
            "NaN in padding": self.poisoned,
            "response_start": self.response is not None,
            "windowed": self.left >= 0,
            "softcapped": self.softcap > 0,
            "own scale": self.scale is not None,
            "with sinks": self.sinks is not None,
            "ALiBi": self.slopes is not None,
            "head subset": self.heads is not None and self.heads != tuple(range(self.n_heads)),
            "grouped heads": self.group > 1,
            "per head": self.per_head,
            "lse given": self.lse_given,
            "16-bit": self.dtype != "float32",
            "extreme values": self.values in EXTREME,
        }
        return {name for name, has in named.items() if has}


@dataclass(frozen=True)
class Made:
    """A case as tensors: `given` in the caller's layout and strides, and the same numbers for the oracle."""

    given: dict[str, Tensor]
    options: dict[str, Any]
    numbers: Inputs


def make(case: Case, device: str = "cpu") -> Made:
    generator = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]
    layouts = {name: (layout, axis) for name, layout, axis in case.layouts}
    heads = {"q": case.n_heads, "k": case.kv_heads, "v": case.kv_heads, "upstream": case.n_heads}
    sizes = {"q": case.size, "k": case.size, "v": case.value_size, "upstream": case.value_size}
    dead = torch.ones(case.batch, case.length, dtype=torch.bool)
    for at in case.stretches:
        dead[at.batch_row, at.live] = False

    def place(name: str, x: Tensor) -> Tensor:
        layout, _ = layouts.get(name, ("contiguous", ""))
        return laid_out((x[0] if case.packed else x).to(device), layout)

    given, numbers = {}, {}
    for name in heads:
        x = torch.randn(case.batch, case.length, heads[name], sizes[name], generator=generator)
        x = _shaped(name, x, case).to(dtype)
        _, axis = layouts.get(name, ("", ""))
        if axis:
            x = x.narrow(AXES.index(axis), 0, 1).expand_as(x)
            numbers[name] = x.double()
            first = place(name, x.narrow(AXES.index(axis), 0, 1))
            given[name] = first.expand((x[0] if case.packed else x).shape)
        else:
            numbers[name] = x.double()
            given[name] = place(name, x.masked_fill(dead[..., None, None], float("nan")) if case.poisoned else x)
    sinks = None
    if case.sinks is not None:
        layout, _ = layouts.get("sinks", ("contiguous", ""))
        sinks = laid_out(torch.tensor(case.sinks, dtype=DTYPES[case.sinks_dtype], device=device), layout)
    slopes = None
    if case.slopes is not None:
        layout, _ = layouts.get("alibi_slopes", ("contiguous", ""))
        slopes = torch.tensor(case.slopes if len(case.slopes) > 1 else case.slopes[0], device=device)
        slopes = laid_out(slopes, layout)
    numbers = Inputs(
        **{name: x.numpy() for name, x in numbers.items()},
        stretches=case.stretches,
        scale=case.size**-0.5 if case.scale is None else case.scale,
        softcap=case.softcap,
        left=case.left,
        sinks=None if sinks is None else sinks.double().cpu().numpy(),
        slopes=None if slopes is None else slopes.double().expand(len(case.lengths), -1).cpu().numpy(),
    )
    options: dict[str, Any] = {
        "window_size": (case.integer(case.left), case.integer(case.right)), "sinks": sinks, "alibi_slopes": slopes,
        "softcap": case.softcap, "softmax_scale": case.scale,
        "max_seqlen": None if case.max_seqlen is None else case.integer(case.max_seqlen),
    }  # fmt: skip
    if case.heads is not None:
        makers = {"list": list, "tuple": tuple, "numpy": np.array, "int32": torch.IntTensor, "int64": torch.LongTensor}
        index = makers[case.heads_as](list(case.heads))
        options["heads"] = index.repeat_interleave(2)[::2] if isinstance(index, torch.Tensor) else index
    vectors = {"seq_start": case.starts, "seq_end": case.ends, "response_start": case.response}
    if case.packed:
        vectors["cu_seqlens"] = (0, *torch.tensor(case.lengths).cumsum(0).tolist())
    for name, vector in vectors.items():
        if vector is not None:
            # Every second entry of a vector whose others would be out of any range.
            wide = torch.tensor([[x, -7] for x in vector], dtype=torch.int64).to(device)[:, 0]
            options[name] = wide if case.wide_indices else wide.int()
    return Made(given, options, numbers)


def _shaped(name: str, x: Tensor, case: Case) -> Tensor:
    """Standard normal numbers as the case has them."""
    if name in ("v", "upstream"):
        return x.round() if case.values == "lattice" else x
    if case.values == "flat":
        return x * 0.1
    if case.values == "tiny":
        return x * 2.0**-12
    if case.values == "sharp":
        return x * 6 if name == "q" else x * 2
    if case.values == "equal":  # all keys of a head are alike
        return x[:, :1].expand_as(x) if name == "k" else x
    if case.values == "lattice":  # products without a rounding, many ties, logits to thousands
        return x.clamp(-2, 2).round() * (64 if name == "q" else 8)
    if case.values == "far":  # logits with a large part that all keys share
        x = x.clone()
        x[..., 0] = 24.0
    return x


def lse_of(case: Case, own: Tensor, device: str = "cpu") -> Tensor:
    """`own (B, H, T)`, each row's log-sum-exp in float64, as a forward pass hands it over.

    What lies outside of the responses is nobody's: NaN there.
    """
    layouts = {name: layout for name, layout, _ in case.layouts}
    x = torch.full_like(own, float("nan"), dtype=torch.float32)
    for at in case.stretches:
        live = slice(at.first if case.poisoned else at.start, at.end)
        x[at.batch_row, :, live] = own[at.batch_row, :, live].float()
    return laid_out((x[0] if case.packed else x).to(device), layouts.get("lse", "contiguous"))


def edges(low: int, high: int) -> st.SearchStrategy[int]:
    """Integers of a range, those at a tile's edge half of the time."""
    near = [x for x in EDGES if low <= x <= high]
    every = st.integers(low, high)
    return every | st.sampled_from(near) if near else every


@st.composite
def cases(draw: st.DrawFn, longest: int = 300, small: bool = False) -> Case:
    """`longest`: tokens of a sequence; a case of many heads has shorter ones. `small`: few heads and sequences."""
    yes = st.booleans()
    kind = draw(st.sampled_from(["padded", "packed", "padded", "packed", "plain"]))
    kv_heads, group = draw(st.integers(1, 2 if small else 3)), draw(st.integers(1, 2 if small else 4))
    n_heads = kv_heads * group
    longest = min(longest, 1200 // n_heads)
    tail, starts, ends = 0, None, None
    if kind == "packed":
        several = st.lists(st.just(0) | edges(0, longest // 2), min_size=1, max_size=3 if small else 5)
        many = st.lists(st.integers(0, 4), min_size=4, max_size=6 if small else 40)
        lengths = tuple(draw(several | many))
        tail = draw(st.sampled_from([0, 0, 1, 9]))
        if sum(lengths) + tail == 0:
            lengths = (1,)
    else:
        batch = draw(st.integers(1, 2 if small else 3))
        lengths = (draw(edges(1, longest if batch == 1 else longest // 2)),) * batch
    if kind == "padded":
        which = draw(st.sampled_from(["both", "start", "end"]))
        pairs = [sorted(draw(st.tuples(*[st.integers(0, n)] * 2))) for n in lengths]
        pairs = [(b, b) if draw(st.integers(0, 7)) == 7 else (a, b) for a, b in pairs]
        starts = tuple(a for a, _ in pairs) if which != "end" else None
        ends = tuple(b for _, b in pairs) if which != "start" else None
    wide = draw(yes)
    response = None
    if draw(yes):
        least, greatest = (-INT64 - 1, INT64) if wide else (-INT32 - 1, INT32)
        of = [st.integers(-1, n + 1) | st.integers(0, n) | st.sampled_from([least, greatest]) for n in lengths]
        response = tuple(draw(st.tuples(*of)))
    size = draw(st.sampled_from(SIZES) | st.sampled_from(SIZES + LARGE_SIZES))
    layouts = []
    if draw(yes):
        for name in ("q", "k", "v", "upstream", "lse", "sinks", "alibi_slopes"):
            layout = draw(st.sampled_from(list(LAYOUTS)))
            axis = draw(st.sampled_from(["", "", "", *AXES])) if name in ("q", "k", "v", "upstream") else ""
            if axis == "batch" and kind == "packed":
                axis = ""
            if layout != "contiguous" or axis:
                layouts.append((name, layout, axis))
    heads = None
    # Of few heads there are few subsets, so they are asked for more often
    if n_heads > 1 and draw(st.sampled_from([True, True, True, True, False] if small else [True, True, False])):
        heads = tuple(draw(st.lists(st.integers(0, n_heads - 1), min_size=1, max_size=n_heads, unique=True)))
    low = draw(edges(0, 20))
    longest_of_all = max(b - a for _, a, b, _ in _plain(kind, lengths, starts, ends))
    slope = st.floats(-0.5, 1, width=32) | st.sampled_from([0.0, 0.25, 8.0])
    slopes = None
    if draw(yes):
        each = st.tuples(*[slope] * n_heads)
        slopes = tuple(draw(each) for _ in range(len(lengths) if draw(yes) else 1))
    sink = st.floats(-4, 8, width=32) | st.sampled_from([0.0, 20.0, float("-inf")])
    return Case(
        kind=kind,
        lengths=lengths,
        tail=tail,
        starts=starts,
        ends=ends,
        response=response,
        kv_heads=kv_heads,
        group=group,
        size=size,
        value_size=size if draw(yes) else draw(st.sampled_from(SIZES)),
        dtype=draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"])),
        values=draw(st.sampled_from(["normal", "normal", "normal", *VALUES])),
        left=draw(st.sampled_from([5, 2**40]) | edges(0, 130)) if draw(yes) else -1,
        right=draw(st.sampled_from([-1, 0])),
        softcap=draw(st.sampled_from([0.5, 2.0, 15.0, 50.0, 1e4])) if draw(yes) else 0.0,
        scale=draw(st.sampled_from([0.0, 0.05, 0.3, 1.0, -0.2])) if draw(yes) else None,
        sinks=tuple(draw(st.tuples(*[sink] * n_heads))) if draw(yes) else None,
        sinks_dtype=draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"])),
        slopes=slopes,
        heads=heads,
        heads_as=draw(st.sampled_from(["list", "tuple", "numpy", "int32", "int64"])),
        integers_as=draw(st.sampled_from(list(INTEGERS))),
        per_head=draw(yes),
        window=draw(st.integers(1, 24) | st.sampled_from([10, 33, 64, 200, 10**6])),
        horizon=(low, low + draw(edges(0, 70) | st.sampled_from([100, 10**9]))),
        nearest=draw(st.sampled_from([0, 1, 4]) | edges(0, 40)),
        lse_given=draw(yes),
        max_seqlen=longest_of_all + draw(st.sampled_from([0, 3, 10**6])) if draw(yes) else None,
        layouts=tuple(layouts),
        wide_indices=wide,
        poisoned=draw(yes),
        seed=draw(st.integers(0, 2**16)),
    )


def _plain(
    kind: str, lengths: tuple[int, ...], starts: tuple[int, ...] | None, ends: tuple[int, ...] | None
) -> list[tuple[int, int, int, int]]:
    if kind == "packed":
        return [(0, 0, n, 0) for n in lengths]
    starts, ends = starts or (0,) * len(lengths), ends or lengths
    return [(0, a, b, 0) for a, b in zip(starts, ends, strict=True)]
