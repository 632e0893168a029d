"""From what a forward pass was given (mask, positions, packing) to the live ranges of its sequences.

The ranges come from the two-dimensional inputs of the model's forward, never from a `(T, T)` mask. Whether the masks
of its layers agree is the matter of `layer_window`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..sequences import SequenceTable, unpadded_table
from .checked_queries import CheckedQueries, queries_to_check
from .checks import Checks, reads_now


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
        batch_row, start, end: `(S,)` int, the sequences in the `(B, T)` layout; some may be empty.
        response_start, response_end: `(S,)`, R of each sequence, counted likewise.
        packed: whether q and k are handed over flattened to `(B * T, H, D)`, with `cu_seqlens`.
        arguments: keyword arguments of `waad`, `fai`, `span`, `attention_lse`, `column_moments`.
        table: the same for `canonical`, made once for all layers.
        live: `(B, T)` bool, the tokens that are in a sequence; None: all are, or they are packed.
        verdicts: id of a mask and a left window -> the mask, and whether it shows the sequences with that window.
        in_chunks: chunk size -> the same sequences for layers that attend in such chunks (see `chunks`).
        whole_table, chunk_bounds, row_counts: only in the sequences of `in_chunks`, whose `table` has an entry a chunk:
            the table of whole sequences, the `(P, 3)` bounds of the chunks, and what `rows_after` counted.
    """

    batch: int
    length: int
    batch_row: Tensor
    start: Tensor
    end: Tensor
    response_start: Tensor
    response_end: Tensor
    packed: bool
    arguments: dict[str, Any]
    table: SequenceTable
    live: Tensor | None = None
    verdicts: dict[tuple[int, int], tuple[Any, bool]] = field(default_factory=dict)
    in_chunks: dict[int, Sequences] = field(default_factory=dict)
    whole_table: SequenceTable | None = None
    chunk_bounds: Tensor | None = None
    row_counts: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def bounds(self) -> Tensor:
        """`(S, 3)` int: batch row, start and end of each sequence."""
        return torch.stack([self.batch_row, self.start, self.end], dim=1)

    @cached_property
    def checked_queries(self) -> CheckedQueries:
        """Where the layers' masks are looked at."""
        return queries_to_check(self.bounds if self.chunk_bounds is None else self.chunk_bounds, self.length)

    @cached_property
    def response(self) -> Tensor:
        """`(B, T)` bool, the tokens of R."""
        position = torch.arange(self.length, device=self.start.device)
        if not self.packed:
            return (position >= self.response_start[:, None]) & (position < self.response_end[:, None])
        flat = self.batch_row * self.length  # +1 at the first token of each response, -1 behind its last
        step = torch.zeros(self.batch * self.length + 1, dtype=torch.int64, device=self.start.device)
        one = torch.ones_like(flat)
        step.index_put_((flat + self.response_start,), one, accumulate=True)
        step.index_put_((flat + self.response_end,), -one, accumulate=True)
        return (step.cumsum(0)[:-1] > 0).view(self.batch, self.length)


