"""The canonical form: the arguments of a call, checked once and brought to one shape that every backend takes.

Padded and packed batches become a sequence table, a choice of heads becomes a head table, and what makes a logit of
q.k (scale, softcap, sliding window, sinks, slopes) becomes a score rule. So no backend has a branch for "packed", and
no backend checks an argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack  # comes with torch; of typing since Python 3.11

from .arguments import (
    MAX_LENGTH,
    as_int,
    check_int,
    check_number,
    check_tensor,
    holds,
    last_contiguous,
    readable,
    same_shape,
)
from .options import DEFAULTS, Options
from .rule import Rule
from .sequences import SequenceTable, sequence_table
from .tensor_cache import TensorCache, tracing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256
# The largest softcap and the largest size of a scale; float32 holds these and their reciprocals.
MAX_SCORE = 1e30


class Canonical(NamedTuple):
    """The canonical form: what the passes read.

    q: `(B, T, H, D)`; packed input is one batch row of `T = total` tokens.
    k: `(B, T, H_kv, D)`.
    lse: `(B, X, T)` float32, or None where the caller has none; `rule.heads` says which of the X belongs to a head.
    rule: the score rule, the sequence table and the head table.
    packed: whether the caller's input had no batch dimension.
    """

    q: Tensor
    k: Tensor
    lse: Tensor | None
    rule: Rule
    packed: bool

    def leave(self, result: Tensor) -> Tensor:
        """A result `(B, ...)` in the caller's layout: without the batch dimension where the input was packed."""
        return result[0] if self.packed else result


def canonical(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    *,
    double: bool = False,
    table: SequenceTable | None = None,
    **options: Unpack[Options],
) -> Canonical:
    """Check every argument that the measures share and build their canonical form.

    Values of CPU tensors are checked. Values of CUDA tensors are never read by the host, but clamped into range.

    Args:
        double: whether float64 inputs are admitted, which the dense backend alone takes.
        table: made earlier, it stands for `cu_seqlens`, `max_seqlen`, `seq_start`, `seq_end` and `response_start`.
    """
    given = {**DEFAULTS, **options}
    packed = given["cu_seqlens"] is not None if table is None else table.packed
    q, k = _check_qk(q, k, packed, double)
    n_heads, dim = q.shape[2:]
    _check_lse(lse, q, packed)
    if table is None:
        where = ("cu_seqlens", "max_seqlen", "seq_start", "seq_end", "response_start")
        table = sequence_table(q, *(given[name] for name in where))
    if lse is not None:
        lse = lse[None].detach() if packed else lse.detach()
    rule = Rule(
        seqs=table.seqs,
        heads=_head_table(given["heads"], n_heads, q),
        max_seqlen=table.max_seqlen,
        scale=_check_scale(given["softmax_scale"], dim),
        softcap=_check_softcap(given["softcap"]),
        window_left=_check_window_size(given["window_size"]),
        sinks=_check_sinks(given["sinks"], n_heads, q.device),
        alibi_slopes=_check_slopes(given["alibi_slopes"], n_heads, table, q.device),
    )
    return Canonical(q, k, lse, rule, packed)


