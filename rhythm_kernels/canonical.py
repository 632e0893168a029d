"""The canonical form: whatever callers bring is checked here once and becomes one value that kernels never question.

Padded and packed batches become a sequence table, head subsets a head table, attention variants a score rule.
No backend has a branch for "packed", and no backend checks an argument.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import (
    MAX_LENGTH,
    as_int,
    check_int,
    check_int_tensor,
    check_number,
    check_tensor,
    holds,
    readable,
    same_shape,
    smaller,
)
from .kept import Kept, tracing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256
# Of a softcap and of a scale's size: float32 holds them and their reciprocals.
MAX_SCORE = 1e30


class Canonical(NamedTuple):
    """Checked input of a pass.

    `q (B, T, H, D)`, `k (B, T, H_kv, D)`, `lse (B, X, T)` or None; packed input is one row of `T = total` tokens.
    `seqs (S, 4)` int32: row, start, end, response_start, with `start <= response_start <= end`, ordered, disjoint.
    `heads (H_selected, 2)` int32: query head, row of `lse`. `score`: the score rule, in the order every pass takes it:
    scale, softcap, window_left, sinks.
    """

    q: Tensor
    k: Tensor
    lse: Tensor | None
    seqs: Tensor
    heads: Tensor
    max_seqlen: int
    score: tuple[float, float, int, Tensor | None]  # no property: torch 2.10 cannot compile one of a named tuple
    packed: bool

    def leave(self, result: Tensor) -> Tensor:
        """Lay a result `(B, ...)` out as the caller's input was: packed results lose the row dimension."""
        return result[0] if self.packed else result


class SequenceTable(NamedTuple):
    """The sequences of a batch, as `Canonical` has them: what a caller who measures often makes once."""

    seqs: Tensor
    max_seqlen: int
    packed: bool

    def to(self, device: torch.device) -> SequenceTable:
        """The same on another device."""
        if self.seqs.device == device:
            return self
        # A copy to the host is waited for: kernels there would read it before it has arrived.
        return self._replace(seqs=self.seqs.to(device, non_blocking=device.type == "cuda"))


def canonical(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    *,
    heads: Tensor | Sequence[int] | None,
    softmax_scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    response_start: Tensor | None,
    double: bool = False,
    table: SequenceTable | None = None,
) -> Canonical:
    """Check every argument shared by the measures and build their canonical form.

    `double` admits float64 inputs (the dense backend alone takes them). Values of CPU tensors are checked; values of
    CUDA tensors are never read by the host, so they are clamped into range instead. A `table` made before stands for
    the six arguments that tell of sequences.
    """
    packed = cu_seqlens is not None if table is None else table.packed
    q, k = _check_qk(q, k, packed, double)
    length, n_heads, dim = q.shape[1:]
    _check_lse(lse, q, packed)
    if table is not None:
        seqs, longest = table.seqs, table.max_seqlen
    elif packed:
        if seq_start is not None or seq_end is not None:
            name = "seq_start" if seq_start is not None else "seq_end"
            raise ValueError(f"{name} is for padded input: it must be None where cu_seqlens is given")
        seqs = _packed_table(cu_seqlens, response_start, length, q.device)
        longest = _check_max_seqlen(max_seqlen, cu_seqlens, seqs, length)
    else:
        seqs = _padded_table(seq_start, seq_end, response_start, q)
        longest = _check_max_seqlen(max_seqlen, cu_seqlens, seqs, length)
    if lse is not None and packed:
        lse = lse[None]
    return Canonical(
        q=q,
        k=k,
        lse=None if lse is None else lse.detach(),
        seqs=seqs,
        heads=_head_table(heads, n_heads, q),
        max_seqlen=longest,
        score=(
            _check_scale(softmax_scale, dim),
            _check_softcap(softcap),
            _check_window_size(window_size),
            _check_sinks(sinks, n_heads, q.device),
        ),
        packed=packed,
    )


