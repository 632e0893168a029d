"""Launch choices as data: what tile each pass uses on each architecture. Nothing is tuned unasked.

`rows` and `keys` are the tile of queries and keys, `warps` and `stages` Triton's `num_warps` and `num_stages`.
A list is searched from the top for the first entry whose `bits` (16 or 32) and `width` (a head size) are at least those
of the inputs. The sm_80 table also serves sm_86, sm_89 and sm_120, whose shared memory ends at 99 KiB, so no
entry of it may need more. :mod:`.choosing` reads them.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """One launch choice."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int = 0  # the most a thread may have; 0: ptxas decides, and may spill a little for occupancy
    # `rows` where attention's kernels need more registers: with a softcap, whose slope the backward pass also holds, a
    # sliding window, which adds a third loop, or ALiBi, for which they hold distances. 0: `rows` is used then too.
    capped_rows: int = 0


def words(tile: Tile) -> str:
    """A tile in words."""
    registers = f", {tile.registers} registers" if tile.registers else ""
    return f"{tile.rows} x {tile.keys}, {tile.warps} warps, {tile.stages} stages{registers}"


# (bits, width): Tile. float32 dots run on the plain FMA units, for which Triton holds whole heads of both operands in
# registers: a small tile and many threads.
_FLOAT32 = {(32, 256): Tile(32, 32, 16, 2, 128)}
_FLOAT32_AMD = {(32, 256): Tile(32, 32, 4, 1)}  # its matrix units do float32
# Attention and dq (STREAM) also hold an accumulator of a whole head, dkv two (STREAM_TWO).
_FLOAT32_STREAM = {(32, 128): Tile(32, 32, 16, 2, 128), (32, 256): Tile(32, 16, 16, 2, 128)}
_FLOAT32_STREAM_TWO = {(32, 256): Tile(16, 16, 8, 1, 255)}
_ATTENTION = {
    "sm_80": {
        (16, 32): Tile(128, 64, 8, 2, 255),
        (16, 64): Tile(128, 64, 8, 2),
        (16, 112): Tile(64, 32, 8, 2),  # two chunks, and a mask: more registers than a head of 128
        (16, 128): Tile(128, 64, 8, 2),
        (16, 192): Tile(128, 16, 8, 2, 255),
        (16, 256): Tile(64, 32, 8, 2, 255),
        **_FLOAT32_STREAM,
    },
    "sm_90": {
        (16, 64): Tile(128, 128, 8, 2),
        (16, 128): Tile(128, 64, 8, 3),
        (16, 256): Tile(128, 32, 8, 2),
        **_FLOAT32_STREAM,
    },
    "sm_100": {(16, 128): Tile(128, 64, 8, 3, 255), (16, 256): Tile(64, 32, 8, 2, 255), **_FLOAT32_STREAM},
    "gfx942": {
        (16, 128): Tile(128, 64, 4, 1),
        (16, 192): Tile(128, 32, 4, 1, capped_rows=64),
        (16, 256): Tile(128, 32, 4, 1),
        **_FLOAT32_AMD,
    },
}

