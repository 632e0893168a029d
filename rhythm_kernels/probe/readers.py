"""The attention implementations of transformers that the probe can read, as a table with one entry a kind.

What differs between implementations is here and nowhere else: a new one is one more entry of `READERS`, and one more
line in the table of docs/probe.md, which is tested against this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase


class LseFrom(Enum):
    """Where the log-sum-exp of an attention call comes from."""

    OPERATOR = "the attention operator that torch chose, which returns it beside the output"
    OURS = "our attention operator, which also gives statistics where they are asked for"
    PACKAGE = "the flash-attention package's function, by a flag of its own; else the operator under it"
    NOTHING = "our streaming pass over q and k"


@dataclass(frozen=True)
class Reader:
    """What an attention implementation is given, and what it returns.

    Attributes:
        name: its name in transformers, in which `*` stands for any characters.
        lse: where its log-sum-exp comes from.
        takes_lengths: it is told packed sequences by their lengths (`cu_seq_lens_q`, or packed `position_ids` even
            beside a mask that is all True) and is given no `(T, T)` mask. The others find them in such a mask.
        takes_window: it is told the sliding window by its `sliding_window` argument. The others find it in their mask.
        drops: which of "sinks" and "softcap" it ignores without a word. What a flash-attention package ignores depends
            on its version too, and is seen in the call.
    """

    name: str
    lse: LseFrom
    takes_lengths: bool = False
    takes_window: bool = False
    drops: frozenset[str] = frozenset()


READERS = (
    Reader("sdpa", LseFrom.OPERATOR, drops=frozenset({"sinks", "softcap"})),
    Reader("eager", LseFrom.NOTHING),
    Reader("flex_attention", LseFrom.NOTHING),  # it has one, rounded to the dtype of the values
    Reader("rhythm", LseFrom.OURS),
    Reader("flash_attention_2", LseFrom.PACKAGE, takes_lengths=True, takes_window=True, drops=frozenset({"sinks"})),
    Reader("*flash*", LseFrom.PACKAGE, takes_lengths=True, takes_window=True),
)


def reader_of(name: str) -> Reader:
    """The first entry of the table that an implementation's name fits.

    Raises:
        NotImplementedError: none does.
    """
    for reader in READERS:
        if fnmatchcase(name, reader.name):
            return reader
    known = ", ".join(repr(reader.name) for reader in READERS if "*" not in reader.name)
    raise NotImplementedError(f"attn_implementation must be one of {known} or a flash attention, got {name!r}")
