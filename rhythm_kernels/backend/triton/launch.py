"""What every pass does around its kernels: choose the tile, collect the arguments, launch over the grid, make outputs.

Kernels take a stride as `q_batch`, `q_token`, `q_head`: from one batch row, token or head of q to the next. They spell
all of them out, each kernel again, because a launch passes arguments by name and Triton specialises integers in tuples.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from ...rule import Rule
from . import choosing
from .configs import Tile
from .interpreted import INTERPRETED
from .score import score_rule

# Lengths change every training step, and strides with them: no argument may compile a kernel anew. Vector loads need
# to know the alignment of strides: those of tensors of heads come divided by ALIGN, which is a constexpr. Tensors that
# are read a number at a time (lse, tables) may begin at any address: lse may be one layer of a larger tensor.
AXES = ("batch", "token", "head")
UNSPECIALIZED = (
    "lse", "seqs", "heads",
    *(f"{name}_{axis}" for name in ("q", "k", "v", "o", "do", "dq", "dk", "dv", "lse", "out") for axis in AXES),
    "out_moment", "tiles", "n_heads", "n_kv_heads", "n_selected", "kv_group_size",
    "window_left", "window", "lo", "hi", "min_distance",
)  # fmt: skip


def _strides(**tensors: Tensor) -> dict[str, int]:
    """The batch, token and head strides of each tensor in units of ALIGN, which divides them all, and ALIGN."""
    align = math.gcd(16, *(stride for x in tensors.values() for stride in x.stride()[:3]))
    named = {f"{name}_{axis}": stride // align for name, x in tensors.items() for axis, stride in zip(AXES, x.stride())}
    return {"ALIGN": align, **named}


def _chunks(head_size: int) -> tuple[int, int]:
    """Two powers of two that cover a head: 128 -> (128, 0), 80 -> (64, 16), 192 -> (128, 64).

    A product needs chunks of 16 or more. The second is also at least a quarter of the first, 144 -> (128, 32): with 16
    beside 128, dk and dv spill on sm_80 with every tile.
    """
    low = max(16, 1 << (head_size.bit_length() - 1))
    rest = head_size - low
    return low, max(16, low // 4, 1 << (rest - 1).bit_length()) if rest > 0 else 0


def _options(tile: Tile) -> dict[str, int]:
    """Triton's compiler options for a tile."""
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return options | ({"maxnreg": tile.registers} if tile.registers else {})


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class _Launch:
    """The arguments that all kernels of one call of a pass take, and the launch over its sequences and heads."""

    def __init__(self, q: Tensor, k: Tensor, rule: Rule) -> None:
        self.q, self.k, self.rule = q, k, rule
        self.batch, self.length, n_heads, head_size = q.shape
        low, high = _chunks(head_size)
        self.arguments: dict[str, Any] = {
            "q": q, "k": k, "seqs": rule.seqs, "kv_group_size": n_heads // k.shape[2], "rule": score_rule(rule),
            "window_left": rule.window_left if rule.window_left >= 0 else None,
            "D": head_size, "D0": low, "D1": high, "UPCAST": INTERPRETED and q.dtype == torch.bfloat16,
        }  # fmt: skip

    def choose(self, name: str, head_size: int) -> Tile:
        """The tile of a kernel."""
        bits = 32 if INTERPRETED else 8 * self.q.element_size()
        return choosing.choose(name, choosing.architecture(self.q.device), bits, head_size)

    def launch(
        self, kernel: Any, tile: Tile, owner: str, count: int, strided: dict[str, Tensor], **extra: Any
    ) -> None:  # fmt: skip
        """Run a kernel with a program for every (tile, one of `count` heads, sequence).

        `owner` is the side of the tile that a program keeps, `rows` or `keys`; it streams the other. `strided` names
        the tensors `(B, T, heads, size)` that the kernel takes beside q and k.

        A program has one head: one that looped over heads would hold in registers, through the loop over tiles, what
        it needs for the next head, whose first loads would wait for the last tile of the head before.
        """
        tiles = -(-self.rule.max_seqlen // getattr(tile, owner))
        grid = tiles * count * self.rule.seqs.shape[0]
        if grid == 0:
            return
        with _on(self.q.device):
            kernel[(grid,)](
                **self.arguments, **extra, **strided, **_strides(q=self.q, k=self.k, **strided),
                tiles=tiles, ROWS=tile.rows, KEYS=tile.keys, **_options(tile),
            )  # fmt: skip


class SelectedHeadsLaunch(_Launch):
    """One launch over the selected heads, of a pass that reads q and k alone."""

    def __init__(
        self, name: str, q: Tensor, k: Tensor, lse: Tensor | None, rule: Rule, *, owner: str = "rows"
    ) -> None:  # fmt: skip
        super().__init__(q, k, rule)
        self.owner, self.n_selected = owner, rule.heads.shape[0]
        self.tile = self.choose(name, q.shape[3])
        self.arguments |= {"heads": rule.heads, "n_selected": self.n_selected}
        if lse is not None:
            lse_batch, lse_head, lse_token = lse.stride()
            self.arguments |= {"lse": lse, "lse_batch": lse_batch, "lse_head": lse_head, "lse_token": lse_token}

    def output(self, *leading: int) -> Tensor:
        """`(*leading, B, Hs, T)` float32 zeros: no kernel writes positions outside the responses."""
        return self.q.new_zeros((*leading, self.batch, self.n_selected, self.length), dtype=torch.float32)

    def run(self, kernel: Any, like: Tensor, **extra: Any) -> None:
        """Run the kernel over every (tile, selected head, sequence); its outputs have the strides of `like`."""
        strides = {"out_batch": like.stride(-3), "out_head": like.stride(-2)}
        self.launch(kernel, self.tile, self.owner, self.n_selected, {}, **strides, **extra)


def over_heads(out: Tensor, per_head: bool) -> Tensor:
    """`(..., B, Hs, T)` as it is with `per_head`, else its mean over the heads, `(..., B, T)`."""
    if per_head:
        return out
    return out.squeeze(-2) if out.shape[-2] == 1 else out.mean(-2)


class AttentionLaunch(_Launch):
    """The launches of one call of attention, or of its backward pass, over all heads of q or of k."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> None:
        super().__init__(q, k, rule)
        self.v = v
        low, high = _chunks(v.shape[3])
        self.arguments |= {"DV": v.shape[3], "V0": low, "V1": high}
        # The interpreter truncates where it should round to bfloat16: it writes float32, and torch rounds.
        self.stored = torch.float32 if self.arguments["UPCAST"] else q.dtype

    def run(
        self, name: str, kernel: Any, owner: str, count: int, strided: dict[str, Tensor], **extra: Any
    ) -> None:  # fmt: skip
        """Run a kernel over every (tile, one of `count` heads, sequence); `strided`: tensors beside q, k, v."""
        tile = self.choose(name, max(self.q.shape[3], self.v.shape[3]))
        more = self.rule.softcap > 0 or self.rule.window_left >= 0 or self.rule.alibi_slopes is not None
        if tile.capped_rows and more:
            tile = tile._replace(rows=tile.capped_rows)
        self.launch(kernel, tile, owner, count, {"v": self.v, **strided}, **extra)