def _check_qk(q: Tensor, k: Tensor, packed: bool, double: bool) -> tuple[Tensor, Tensor]:
    rank, layout = (3, "(total, heads, head_dim)") if packed else (4, "(batch, tokens, heads, head_dim)")
    for name, x in (("q", q), ("k", k)):
        check_tensor(name, x)
        if x.dim() != rank:
            where = " with cu_seqlens" if packed else ""
            raise ValueError(f"{name} must be {layout}{where}, got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES and not (double and x.dtype == torch.float64):
            advice = "; backend='reference' takes it" if x.dtype == torch.float64 else ""
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}{advice}")
    if k.dtype != q.dtype:
        raise TypeError(f"k must be of the dtype of q, {q.dtype}, got {k.dtype}")
    if k.device != q.device:
        raise ValueError(f"k must be on the device of q, {q.device}, got {k.device}")
    if packed:
        q, k = q[None], k[None]
    if not same_shape(k.shape[:2], q.shape[:2]):
        raise ValueError(
            f"k must be of the batch and length of q, {tuple(q.shape[:2])}, got {tuple(k.shape[:2])}"
            ": causal self-attention without a cache has a key for every query"
        )
    if not holds(k.shape[3] == q.shape[3]):
        raise ValueError(f"k must be of the head size of q, {q.shape[3]}, got {k.shape[3]}")
    for name, size, what in (
        ("q", q.shape[0], "batch rows"),
        ("q", q.shape[1], "tokens"),
        ("q", q.shape[2], "heads"),
        ("k", k.shape[2], "heads"),
    ):
        if not holds(size > 0):
            raise ValueError(f"{name} must be non-empty, got 0 {what}")
    if not (holds(q.shape[3] >= 1) and holds(q.shape[3] <= MAX_HEAD_SIZE)):
        raise ValueError(f"q must be of a head size from 1 to {MAX_HEAD_SIZE}, got {q.shape[3]}")
    if not holds(q.shape[2] % k.shape[2] == 0):
        raise ValueError(
            f"q must be of a multiple of k's {k.shape[2]} heads (grouped-query attention), got {q.shape[2]} heads"
        )
    # Not asked while tracing: it would become a guard that bounds the lengths of every exported program.
    if not tracing() and q.shape[1] >= MAX_LENGTH:
        raise ValueError(f"q must be of fewer than 2^31 - 2^16 tokens a batch row, got {q.shape[1]}")
    return last_contiguous(q.detach()), last_contiguous(k.detach())


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


def _head_table(heads: Tensor | Sequence[int] | None, n_heads: int, q: Tensor) -> Tensor:
    """`(H_selected, 2)` int32: the query head and its lse index, which are the same where `lse` has all heads."""
    device = q.device
    if heads is None:
        return _head_tables.like(q, tuple(range(n_heads)))
    if hasattr(heads, "__array__") and not isinstance(heads, Tensor):
        heads = torch.as_tensor(heads, device="cpu")  # a NumPy array: torch.compile shows it as a tensor
    if isinstance(heads, Tensor):
        check_tensor("heads", heads)
        if heads.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"heads must be integers (int32 or int64), got {heads.dtype}")
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
        raise ValueError("heads must be at least one query head, got none")
    if len(set(index)) != len(index):
        raise ValueError(f"heads must be different query heads, got {list(index)}")
    return _head_tables.like(q, index)


def _head(head: Any, n_heads: int) -> int:
    """One entry of a list of query heads, checked."""
    try:
        index = as_int("heads", head)
    except TypeError as error:
        raise TypeError(f"heads must be integers, got {head!r}") from error
    if not 0 <= index < n_heads:
        raise ValueError(f"heads must be query-head indices in 0..{n_heads - 1}, got {index}")
    return index


def _new_head_table(index: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([[h, h] for h in index], dtype=torch.int32, device=device)


# Cached, since copying a list from the host to a device waits for that device, which a CUDA graph cannot capture.
_head_tables = TensorCache(_new_head_table, 1024, launches=False)


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
        raise ValueError(f"window_size[1] must be -1 or 0, got {right}: the measures are of causal attention")
    return left


def _check_sinks(sinks: Tensor | None, n_heads: int, device: torch.device) -> Tensor | None:
    if sinks is None:
        return None
    if not same_shape(_check_numbers("sinks", sinks, device).shape, (n_heads,)):
        raise ValueError(f"sinks must be (heads,) = ({n_heads},), got shape {tuple(sinks.shape)}")
    return sinks.detach().float().contiguous()


def _check_slopes(slopes: Tensor | None, n_heads: int, table: SequenceTable, device: torch.device) -> Tensor | None:
    """`(1, H)`, the same slopes for all sequences, or `(S, H)`, a table entry for each sequence."""
    if slopes is None:
        return None
    shape = _check_numbers("alibi_slopes", slopes, device).shape
    each = (table.seqs.shape[0], n_heads)
    if not same_shape(shape, (n_heads,)) and not same_shape(shape, each):
        of = "sequences" if table.packed else "batch"
        raise ValueError(
            f"alibi_slopes must be (heads,) = ({n_heads},) or ({of}, heads) = {each}, got shape {tuple(shape)}"
        )
    return slopes.detach().float().contiguous().view(-1, n_heads)


def _check_numbers(name: str, value: Tensor, device: torch.device) -> Tensor:
    check_tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} must be on the device of q, {device}, got {value.device}")
    return value