TILES: dict[str, dict[str, dict[tuple[int, int], Tile]]] = {
    "sm_80": {
        "band_rows": {(16, 256): Tile(64, 16, 4, 2, 168), **_FLOAT32},
        "band_columns": {(16, 256): Tile(32, 64, 4, 2), **_FLOAT32},
        "column_stats": {(16, 64): Tile(64, 128, 8, 2, 255), (16, 256): Tile(32, 128, 8, 2), **_FLOAT32},
        "column_moments": {
            (16, 128): Tile(32, 128, 8, 2),
            (16, 256): Tile(32, 64, 8, 2),
            (32, 128): Tile(32, 32, 16, 2, 128),
            (32, 256): Tile(32, 16, 16, 2, 128),
        },
        "row_stats": {
            (16, 128): Tile(128, 64, 8, 2, 255),
            (16, 256): Tile(128, 32, 8, 2),
            **_FLOAT32,
        },
        "attention": _ATTENTION["sm_80"],
        "attention_alone": {**_ATTENTION["sm_80"], (16, 128): Tile(128, 32, 8, 2)},
        "attention_dq": {
            (16, 64): Tile(128, 64, 8, 2, 255),
            (16, 128): Tile(128, 32, 8, 2),
            (16, 192): Tile(64, 32, 8, 2, 255),
            (16, 256): Tile(32, 32, 4, 2),
            **_FLOAT32_STREAM,
        },
        "attention_dkv": {
            (16, 64): Tile(32, 64, 8, 2),
            (16, 112): Tile(16, 64, 8, 1),
            (16, 128): Tile(32, 64, 8, 2),
            (16, 160): Tile(32, 16, 4, 1, 255),
            (16, 256): Tile(32, 32, 8, 1),
            **_FLOAT32_STREAM_TWO,
        },
    },
    "sm_90": {
        "band_rows": {(16, 256): Tile(64, 32, 4, 3), **_FLOAT32},
        "band_columns": {(16, 128): Tile(64, 128, 4, 3), (16, 256): Tile(64, 64, 4, 2), **_FLOAT32},
        "column_stats": {(16, 128): Tile(64, 128, 4, 3), (16, 256): Tile(64, 64, 4, 3), **_FLOAT32},
        "column_moments": {(16, 128): Tile(64, 128, 8, 3), (16, 256): Tile(32, 64, 8, 2), **_FLOAT32},
        "row_stats": {(16, 256): Tile(128, 64, 8, 3), **_FLOAT32},
        "attention": _ATTENTION["sm_90"],
        "attention_alone": _ATTENTION["sm_90"],
        "attention_dq": {
            (16, 64): Tile(128, 128, 8, 2),
            (16, 128): Tile(128, 64, 8, 3),
            (16, 256): Tile(128, 32, 8, 2),
            **_FLOAT32_STREAM,
        },
        "attention_dkv": {
            (16, 64): Tile(32, 128, 8, 2),
            (16, 96): Tile(32, 128, 8, 2, capped_rows=16),
            (16, 127): Tile(16, 128, 8, 2),  # a mask beside two chunks
            (16, 128): Tile(32, 128, 8, 2, capped_rows=16),
            (16, 159): Tile(16, 64, 8, 1, 255),  # a mask beside two chunks
            (16, 160): Tile(16, 64, 8, 2, 255),
            (16, 256): Tile(32, 32, 8, 1),  # wgmma, which wants 64 keys, would spill
            **_FLOAT32_STREAM_TWO,
        },
    },
    "sm_100": {
        "band_rows": {(16, 128): Tile(64, 32, 4, 2, 255), (16, 256): Tile(64, 32, 8, 2), **_FLOAT32},
        "band_columns": {(16, 128): Tile(64, 64, 4, 2, 255), (16, 256): Tile(64, 64, 8, 2, 255), **_FLOAT32},
        "column_stats": {(16, 128): Tile(64, 128, 8, 2, 255), (16, 256): Tile(64, 64, 8, 2), **_FLOAT32},
        "column_moments": {(16, 256): Tile(32, 64, 8, 2, 255), **_FLOAT32},
        "row_stats": {
            (16, 64): Tile(128, 64, 8, 2),
            (16, 128): Tile(128, 32, 8, 2),
            (16, 256): Tile(64, 32, 8, 2),
            **_FLOAT32,
        },
        "attention": _ATTENTION["sm_100"],
        "attention_alone": _ATTENTION["sm_100"],
        "attention_dq": {(16, 128): Tile(128, 64, 8, 2), (16, 256): Tile(128, 32, 8, 2), **_FLOAT32_STREAM},
        "attention_dkv": {
            (16, 160): Tile(32, 64, 8, 1, 255),
            (16, 192): Tile(32, 64, 8, 1, 255, capped_rows=16),
            (16, 256): Tile(32, 32, 8, 2),  # tcgen05, which wants 64 keys, would spill
            **_FLOAT32_STREAM_TWO,
        },
    },
    "gfx942": {
        "band_rows": {(16, 256): Tile(64, 32, 4, 2), **_FLOAT32_AMD},
        "band_columns": {(16, 256): Tile(32, 64, 4, 2), **_FLOAT32_AMD},
        "column_stats": {(16, 256): Tile(64, 64, 4, 1), **_FLOAT32_AMD},
        "column_moments": {(16, 256): Tile(64, 64, 4, 1), **_FLOAT32_AMD},
        "row_stats": {(16, 256): Tile(64, 64, 4, 1), **_FLOAT32_AMD},
        "attention": _ATTENTION["gfx942"],
        "attention_alone": _ATTENTION["gfx942"],
        "attention_dq": {(16, 128): Tile(128, 64, 4, 1), (16, 256): Tile(64, 32, 4, 1), (32, 256): Tile(32, 16, 4, 1)},
        "attention_dkv": {
            (16, 128): Tile(32, 64, 4, 1, capped_rows=16),
            (16, 256): Tile(16, 32, 4, 1),
            (32, 256): Tile(16, 16, 4, 1),
        },
    },
    # The interpreter pays by the operation, not by the element: few, small tiles that tests still cross often.
    "interpreter": {
        "band_rows": {(32, 256): Tile(32, 32, 1, 1)},
        "band_columns": {(32, 256): Tile(32, 32, 1, 1)},
        "column_stats": {(32, 256): Tile(32, 32, 1, 1)},
        "column_moments": {(32, 256): Tile(32, 32, 1, 1)},
        "row_stats": {(32, 256): Tile(32, 32, 1, 1)},
        "attention": {(32, 256): Tile(32, 32, 1, 1)},
        "attention_alone": {(32, 256): Tile(32, 32, 1, 1)},
        "attention_dq": {(32, 256): Tile(32, 32, 1, 1)},
        "attention_dkv": {(32, 256): Tile(32, 32, 1, 1)},
    },
}

