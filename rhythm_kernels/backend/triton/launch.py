"""What every pass does around its kernel: outputs, argument lists, the grid, the device."""

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

# Lengths change every training step, and strides with them: no argument may compile a kernel anew. Alignment, which
# vector loads need, is passed once and for all as a constexpr: strides of tokens and heads come divided by ALIGN.
# What is read a number at a time may begin anywhere: one layer's lse, say, in a larger tensor.
UNSPECIALIZED = (
    "lse", "seqs", "heads",
    *(f"{name}_{axis}" for name in ("q", "k", "v", "o", "do", "dq", "dk", "dv") for axis in "bth"),
    "lse_b", "lse_h", "lse_t", "out_b", "out_h", "out_m", "tiles", "groups", "n_heads", "kv_group",
    "window_left", "window", "lo", "hi", "min_distance",
)  # fmt: skip


def _strides(**tensors: Tensor) -> dict[str, int]:
    """The batch, token and head strides of each tensor in units of ALIGN, which divides them all, and ALIGN."""
    align = math.gcd(16, *(stride for x in tensors.values() for stride in x.stride()[:3]))
    named = {
        f"{name}_{axis}": stride // align for name, x in tensors.items() for axis, stride in zip("bth", x.stride())
    }
    return {"ALIGN": align, **named}


def _chunks(head_size: int) -> tuple[int, int]:
    """Two powers of two that cover a head: 128 -> (128, 0), 80 -> (64, 16), 192 -> (128, 64).

    Products want 16, and 16 beside 128 makes dk and dv spill on sm_80 with every tile: the second is a quarter of the
    first at least, 144 -> (128, 32).
    """
    low = max(16, 1 << (head_size.bit_length() - 1))
    rest = head_size - low
    return low, max(16, low // 4, 1 << (rest - 1).bit_length()) if rest > 0 else 0


def _options(tile: Tile) -> dict[str, int]:
    """What the compiler is told about a tile."""
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return options | ({"maxnreg": tile.registers} if tile.registers else {})


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class _Call:
    """One call of a pass in canonical form: what every kernel takes, and the launch over sequences and heads."""

    def __init__(self, q: Tensor, k: Tensor, rule: Rule) -> None:
        self.q, self.k, self.rule = q, k, rule
        self.batch, self.length, n_heads, head_size = q.shape
        low, high = _chunks(head_size)
        self.arguments: dict[str, Any] = {
            "q": q, "k": k, "seqs": rule.seqs, "kv_group": n_heads // k.shape[2], "rule": score_rule(rule),
            "window_left": rule.window_left if rule.window_left >= 0 else None,
            "D": head_size, "D0": low, "D1": high, "UPCAST": INTERPRETED and q.dtype == torch.bfloat16,
        }  # fmt: skip

    def choose(self, name: str, head_size: int) -> Tile:
        """The tile of a kernel."""
        bits = 32 if INTERPRETED else 8 * self.q.element_size()
        return choosing.choose(name, choosing.architecture(self.q.device), bits, head_size)

    def run(
        self, kernel: Any, tile: Tile, owner: str, count: int, strided: dict[str, Tensor], **extra: Any
    ) -> None:  # fmt: skip
        """Run a kernel over every (tile, one of `count` heads, sequence).

        `owner` says which side of the tile a program keeps, `rows` of the map or `keys`; `strided` names the tensors
        `(B, T, heads, size)` that the kernel takes beside q and k.

        A program has one head. A loop over heads would have to keep in registers, through the loop over tiles, what
        it needs again for the next one, and its first loads would wait for the last tile of the head before.
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


class Problem(_Call):
    """One call of a pass over selected heads that multiplies q by k alone."""

    def __init__(
        self, name: str, q: Tensor, k: Tensor, lse: Tensor | None, rule: Rule, *, owner: str = "rows"
    ) -> None:  # fmt: skip
        """`owner` says which side of the tile a program keeps: `rows` of the map or `keys`."""
        super().__init__(q, k, rule)
        self.owner, self.n_selected = owner, rule.heads.shape[0]
        self.tile = self.choose(name, q.shape[3])
        self.arguments |= {"heads": rule.heads, "n_heads": self.n_selected}
        if lse is not None:
            self.arguments |= {"lse": lse, "lse_b": lse.stride(0), "lse_h": lse.stride(1), "lse_t": lse.stride(2)}

    def output(self, *leading: int) -> Tensor:
        """`(*leading, B, Hs, T)` float32 zeros: positions outside the responses are nobody's to write."""
        return self.q.new_zeros((*leading, self.batch, self.n_selected, self.length), dtype=torch.float32)

    def launch(self, kernel: Any, like: Tensor, **extra: Any) -> None:
        """Run the kernel over every (tile, selected head, sequence); its outputs are laid out as `like`."""
        strides = {"out_b": like.stride(-3), "out_h": like.stride(-2)}
        self.run(kernel, self.tile, self.owner, self.n_selected, {}, **strides, **extra)


def over_heads(out: Tensor, per_head: bool) -> Tensor:
    """`(..., B, Hs, T)` as it is, or its mean over the heads, `(..., B, T)`, in their order."""
    if per_head:
        return out
    return out.squeeze(-2) if out.shape[-2] == 1 else out.mean(-2)


class AttentionProblem(_Call):
    """One call of attention or of its backward: what its kernels share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> None:
        super().__init__(q, k, rule)
        self.v = v
        low, high = _chunks(v.shape[3])
        self.arguments |= {"DV": v.shape[3], "V0": low, "V1": high}
        # The interpreter truncates where it should round to bfloat16: it writes float32, and torch rounds.
        self.stored = torch.float32 if self.arguments["UPCAST"] else q.dtype

    def launch(
        self, name: str, kernel: Any, owner: str, groups: int, strided: dict[str, Tensor], **extra: Any
    ) -> None:  # fmt: skip
        """Run a kernel over every (tile, one of `groups` heads, sequence); as :meth:`_Call.run`, beside v as well."""
        tile = self.choose(name, max(self.q.shape[3], self.v.shape[3]))
        if tile.capped_rows and (self.rule.softcap > 0 or self.rule.window_left >= 0):
            tile = tile._replace(rows=tile.capped_rows)
        self.run(kernel, tile, owner, groups, {"v": self.v, **strided}, groups=groups, **extra)
