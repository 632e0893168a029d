"""The sequence table: where each sequence of a padded or packed batch lies, and where its response begins.

Both kinds of batch become entries `(batch row, start, end, response start)` here, so that no backend has a branch for
"packed": a padded batch has one entry for each batch row, a packed batch has all its entries in batch row 0.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import check_int, check_int_tensor, check_tensor, holds, readable, same_shape, smaller
from .tensor_cache import TensorCache


class SequenceTable(NamedTuple):
    """The sequences of a batch. A caller who measures many layers of one batch makes it once.

    seqs: `(S, 4)` int32, an entry for each sequence; see :class:`.rule.Rule`.
    max_seqlen: no sequence is longer, in tokens.
    packed: whether the caller's batch is packed.
    """

    seqs: Tensor
    max_seqlen: int
    packed: bool

    def to(self, device: torch.device) -> SequenceTable:
        """The same on another device."""
        if self.seqs.device == device:
            return self
        # A copy to the host must be waited for: CPU kernels would read the table before it has arrived.
        return self._replace(seqs=self.seqs.to(device, non_blocking=device.type == "cuda"))


def sequence_table(
    q: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    response_start: Tensor | None,
) -> SequenceTable:
    """Check what a call says of its sequences. `q (B, T, H, D)`; of a packed batch `(1, total, H, D)`."""
    length = q.shape[1]
    if cu_seqlens is None:
        seqs = _padded_table(seq_start, seq_end, response_start, q)
    elif seq_start is not None or seq_end is not None:
        name, given = ("seq_end", seq_end) if seq_start is None else ("seq_start", seq_start)
        kind = type(given).__name__
        raise ValueError(f"{name} must be None beside cu_seqlens, got a {kind}: it is for padded input")
    else:
        seqs = _packed_table(cu_seqlens, response_start, length, q.device)
    return SequenceTable(seqs, _check_max_seqlen(max_seqlen, cu_seqlens, seqs, length), cu_seqlens is not None)


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
    batch_row = torch.arange(batch, dtype=torch.int32, device=device)
    zero = torch.zeros_like(batch_row)
    return torch.stack([batch_row, zero, torch.full_like(batch_row, length), zero], dim=1)


# The table `(B, 4)` of a batch without padding or prompts: its size alone decides it.
unpadded_table = TensorCache(_new_unpadded, 256, launches=True)


def _padded_table(seq_start: Tensor | None, seq_end: Tensor | None, response_start: Tensor | None, q: Tensor) -> Tensor:
    """`(B, 4)`: the cached one where nothing is given, else made in three launches (from int32 arguments)."""
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
                raise ValueError(f"{name} must be in 0..{length}, got {int(value[at])} in batch row {at}")
    if all(value is None for value in given.values()):
        return plain
    batch_row, zero, full, _ = plain.unbind(1)
    start, end, first = (
        default if value is None else value for value, default in zip(given.values(), (zero, full, zero))
    )
    if seq_start is not None and readable(start) and readable(end) and bool((end < start).any()):
        at = int((end < start).nonzero()[0])
        low = int(start[at])
        raise ValueError(f"seq_end must be at least seq_start, {low}, got {int(end[at])} in batch row {at}")
    # A triple (value, least, greatest) for each column, so that one launch clamps all four. Values on a GPU are not
    # read: they are clamped to 0..T first, and a sequence that would end before its start becomes empty at its end.
    same = [batch_row] * 3
    triples = [*same, start, zero, end, end, end, end, first, start, end]
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
                f"cu_seqlens must be from 0 to at most the total of {total} tokens, got {values[0]}..{values[-1]}"
            )
        falls = next(((a, b) for a, b in itertools.pairwise(values) if a > b), None)
        if falls:
            raise ValueError(f"cu_seqlens must be ascending, got {falls[0]} before {falls[1]}")
    bounds = torch.cummax(cu.clamp(0, total), dim=0).values
    start, end = bounds[:-1], bounds[1:]
    zero = torch.zeros_like(start)
    first = start
    if response_start is not None:
        offset = _index_vector("response_start", response_start, cu.shape[0] - 1, "(sequences,)", device)
        first = start + torch.clamp(offset, zero, end - start)  # clamped before the addition: near 2^63 it would wrap
    return torch.stack([zero, start, end, first], dim=1).int()


def _check_max_seqlen(max_seqlen: Any, cu_seqlens: Tensor | None, seqs: Tensor, length: int) -> int:
    """The upper bound on a sequence's length, which kernels size their launch grids by."""
    if isinstance(max_seqlen, Tensor) and not readable(max_seqlen):
        check_int_tensor("max_seqlen", max_seqlen)
        max_seqlen = None  # flash-attn's callers have it on the GPU, where the host does not read it: T is the bound
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


class TokenTable(NamedTuple):
    """The sequence of each token, every field `(B, T)`.

    start, end, first: int64, of its sequence, in tokens of the batch row; first is the first token of the response R.
    scored: bool, whether the token is in R. sequence: int64, its sequence's index in the sequence table.

    Tokens outside every sequence have an empty range, so that they see nothing and nothing sees them.
    """

    start: Tensor
    end: Tensor
    first: Tensor
    scored: Tensor
    sequence: Tensor


def token_table(seqs: Tensor, batch: int, length: int) -> TokenTable:
    """The sequence table spread over tokens, on its device and without a host read."""
    batch_row, start, end, first = seqs.long().unbind(1)
    position = torch.arange(batch * length, device=seqs.device)
    origin = batch_row * length
    # Sequences are in order and disjoint, so the last one that starts at or before a token is the one that may hold it.
    owner = (torch.searchsorted(origin + start, position, right=True) - 1).clamp(min=0)
    live = (position >= (origin + start)[owner]) & (position < (origin + end)[owner])
    t = position % length

    def spread(column: Tensor, nothing: Tensor | int) -> Tensor:
        return torch.where(live, column[owner], nothing).view(batch, length)

    first = spread(first, t + 1)
    return TokenTable(
        spread(start, t + 1),
        spread(end, t),
        first,
        live.view(batch, length) & (t.view(batch, length) >= first),
        owner.view(batch, length),
    )