def _check_qk(q: Tensor, k: Tensor, packed: bool, double: bool) -> tuple[Tensor, Tensor]:
    rank, layout = (3, "(total, heads, head_dim)") if packed else (4, "(batch, tokens, heads, head_dim)")
    for name, x in (("q", q), ("k", k)):
        check_tensor(name, x)
        if x.dim() != rank:
            hint = " with cu_seqlens" if packed else ""
            raise ValueError(f"{name} must be {layout}{hint}, got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES and not (double and x.dtype == torch.float64):
            hint = " (float64: backend='reference')" if x.dtype == torch.float64 else ""
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}{hint}")
    if k.dtype != q.dtype:
        raise TypeError(f"k must have the dtype of q, {q.dtype}, got {k.dtype}")
    if k.device != q.device:
        raise ValueError(f"k must be on the device of q, {q.device}, got {k.device}")
    if packed:
        q, k = q[None], k[None]
    if not same_shape(k.shape[:2], q.shape[:2]):
        raise ValueError(
            f"k must have the batch and length of q, {tuple(q.shape[:2])}, got {tuple(k.shape[:2])}"
            " (a key for every query: causal self-attention without a cache)"
        )
    if not holds(k.shape[3] == q.shape[3]):
        raise ValueError(f"k must have the head size of q, {q.shape[3]}, got {k.shape[3]}")
    for name, size, what in (
        ("q", q.shape[0], "batch"),
        ("q", q.shape[1], "tokens"),
        ("q", q.shape[2], "heads"),
        ("k", k.shape[2], "heads"),
    ):
        if not holds(size > 0):
            raise ValueError(f"{name} must not be empty, got 0 {what}")
    if not (holds(q.shape[3] >= 1) and holds(q.shape[3] <= MAX_HEAD_SIZE)):
        raise ValueError(f"q must have a head size of 1 to {MAX_HEAD_SIZE}, got {q.shape[3]}")
    if not holds(q.shape[2] % k.shape[2] == 0):
        raise ValueError(
            f"q must have a multiple of k's heads (grouped-query attention), got {q.shape[2]} and {k.shape[2]}"
        )
    # No tracer is told: as a guard it would bound every length that an exported program takes.
    if not tracing() and q.shape[1] >= MAX_LENGTH:
        raise ValueError(f"q must have fewer than 2^31 - 2^16 tokens a row, got {q.shape[1]}")
    return last_contiguous(q.detach()), last_contiguous(k.detach())