def true_range(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`(B, T)` bool -> first True and last True + 1 of each batch row, int32; (0, 0) where there is none."""
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
        checks.require(mask.all(), given_no_mask(inputs.unmasked_under))
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
            "cu_seq_lens_q must be None where the implementation is no flash attention, which alone reads it, got "
            f"{inputs.cu_seqlens.numel() - 1} sequences: pass packed position_ids, attention_mask=None and "
            "use_cache=False instead"
        )
    _refuse_unseen_packing(inputs, mask, checks)
    return _padded(inputs, mask, response_mask, checks)


def _refuse_unseen_packing(inputs: ForwardInputs, mask: Tensor | None, checks: Checks) -> None:
    """Raise where positions start again within a batch row that the model attended to as one sequence."""
    position = _positions(inputs)
    if position is None:
        return
    increases = position.diff(dim=1) > 0
    if mask is not None:  # whatever the positions of padding are
        increases |= ~(mask[:, 1:] & mask[:, :-1])
    checks.require(
        increases.all(),
        ValueError(
            "position_ids must increase along a batch row, got positions that start again within one: the model does "
            "not keep such sequences apart here and lets every token see the others; pass attention_mask=None and "
            "use_cache=False, and to flash attention a single batch row"
        ),
    )


def _positions(inputs: ForwardInputs) -> Tensor | None:
    """`(B, T)`, or None where there are no positions of this form."""
    position = inputs.position_ids
    if position is None or position.dim() != 2 or position.shape[1] != inputs.length:
        return None
    return position.to(inputs.device).expand(inputs.batch, -1)


def _packed_starts(inputs: ForwardInputs) -> tuple[Tensor, int] | None:
    """Starts of the packed sequences, counted in the flattened batch, and the length of the longest.

    None: every batch row is one sequence. The host must know how many sequences there are, and the longest, or every
    pass would be launched for each over as many tokens as there are in all: on CUDA this is the one place that waits
    for the device. transformers waits there too, to choose whether such a batch gets a `(T, T)` mask.
    """
    position = _positions(inputs)
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
    batch_row, start, end, _ = plain.unbind(1)
    if mask is not None:
        start, end = true_range(mask)
        checks.require(
            (mask.sum(1) == end - start).all(),
            ValueError(
                "attention_mask must leave one range of live tokens in each batch row (left or right padding), got "
                "masked tokens between live ones: the measures are over ranges"
            ),
        )
    arguments: dict[str, Any] = {}
    response_start, response_end = start, end
    if response_mask is not None:
        response_start, response_end = true_range(response_mask if mask is None else response_mask & mask)
        none = response_end == 0  # then R is empty, at the end of the sequence
        response_end = torch.where(none, end, response_end)
        response_start = torch.where(none, end, response_start)
        arguments["response_start"] = response_start
    seqs = plain
    if mask is not None or response_mask is not None:
        arguments["seq_start"] = start
        arguments["seq_end"] = response_end
        seqs = torch.stack([batch_row, start, response_end, response_start], dim=1)
    table = SequenceTable(seqs, inputs.length, packed=False)
    ranges = (start, end, response_start, response_end)
    return Sequences(inputs.batch, inputs.length, batch_row, *ranges, False, arguments, table, live=mask)


def _packed(inputs: ForwardInputs, starts: Tensor, longest: int | None, response_mask: Tensor | None) -> Sequences:
    """The sequences that begin at `starts`, counted in the flattened batch.

    Args:
        longest: no sequence has more tokens; None: not known.
    """
    total = inputs.batch * inputs.length
    behind = starts.new_full((1,), total)
    ends = torch.cat([starts[1:], behind])
    if inputs.cu_seqlens is not None:
        ends = torch.minimum(ends, inputs.cu_seqlens[1:].to(ends))
    # R of each sequence: [first, last + 1) of its live response tokens; empty at its end where there is none.
    response_start, response_end = starts, ends
    if response_mask is not None:
        position = torch.arange(total, device=inputs.device)
        sequence = torch.bucketize(position, starts, right=True) - 1
        scored = (position < ends[sequence]) & response_mask.flatten()
        first = torch.full_like(starts, total).scatter_reduce(0, sequence, torch.where(scored, position, total), "amin")
        last = torch.full_like(starts, -1).scatter_reduce(0, sequence, torch.where(scored, position, -1), "amax")
        response_end = torch.where(last < 0, ends, last + 1)
        response_start = torch.where(last < 0, ends, first)
    # The tokens behind R are not scored: they become an entry of their own, whose response starts behind its end.
    bounds = torch.stack([starts, response_end], dim=1).flatten()
    scored_from = torch.stack([response_start - starts, torch.full_like(starts, total)], dim=1).flatten()
    bounds = torch.cat([bounds, behind])
    if reads_now(inputs.device):
        longest = int(bounds.diff().max())
    elif longest is None:
        longest = total
    arguments = {
        "cu_seqlens": bounds.to(torch.int32),
        "response_start": scored_from.to(torch.int32),
        "max_seqlen": longest,
    }
    begin, stop = bounds[:-1], bounds[1:]
    seqs = torch.stack([torch.zeros_like(begin), begin, stop, torch.minimum(begin + scored_from, stop)], dim=1).int()
    table = SequenceTable(seqs, longest, packed=True)
    batch_row = (starts // inputs.length).clamp(max=inputs.batch - 1)  # an empty last sequence starts behind the batch
    start, end, first, last = (x - batch_row * inputs.length for x in (starts, ends, response_start, response_end))
    return Sequences(inputs.batch, inputs.length, batch_row, start, end, first, last, True, arguments, table)


def given_no_mask(name: str) -> ValueError:
    """For a padded batch under the attention implementation `name`."""
    return ValueError(
        f"the batch is padded, but {name!r} attention was given no mask: register a mask function for this "
        "name in transformers.AttentionMaskInterface, or choose another attn_implementation"
    )
