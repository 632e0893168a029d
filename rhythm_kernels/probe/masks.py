"""From what a forward pass was given (mask, positions, packing) to the live ranges of its sequences.

The ranges come from the two-dimensional inputs of the model's forward, never from a `(T, T)` mask. What a layer was
then given as its mask is checked at a few rows against them, because transformers decides there whether a packing or a
sliding window really takes effect: O(T) work that turns silent misunderstandings into errors (see `checks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..sequences import SequenceTable, unpadded_table
from .alibi import WAY_OUT
from .checks import Checks, reads_now

_CHECKED_SEQUENCES = 16
CheckedRows = tuple[Tensor, Tensor, Tensor, Tensor]  # row, start, t, alive, as of `rows_to_check`


@dataclass
class ForwardInputs:
    """What the model's forward was given, as far as it decides which token sees which.

    `attention_mask` is `(B, T)` bool or None; `position_ids` `(B, T)` or None; `cu_seqlens` int `(S + 1,)` or None, of
    sequences with at most `max_seqlen` tokens where that is known; `logits_to_keep` as it was given.
    `packs_positions`: whether the model may have told packed sequences by `position_ids` alone.
    `unmasked_under`: the implementation that was given no mask, so that an `attention_mask` must be all True.
    """

    batch: int
    length: int
    device: torch.device
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    packs_positions: bool = True
    unmasked_under: str | None = None
    logits_to_keep: Any = None


@dataclass
class Sequences:
    """The sequences of one forward and the arguments by which the measures are told of them.

    Attributes:
        row, start, end: `(S,)` int, the live sequences in the `(B, T)` layout; some may be empty.
        first, last: `(S,)`, R of each sequence: tokens `first` to `last - 1`, counted likewise.
        packed: whether q and k are handed over flattened to `(B * T, H, D)`, with `cu_seqlens`.
        arguments: keyword arguments of `waad`, `fai`, `span`, `attention_lse`, `column_moments`.
        table: the same for `canonical`, made once for all layers.
        live: `(B, T)` bool, the tokens that are in a sequence; None: all are, or they are packed.
        checked: what was found at the masks of this forward's layers so far.
        in_chunks, whole, pieces, rows: of `chunks`: the same in chunks of so many tokens; and there, the table and the
            arguments being of pieces and of whole sequences, the whole table, `(P, 3)` bounds of pieces, and counts.
    """

    batch: int
    length: int
    row: Tensor
    start: Tensor
    end: Tensor
    first: Tensor
    last: Tensor
    packed: bool
    arguments: dict[str, Any]
    table: SequenceTable
    live: Tensor | None = None
    checked: dict[tuple[int, int], tuple[Any, bool]] = field(default_factory=dict)
    in_chunks: dict[int, Sequences] = field(default_factory=dict)
    whole: SequenceTable | None = None
    pieces: Tensor | None = None
    rows: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def bounds(self) -> Tensor:
        """`(S, 3)` int: row, start and end of each sequence."""
        return torch.stack([self.row, self.start, self.end], dim=1)

    @cached_property
    def checked_rows(self) -> CheckedRows:
        """Where the layers' masks are looked at."""
        return rows_to_check(self.bounds if self.pieces is None else self.pieces, self.length)

    @cached_property
    def response(self) -> Tensor:
        """`(B, T)` bool, the tokens of R."""
        position = torch.arange(self.length, device=self.start.device)
        if not self.packed:
            return (position >= self.first[:, None]) & (position < self.last[:, None])
        flat = self.row * self.length  # +1 at the first token of each response, -1 behind its last
        step = torch.zeros(self.batch * self.length + 1, dtype=torch.int64, device=self.start.device)
        one = torch.ones_like(flat)
        step.index_put_((flat + self.first,), one, accumulate=True)
        step.index_put_((flat + self.last,), -one, accumulate=True)
        return (step.cumsum(0)[:-1] > 0).view(self.batch, self.length)


