"""Chunked attention (Llama 4): a token sees, of its sequence, the keys of its own chunk up to itself.

A chunk is a range of keys, so each sequence becomes as many entries of the sequence table as it has chunks, and the
passes need not know of chunks. They then miss one thing: the rows T(s) of eq. 10 go on behind the end of the chunk of
s, with A = 0. These rows count in the mean, as those behind a sliding window do, and `rows_after` says how many there
are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..sequences import SequenceTable, token_table
from .forward_sequences import Sequences


def chunk_of(attention: nn.Module, length: int) -> int | None:
    """The chunk size of a layer, in tokens; None: it has none, or one that `length` tokens do not exceed."""
    config = attention.config
    types, size = getattr(config, "layer_types", None), getattr(config, "attention_chunk_size", None)
    layer = getattr(attention, "layer_idx", None)
    if not isinstance(size, int) or not isinstance(layer, int) or not types or not 0 <= layer < len(types):
        return None
    return size if types[layer] == "chunked_attention" and length > size else None


def in_chunks(sequences: Sequences, size: int) -> Sequences:
    """The same sequences for layers that attend in chunks of `size` tokens; made once a forward."""
    if size not in sequences.in_chunks:
        seqs, longest, packed = sequences.table
        # The flattened table has one batch row, in which those of the batch begin at the multiples of the length.
        start = seqs[:, 1]
        batch_row_start = start - start % sequences.length if packed else torch.zeros_like(start)
        origin = start if _counted_from_start(packed) else batch_row_start
        table = _cut(seqs, origin, size, longest).flatten(0, 1)
        bounds = sequences.bounds
        origin = bounds[:, 1] if _counted_from_start(packed) else torch.zeros_like(bounds[:, 1])
        # Masks are checked at the first few bounds alone, so the second chunks of all sequences come first: they are
        # where a mask without chunks would show the chunk before.
        chunk_bounds = _cut(bounds, origin, size, sequences.length).roll(-1, dims=1).transpose(0, 1).flatten(0, 1)
        sequences.in_chunks[size] = replace(
            sequences,
            table=SequenceTable(table, min(size, longest), packed),
            whole_table=sequences.table,
            chunk_bounds=chunk_bounds,
            verdicts={},
            row_counts={},
            in_chunks={},
        )
    return sequences.in_chunks[size]


def _counted_from_start(packed: bool) -> bool:
    """Whether chunks are counted from each sequence's first token, as they are in padded batches (behind the padding).

    In packed ones transformers counts by the positions since 5.24, and from the batch row's first token before.
    """
    from transformers import masking_utils

    return not packed or hasattr(masking_utils, "remap_positions_for_packed_sequence")


def _cut(entries: Tensor, origin: Tensor, size: int, longest: int) -> Tensor:
    """`(S, P, n)`: each of the `(S, n)` table entries, cut at `origin` plus multiples of `size`.

    An entry is (batch row, start, end, and further bounds). Its chunks are in order, and those that it does not have
    are empty, at its end.
    """
    batch_row, start, end, *further = entries.unbind(1)
    index = torch.arange(-(-longest // size) + 1, device=entries.device, dtype=entries.dtype)
    first = origin + (start - origin) // size * size
    low = first[:, None] + index * size
    chunk_start = torch.minimum(torch.maximum(low, start[:, None]), end[:, None])
    chunk_end = torch.minimum(low + size, end[:, None])
    chunk_end = torch.maximum(chunk_end, chunk_start)
    fields = [batch_row[:, None].expand_as(chunk_start), chunk_start, chunk_end]
    fields += [torch.minimum(torch.maximum(x[:, None], chunk_start), chunk_end) for x in further]
    return torch.stack(fields, dim=2)


def rows_after(sequences: Sequences, low: int, high: int | None) -> tuple[Tensor, Tensor] | None:
    """How many of the rows `s + low .. s + high` there are in the chunk of each token s of R, and how many in all of R.

    Each `(B, T)` int64, 0 for tokens outside of R. None where both are the same, because attention is not in chunks.

    Args:
        high: None: to the end of R.
    """
    if sequences.whole_table is None:
        return None
    if (low, high) not in sequences.row_counts:
        tables = (sequences.table, sequences.whole_table)
        in_chunk, in_response = (_rows_after(sequences, table, low, high) for table in tables)
        sequences.row_counts[low, high] = in_chunk, in_response
    return sequences.row_counts[low, high]


def _rows_after(sequences: Sequences, table: SequenceTable, low: int, high: int | None) -> Tensor:
    batch, length = sequences.batch, sequences.length
    shape = (1, batch * length) if table.packed else (batch, length)
    tokens = token_table(table.seqs, *shape)
    token = torch.arange(shape[1], device=tokens.end.device)
    last = tokens.end - 1 if high is None else torch.minimum(tokens.end - 1, token + high)
    rows = (last - (token + low) + 1).clamp(min=0)
    return torch.where(tokens.scored, rows, 0).view(batch, length)
