"""Chunked attention (Llama 4): a token sees, of its sequence, the keys of its own chunk up to itself.

A chunk is a range of keys, so each sequence becomes as many entries of the sequence table as it has chunks, and the
passes need not know. One thing they cannot see there: the rows T(s) of eq. 10 run on behind the end of the chunk,
where they attend to s with A = 0. They count all the same, as the rows behind a sliding window do: `rows_after` says
how many.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..sequences import SequenceTable, token_table
from .masks import Sequences


def chunk_of(attention: nn.Module, length: int) -> int | None:
    """The chunk size of a layer, in tokens, where rows of `length` tokens are longer than one chunk; else None."""
    config = attention.config
    kinds, size = getattr(config, "layer_types", None), getattr(config, "attention_chunk_size", None)
    layer = getattr(attention, "layer_idx", None)
    if not isinstance(size, int) or not isinstance(layer, int) or not kinds or not 0 <= layer < len(kinds):
        return None
    return size if kinds[layer] == "chunked_attention" and length > size else None


def in_chunks(sequences: Sequences, size: int) -> Sequences:
    """The same sequences for layers that attend in chunks of `size` tokens; made once a forward."""
    if size not in sequences.in_chunks:
        seqs, longest, packed = sequences.table
        # In the flattened table, rows begin at the multiples of the length; elsewhere a row's tokens count from 0.
        start = seqs[:, 1]
        from_row = start - start % sequences.length if packed else torch.zeros_like(start)
        origin = start if _counted_from_start(packed) else from_row
        table = _cut(seqs, origin, size, longest).flatten(0, 1)
        bounds = sequences.bounds
        begin = bounds[:, 1] if _counted_from_start(packed) else torch.zeros_like(bounds[:, 1])
        # The masks are looked at behind the first edge of a chunk of each sequence first: `rows_to_check` ends early.
        pieces = _cut(bounds, begin, size, sequences.length).roll(-1, dims=1).transpose(0, 1).flatten(0, 1)
        sequences.in_chunks[size] = replace(
            sequences,
            table=SequenceTable(table, min(size, longest), packed),
            whole=sequences.table,
            pieces=pieces,
            checked={},
            rows={},
            in_chunks={},
        )
    return sequences.in_chunks[size]


def _counted_from_start(packed: bool) -> bool:
    """Whether chunks are counted from each sequence's first token: in padded rows they are (from behind the padding).

    In packed rows transformers counts by the positions since 5.24, and from the row's first token before.
    """
    from transformers import masking_utils

    return not packed or hasattr(masking_utils, "remap_positions_for_packed_sequence")


def _cut(entries: Tensor, origin: Tensor, size: int, longest: int) -> Tensor:
    """`(S, P, n)`: each of the `(S, n)` entries (row, start, end, and further bounds) at `origin` plus multiples of
    `size`. Pieces are in order; those that an entry does not have are empty at its end."""
    row, start, end, *further = entries.unbind(1)
    index = torch.arange(-(-longest // size) + 1, device=entries.device, dtype=entries.dtype)
    first = origin + (start - origin) // size * size
    low = first[:, None] + index * size
    begin = torch.minimum(torch.maximum(low, start[:, None]), end[:, None])
    stop = torch.minimum(low + size, end[:, None])
    stop = torch.maximum(stop, begin)
    columns = [row[:, None].expand_as(begin), begin, stop]
    columns += [torch.minimum(torch.maximum(x[:, None], begin), stop) for x in further]
    return torch.stack(columns, dim=2)


def rows_after(sequences: Sequences, low: int, high: int | None) -> tuple[Tensor, Tensor] | None:
    """`(B, T)` int64 twice: of the rows `s + low .. s + high` after each token of R, how many its table's entry holds,
    and how many there are in R; 0 for tokens outside of R. None where these are the same: attention is not in chunks.

    Args:
        high: None: to the end of R.
    """
    if sequences.whole is None:
        return None
    if (low, high) not in sequences.rows:
        counts = (_rows_after(sequences, table, low, high) for table in (sequences.table, sequences.whole))
        sequences.rows[low, high] = next(counts), next(counts)
    return sequences.rows[low, high]


def _rows_after(sequences: Sequences, table: SequenceTable, low: int, high: int | None) -> Tensor:
    batch, length = sequences.batch, sequences.length
    shape = (1, batch * length) if table.packed else (batch, length)
    tokens = token_table(table.seqs, *shape)
    token = torch.arange(shape[1], device=tokens.end.device)
    last = tokens.end - 1 if high is None else torch.minimum(tokens.end - 1, token + high)
    rows = (last - (token + low) + 1).clamp(min=0)
    return torch.where(tokens.scored, rows, 0).view(batch, length)