def ends(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`(B, T)` bool -> first True and last True + 1 of each row, int32; (0, 0) where there is none."""
    position = torch.arange(mask.shape[1], dtype=torch.int32, device=mask.device)
    first = torch.where(mask, position, mask.shape[1]).amin(1)
    end = torch.where(mask, position + 1, 0).amax(1)
    return torch.minimum(first, end), end


def sequences_of(inputs: ForwardInputs, response_mask: Tensor | None, takes_lengths: bool, checks: Checks) -> Sequences:
    """The sequences of a forward pass.

    Args:
        response_mask: `(B, T)` bool: R of each sequence runs from its first to its last True token; None: all of it.
        takes_lengths: of the implementation's `Reader`: it alone reads `cu_seqlens`, and packs by positions even beside
            an attention mask that is all True.
    """
    mask = inputs.attention_mask
    if mask is not None and reads_now(mask.device) and bool(mask.all()):
        mask = None
    if mask is not None and inputs.unmasked_under is not None and not reads_now(mask.device):
        checks.require(mask.all(), _given_no_mask(inputs.unmasked_under))
        mask = None
    if mask is None:
        if inputs.cu_seqlens is not None and takes_lengths:
            starts = inputs.cu_seqlens[:-1].to(inputs.device, torch.int64)
            return _packed(inputs, starts, inputs.max_seqlen, response_mask)
        if inputs.packs_positions and (inputs.attention_mask is None or (takes_lengths and inputs.batch == 1)):
            found = _packed_starts(inputs)
            if found is not None:
                return _packed(inputs, *found, response_mask)
    if inputs.cu_seqlens is not None and not takes_lengths and inputs.cu_seqlens.numel() > 2:
        raise ValueError(
            "cu_seq_lens_q: only flash attention reads it; with other implementations pass packed position_ids, "
            "attention_mask=None and use_cache=False"
        )
    _refuse_unseen_packing(inputs, mask, checks)
    return _padded(inputs, mask, response_mask, checks)


def _refuse_unseen_packing(inputs: ForwardInputs, mask: Tensor | None, checks: Checks) -> None:
    """Raise where positions start again within a row that the model attended to as one sequence."""
    position = _row_positions(inputs)
    if position is None:
        return
    on = position.diff(dim=1) > 0
    if mask is not None:  # whatever the positions of padding are
        on |= ~(mask[:, 1:] & mask[:, :-1])
    checks.require(
        on.all(),
        ValueError(
            "position_ids: they start again within a row, but the model does not keep such sequences apart here and "
            "lets every token see the others: pass attention_mask=None and use_cache=False, and to flash attention "
            "one row"
        ),
    )


def _row_positions(inputs: ForwardInputs) -> Tensor | None:
    """`(B, T)`, or None where there are no positions of this form."""
    position = inputs.position_ids
    if position is None or position.dim() != 2 or position.shape[1] != inputs.length:
        return None
    return position.to(inputs.device).expand(inputs.batch, -1)


def _packed_starts(inputs: ForwardInputs) -> tuple[Tensor, int] | None:
    """Starts of the packed sequences, counted in the flattened batch, and the longest; None: every row is one.

    How many there are must be known to the host, and how long they are, or every pass would be launched over as many
    tokens for each as there are in all: on CUDA this is the one place that waits for the device. transformers waits
    there too, to choose whether such a batch gets a `(T, T)` mask.
    """
    position = _row_positions(inputs)
    if position is None:
        return None
    fresh = torch.ones_like(position, dtype=torch.bool)
    fresh[:, 1:] = position.diff(dim=1) != 1
    starts = fresh.flatten().nonzero().squeeze(1)
    if starts.numel() == inputs.batch:
        return None
    return starts, int(starts.diff(append=starts.new_full((1,), fresh.numel())).max())


def _padded(inputs: ForwardInputs, mask: Tensor | None, response_mask: Tensor | None, checks: Checks) -> Sequences:
    plain = unpadded_table(inputs.batch, inputs.length, inputs.device)
    row, start, end, _ = plain.unbind(1)
    if mask is not None:
        start, end = ends(mask)
        checks.require(
            (mask.sum(1) == end - start).all(),
            ValueError(
                "attention_mask: masked tokens between live ones; a row's live tokens must be one range "
                "(left or right padding), because the measures are over ranges"
            ),
        )
    arguments: dict[str, Any] = {}
    first, last = start, end
    if response_mask is not None:
        first, last = ends(response_mask if mask is None else response_mask & mask)
        none = last == 0
        last = torch.where(none, end, last)
        first = torch.where(none, end, first)
        arguments["response_start"] = first
    seqs = plain
    if mask is not None or response_mask is not None:
        arguments["seq_start"] = start
        arguments["seq_end"] = last
        seqs = torch.stack([row, start, last, first], dim=1)
    table = SequenceTable(seqs, inputs.length, packed=False)
    return Sequences(inputs.batch, inputs.length, row, start, end, first, last, False, arguments, table, live=mask)


def _packed(inputs: ForwardInputs, starts: Tensor, longest: int | None, response_mask: Tensor | None) -> Sequences:
    """`longest`: no sequence has more tokens; None: not known."""
    total = inputs.batch * inputs.length
    stop = starts.new_full((1,), total)
    ends = torch.cat([starts[1:], stop])
    if inputs.cu_seqlens is not None:
        ends = torch.minimum(ends, inputs.cu_seqlens[1:].to(ends))
    # R of each sequence: [first, last + 1) of its live response tokens; empty at its end where there is none.
    response_start, response_end = starts, ends
    if response_mask is not None:
        position = torch.arange(total, device=inputs.device)
        which = torch.bucketize(position, starts, right=True) - 1
        live = (position < ends[which]) & response_mask.flatten()
        first = torch.full_like(starts, total).scatter_reduce(0, which, torch.where(live, position, total), "amin")
        last = torch.full_like(starts, -1).scatter_reduce(0, which, torch.where(live, position, -1), "amax")
        response_end = torch.where(last < 0, ends, last + 1)
        response_start = torch.where(last < 0, ends, first)
    # What follows R in its sequence is no row, so it becomes a sequence of its own in which nothing is measured.
    bounds = torch.stack([starts, response_end], dim=1).flatten()
    counted = torch.stack([response_start - starts, torch.full_like(starts, total)], dim=1).flatten()
    bounds = torch.cat([bounds, stop])
    if reads_now(inputs.device):
        longest = int(bounds.diff().max())
    elif longest is None:
        longest = total
    arguments = {
        "cu_seqlens": bounds.to(torch.int32),
        "response_start": counted.to(torch.int32),
        "max_seqlen": longest,
    }
    begin, end = bounds[:-1], bounds[1:]
    first = torch.minimum(begin + counted, end)
    seqs = torch.stack([torch.zeros_like(begin), begin, end, first], dim=1).int()
    row = (starts // inputs.length).clamp(max=inputs.batch - 1)  # an empty last sequence starts behind the batch
    start, end, first, last = (x - row * inputs.length for x in (starts, ends, response_start, response_end))
    table = SequenceTable(seqs, longest, packed=True)
    return Sequences(inputs.batch, inputs.length, row, start, end, first, last, True, arguments, table)


def _given_no_mask(name: str) -> ValueError:
    return ValueError(
        f"the batch is padded, but {name!r} attention was given no mask: register a mask function for this "
        "name in transformers.AttentionMaskInterface, or choose another attn_implementation"
    )


class NamedWindow(NamedTuple):
    """A layer's sliding window, in visible keys, or None, and whether the layer itself says so."""

    keys: int | None
    sure: bool = True


def window_of_layer(
    sequences: Sequences, mask: Any, hints: Sequence[int], name: str, checks: Checks, named: NamedWindow
) -> int:
    """The left window that a layer's own mask shows (-1: none).

    On the CPU, and where the layer is not `sure`, by trying `hints` at a few rows of it; else, where the host may not
    read, the window that it names is taken, and held to the mask behind the host's back.

    Args:
        mask: what the layer was given: None, a bool or additive float `(B, 1, T, T)` tensor, or a `BlockMask`.
        hints: sliding windows (number of visible keys) that the layer or its configuration names.

    Raises:
        ValueError: where the mask is not causal within the sequences, with one of these windows.
    """
    if mask is None:
        if sequences.packed:
            raise ValueError(
                f"the batch looks packed, but {name!r} attention was given no mask and let every token see the other "
                "sequences: with 'sdpa' or 'eager', pass packed position_ids, attention_mask=None and use_cache=False "
                "(cu_seq_lens are read by flash attention alone); where the model ignores these, pad the batch instead"
            )
        if sequences.whole is not None:
            raise ValueError(f"the layer attends in chunks, but {name!r} attention was given no mask that says so")
        if sequences.live is not None:
            checks.require(sequences.live.all(), _given_no_mask(name))
        return -1
    tried = list(dict.fromkeys([*hints, None]))
    if sequences.packed:
        error = ValueError(
            f"the batch looks packed, but the mask of {name!r} attention does not keep its sequences apart: this model "
            "ignores packed position_ids (gpt-oss does), so pad the batch instead"
        )
    else:
        within = "within each sequence" if sequences.whole is None else f"in chunks of {sequences.table.max_seqlen}"
        error = ValueError(
            f"the mask of {name!r} attention is not plain causal attention {within}, nor with a sliding "
            f"window of {[h for h in tried if h is not None]} keys: custom, prefix and bidirectional masks "
            "are not supported by the probe"
        )
    at_once = reads_now(sequences.start.device) or not named.sure
    for hint in tried if at_once else [named.keys]:
        left = -1 if hint is None or hint >= sequences.length else hint - 1
        key = (id(mask), left)
        if key not in sequences.checked:  # the mask is kept with its verdict, so that its id stays its own
            agreed = agrees(_visible_rows(mask, sequences, checks), sequences.checked_rows, sequences.length, left)
            if not at_once:
                checks.require(agreed, error)
            sequences.checked[key] = mask, not at_once or bool(agreed)
        if sequences.checked[key][1]:
            return left
    raise error


def rows_to_check(bounds: Tensor, length: int) -> CheckedRows:
    """(row, start, t, alive) of the first, middle and last query of the first few sequences, `(n,)` each.

    `bounds` is `(S, 3)` (row, start, end), `length` the tokens of a row; `alive` is False for empty sequences.
    """
    row, start, end = bounds[:_CHECKED_SEQUENCES].long().unbind(1)
    last = (end - 1).clamp(min=0)
    t = torch.stack([start.clamp(max=length - 1), (start + last) // 2, last])
    row, start, alive = (x.expand(3, -1).flatten() for x in (row, start, end > start))
    return row, start, t.flatten(), alive


def _visible_rows(mask: Any, sequences: Sequences, checks: Checks) -> Tensor:
    """`(n, T)` bool: the keys that the checked queries see according to `mask`."""
    row, _, t, alive = sequences.checked_rows
    mask_mod: Callable[..., Tensor] | None = getattr(mask, "mask_mod", None)
    if mask_mod is not None:
        keys = torch.arange(sequences.length, device=t.device)
        zero = torch.zeros((), dtype=torch.int64, device=t.device)
        return mask_mod(row[:, None], zero, t[:, None], keys[None, :]).expand(t.numel(), sequences.length)
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != sequences.length:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention mask of a layer: {found}; a (B, 1, T, T) mask or a BlockMask made by transformers from a "
            "two-dimensional attention_mask is needed"
        )
    rows = mask[row if mask.shape[0] > 1 else torch.zeros_like(row), :, t]  # (n, 1 or H, T)
    ignored = ~alive[:, None, None]
    visible = rows
    if rows.dtype != torch.bool:
        visible = rows > torch.finfo(rows.dtype).min / 2
        checks.require(
            (~visible | (rows == 0) | ignored).all(),
            ValueError(
                "attention mask of a layer: it adds a bias to the scores (ALiBi or the like), which the probe cannot "
                f"measure; where it is ALiBi, {WAY_OUT}"
            ),
        )
    if visible.shape[1] > 1:
        checks.require(
            ((visible == visible[:, :1]) | ignored).all(),
            ValueError("attention mask of a layer: its heads see different keys, which the probe does not support"),
        )
    return visible[:, 0]


def agrees(rows: Tensor, checked: CheckedRows, length: int, left: int | Tensor) -> Tensor:
    """Whether `rows` `(n, T)` bool, the keys that the checked queries see, are ranges with this left window; 0-d."""
    _, start, t, alive = checked
    key = torch.arange(length, device=t.device)
    expected = (key >= start[:, None]) & (key <= t[:, None])
    if isinstance(left, Tensor):
        expected &= (left < 0) | (t[:, None] - key <= left)
    elif left >= 0:
        expected &= t[:, None] - key <= left
    return ((rows == expected) | ~alive[:, None]).all()