def last_contiguous(x: Tensor) -> Tensor:
    """Kernels read the head dimension in vectors; every other stride is free."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _check_lse(lse: Tensor | None, q: Tensor, packed: bool) -> None:
    if lse is None:
        return
    check_tensor("lse", lse)
    batch, length, n_heads, _ = q.shape
    shape = (n_heads, length) if packed else (batch, n_heads, length)
    if not same_shape(lse.shape, shape):
        layout = "(heads, total)" if packed else "(batch, heads, tokens)"
        raise ValueError(f"lse must be {layout} = {shape}, all query heads, got shape {tuple(lse.shape)}")
    want = (torch.float32, torch.float64) if q.dtype == torch.float64 else (torch.float32,)
    if lse.dtype not in want:
        raise TypeError(f"lse must be float32 (natural log), got {lse.dtype}")
    if lse.device != q.device:
        raise ValueError(f"lse must be on the device of q, {q.device}, got {lse.device}")


def _index_vector(name: str, value: Tensor, size: int, of: str, device: torch.device) -> Tensor:
    check_tensor(name, value)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 (or int64), got {value.dtype}")
    if not same_shape(value.shape, (size,)):
        raise ValueError(f"{name} must be {of} = ({size},), got shape {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on the device of q, {device}, got {value.device}")
    return value


def _new_unpadded(batch: int, length: int, device: torch.device) -> Tensor:
    row = torch.arange(batch, dtype=torch.int32, device=device)
    zero = torch.zeros_like(row)
    return torch.stack([row, zero, torch.full_like(row, length), zero], dim=1)


# `(B, 4)` of a batch without padding and prompts, which its length alone decides.
unpadded_table = Kept(_new_unpadded, 256, launches=True)


def _padded_table(seq_start: Tensor | None, seq_end: Tensor | None, response_start: Tensor | None, q: Tensor) -> Tensor:
    """`(B, 4)`: kept where nothing is given, else made in three launches (int32 arguments)."""
    batch, length = q.shape[:2]
    plain = unpadded_table.like(q, batch, length)
    given = {"seq_start": seq_start, "seq_end": seq_end, "response_start": response_start}
    for name, value in given.items():
        if value is None:
            continue
        _index_vector(name, value, batch, "(batch,)", q.device)
        if name != "response_start" and readable(value):
            bad = (value < 0) | (value > length)
            if bool(bad.any()):
                at = int(bad.nonzero()[0])
                raise ValueError(f"{name} must be in 0..{length}, got {int(value[at])} in row {at}")
    if all(value is None for value in given.values()):
        return plain
    row, zero, full, _ = plain.unbind(1)
    start, end, first = (
        default if value is None else value for value, default in zip(given.values(), (zero, full, zero))
    )
    if seq_start is not None and readable(start) and readable(end) and bool((end < start).any()):
        at = int((end < start).nonzero()[0])
        raise ValueError(f"seq_end must not lie before seq_start, got {int(end[at])} < {int(start[at])} in row {at}")
    # Of each column a triple (value, least, greatest), clamped in one launch. Values on a GPU are not read: they are
    # brought into the row first, and a sequence that would end before its start becomes empty at its end.
    triples = [row, row, row, start, zero, end, end, end, end, first, start, end]
    columns = torch.stack(triples, dim=1)
    columns[:, 3:].clamp_(0, length)
    return torch.clamp(columns[:, 0::3], columns[:, 1::3], columns[:, 2::3]).int()


def _packed_table(cu_seqlens: Tensor | None, response_start: Tensor | None, total: int, device: torch.device) -> Tensor:
    cu = check_tensor("cu_seqlens", cu_seqlens)
    if cu.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 (or int64), got {cu.dtype}")
    if cu.dim() != 1 or not holds(cu.shape[0] >= 2):
        raise ValueError(f"cu_seqlens must be (sequences + 1,) with at least one sequence, got shape {tuple(cu.shape)}")
    if cu.device != device:
        raise ValueError(f"cu_seqlens must be on the device of q, {device}, got {cu.device}")
    if readable(cu):
        values = cu.tolist()
        if values[0] != 0 or values[-1] > total:
            raise ValueError(
                f"cu_seqlens must run from 0 to at most the total of {total} tokens, got {values[0]}..{values[-1]}"
            )
        if any(a > b for a, b in itertools.pairwise(values)):
            raise ValueError("cu_seqlens must not decrease")
    bounds = torch.cummax(cu.clamp(0, total), dim=0).values
    start, end = bounds[:-1], bounds[1:]
    zero = torch.zeros_like(start)
    first = start
    if response_start is not None:
        offset = _index_vector("response_start", response_start, cu.shape[0] - 1, "(sequences,)", device)
        first = start + torch.clamp(offset, zero, end - start)  # clamped before it is added: it may be near 2^63
    return torch.stack([zero, start, end, first], dim=1).int()


def _head_table(heads: Tensor | Sequence[int] | None, n_heads: int, q: Tensor) -> Tensor:
    """`(H_selected, 2)` int32: query head and its row of `lse` (the same, as `lse` has all heads)."""
    device = q.device
    if heads is None:
        return _head_rows(tuple(range(n_heads)), q)
    if hasattr(heads, "__array__") and not isinstance(heads, Tensor):
        heads = torch.as_tensor(heads, device="cpu")  # NumPy's, which a compiler knows as tensors
    if isinstance(heads, Tensor):
        check_tensor("heads", heads)
        if heads.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"heads must hold integers (int32 or int64), got {heads.dtype}")
        if heads.dim() != 1 or not holds(heads.shape[0] > 0):
            raise ValueError(f"heads must be a non-empty vector of query-head indices, got shape {tuple(heads.shape)}")
        if not readable(heads):
            if heads.device != device and heads.device.type != "cpu":
                raise ValueError(f"heads must be on the device of q, {device}, or on the CPU, got {heads.device}")
            return heads.to(device)[:, None].expand(-1, 2).clamp(0, n_heads - 1).int().contiguous()
        heads = heads.tolist()
    if not isinstance(heads, Iterable):
        raise TypeError(f"heads must be a list or an int tensor of query-head indices, got {type(heads).__name__}")
    index = tuple(_head(h, n_heads) for h in heads)
    if not index:
        raise ValueError("heads must name at least one query head, got none")
    if len(set(index)) != len(index):
        raise ValueError(f"heads must not repeat a head, got {list(index)}")
    return _head_rows(index, q)


def _head(head: Any, n_heads: int) -> int:
    """One query-head index of a list."""
    try:
        index = as_int("heads", head)
    except TypeError as error:
        raise TypeError(f"heads must hold integers, got {head!r}") from error
    if not 0 <= index < n_heads:
        raise ValueError(f"heads must be query-head indices in 0..{n_heads - 1}, got {index}")
    return index


def _head_rows(index: tuple[int, ...], q: Tensor) -> Tensor:
    return _cached_head_rows.like(q, index)


def _new_head_rows(index: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([[h, h] for h in index], dtype=torch.int32, device=device)


# A host list becomes a device tensor once: the copy is a synchronisation, which a CUDA graph cannot capture.
_cached_head_rows = Kept(_new_head_rows, 1024, launches=False)


def _check_max_seqlen(max_seqlen: Any, cu_seqlens: Tensor | None, seqs: Tensor, length: int) -> int:
    """The launch grid's upper bound on a sequence's length."""
    if isinstance(max_seqlen, Tensor) and not readable(max_seqlen):
        check_int_tensor("max_seqlen", max_seqlen)
        max_seqlen = None  # flash-attn's callers have it on the GPU: what the host does not know, the length bounds
    if max_seqlen is None:
        if cu_seqlens is not None and readable(cu_seqlens):
            return int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        return length
    max_seqlen = check_int("max_seqlen", max_seqlen, 0)
    if readable(seqs):
        longest = int((seqs[:, 2] - seqs[:, 1]).max())
        if max_seqlen < longest:
            raise ValueError(f"max_seqlen must be at least the longest sequence's {longest} tokens, got {max_seqlen}")
    return length if cu_seqlens is None else smaller(max_seqlen, length)


def _check_scale(softmax_scale: float | None, dim: int) -> float:
    if softmax_scale is None:
        return dim**-0.5
    softmax_scale = check_number("softmax_scale", softmax_scale)
    if not abs(softmax_scale) <= MAX_SCORE:
        raise ValueError(f"softmax_scale must be finite, at most {MAX_SCORE:g}, got {softmax_scale}")
    return float(softmax_scale)


def _check_softcap(softcap: float) -> float:
    softcap = check_number("softcap", softcap)
    if softcap != 0 and not 1 / MAX_SCORE <= softcap <= MAX_SCORE:
        raise ValueError(f"softcap must be 0 (off) or in {1 / MAX_SCORE:g}..{MAX_SCORE:g}, got {softcap}")
    return float(softcap)


def _check_window_size(window_size: tuple[int, int]) -> int:
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise ValueError(f"window_size must be a pair (left, right), got {window_size!r}")
    left, right = (check_int(f"window_size[{i}]", w, -1) for i, w in enumerate(window_size))
    if not holds(right <= 0):
        raise ValueError(f"window_size[1] must be -1 or 0: the measures are of causal attention, got {right}")
    return left


def _check_sinks(sinks: Tensor | None, n_heads: int, device: torch.device) -> Tensor | None:
    if sinks is None:
        return None
    check_tensor("sinks", sinks)
    if not sinks.dtype.is_floating_point:
        raise TypeError(f"sinks must be floating point, got {sinks.dtype}")
    if not same_shape(sinks.shape, (n_heads,)):
        raise ValueError(f"sinks must be (heads,) = ({n_heads},), got shape {tuple(sinks.shape)}")
    if sinks.device != device:
        raise ValueError(f"sinks must be on the device of q, {device}, got {sinks.device}")
    return sinks.detach().float().contiguous()