# Tiles whose machine code promises as much as that of the table's, for 16-bit inputs and heads of 128: a GPU decides.
# `python -m rhythm_kernels.tuning --shortlist` times them beside the table's.
CANDIDATES: dict[str, dict[str, tuple[Tile, ...]]] = {
    "sm_90": {
        "band_rows": (Tile(64, 32, 4, 2), Tile(64, 32, 4, 4), Tile(128, 32, 8, 3)),
        "band_columns": (Tile(64, 64, 4, 2, 128), Tile(64, 128, 8, 2, 128), Tile(64, 256, 8, 2)),
        "column_stats": (Tile(64, 128, 4, 2), Tile(64, 256, 8, 2), Tile(128, 128, 8, 3)),
        "column_moments": (Tile(64, 64, 4, 3),),
        "row_stats": (Tile(128, 128, 8, 3), Tile(256, 64, 8, 3)),
        "attention": (Tile(128, 128, 8, 3), Tile(128, 128, 8, 2)),
        "attention_alone": (Tile(128, 128, 8, 3),),
        "attention_dq": (Tile(128, 64, 8, 2),),
        "attention_dkv": (Tile(32, 128, 8, 1),),
    },
    "interpreter": {
        "band_rows": (Tile(16, 32, 1, 1), Tile(32, 16, 1, 1)),
        "band_columns": (Tile(16, 32, 1, 1),),
        "column_stats": (Tile(16, 32, 1, 1),),
    },
}


def listed(kernel: str, arch: str, bits: int, head_size: int) -> Tile:
    """The table's first entry that holds inputs of `bits` and heads of `head_size`."""
    for (entry_bits, width), tile in TILES[arch][kernel].items():
        if entry_bits >= bits and width >= head_size:
            return tile
    raise ValueError(f"{kernel} has no launch choice for {bits}-bit inputs and head size {head_size}")
