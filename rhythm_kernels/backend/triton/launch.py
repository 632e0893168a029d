"""What every pass does around its kernel: outputs, argument lists, the grid, the device."""

from __future__ import annotations

import contextlib
import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from ...rule import Rule
from . import configs
from .interpreted import INTERPRETED

# Lengths change every training step, and strides with them: no argument may compile a kernel anew. Alignment, which
# vector loads need, is passed once and for all as a constexpr: strides of tokens and heads come divided by ALIGN.
# What is read a number at a time may begin anywhere: one layer's lse, say, in a larger tensor.
UNSPECIALIZED = (
    "lse", "seqs", "heads", "sinks",
    *(f"{name}_{axis}" for name in ("q", "k", "v", "o", "do", "dq", "dk", "dv") for axis in "bth"),
    "lse_b", "lse_h", "lse_t", "out_b", "out_h", "out_m", "tiles", "groups", "n_heads", "kv_group",
    "scale", "softcap", "window_left", "window", "lo", "hi", "min_distance",
    "bits", "to_bits", "to_bits_rest",
)  # fmt: skip


def _strides(**tensors: Tensor) -> dict[str, int]:
    """The batch, token and head strides of each tensor in units of ALIGN, which divides them all, and ALIGN."""
    align = math.gcd(16, *(stride for x in tensors.values() for stride in x.stride()[:3]))
    named = {
        f"{name}_{axis}": stride // align for name, x in tensors.items() for axis, stride in zip("bth", x.stride())
    }
    return {"ALIGN": align, **named}


def bits_of(rule: Rule) -> dict[str, float]:
    """What `score.weight_in_bits` multiplies by: `bits`, the last factor of a logit (softcap, or scale) over ln 2 in
    float32, and `to_bits + to_bits_rest`, the exact ratio of that rounded number to the factor in two float32 parts.
    """
    factor = rule.softcap if rule.softcap > 0 else rule.scale
    bits = ctypes.c_float(factor / math.log(2)).value
    # Below float32's normal numbers the rounding is coarse, and logits are 0 to within it: the plain ratio serves lse.
    normal = math.isfinite(bits) and abs(bits) >= 2.0**-126
    ratio = bits / factor if normal else 1 / math.log(2)
    to_bits = ctypes.c_float(ratio).value
    return {"bits": bits, "to_bits": to_bits, "to_bits_rest": ratio - to_bits}


def _score(rule: Rule) -> dict[str, Any]:
    """What every kernel takes of a rule; those with a head list take it, and the sinks, besides."""
    return {
        "seqs": rule.seqs, "scale": rule.scale, "softcap": rule.softcap, "window_left": rule.window_left,
        "HAS_SOFTCAP": rule.softcap > 0, "HAS_WINDOW": rule.window_left >= 0,
    }  # fmt: skip


def _options(tile: configs.Tile) -> dict[str, int]:
    """What the compiler is told about a tile."""
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return options | ({"maxnreg": tile.registers} if tile.registers else {})


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Problem:
    """One call of a pass in canonical form, and the launch that serves all of its sequences and heads."""

    def __init__(
        self, name: str, q: Tensor, k: Tensor, lse: Tensor | None, rule: Rule, *, owner: str = "rows"
    ) -> None:  # fmt: skip
        """`owner` says which side of the tile a program keeps: `rows` of the map or `keys`."""
        self.batch, self.length, n_heads, head_size = q.shape
        self.q, self.rule = q, rule
        self.n_selected = rule.heads.shape[0]

        arch = configs.architecture(q.device)
        self.tile = configs.choose(name, arch, 8 * q.element_size() if not INTERPRETED else 32, head_size)
        self.tiles = -(-rule.max_seqlen // getattr(self.tile, owner))

        low, high = configs.chunks(head_size)
        self.arguments: dict[str, Any] = {
            "q": q, "k": k, **_score(rule), "heads": rule.heads, "sinks": rule.sinks,
            "tiles": self.tiles, "n_heads": self.n_selected, "kv_group": n_heads // k.shape[2],
            "D": head_size, "D0": low, "D1": high,
            "UPCAST": INTERPRETED and q.dtype == torch.bfloat16,
            "ROWS": self.tile.rows, "KEYS": self.tile.keys,
            **_options(self.tile), **_strides(q=q, k=k),
        }  # fmt: skip
        if lse is not None:
            self.arguments.update(lse=lse, lse_b=lse.stride(0), lse_h=lse.stride(1), lse_t=lse.stride(2))

    def output(self, *leading: int) -> Tensor:
        """`(*leading, B, Hs, T)` float32 zeros: positions outside the responses are nobody's to write."""
        return self.q.new_zeros((*leading, self.batch, self.n_selected, self.length), dtype=torch.float32)

    def launch(self, kernel: Any, like: Tensor, **extra: Any) -> None:
        """Run the kernel over every (tile, selected head, sequence); its outputs are laid out as `like`.

        A program has one head. A loop over heads would have to keep in registers, through the loop over tiles, what
        it needs again for the next one, and its first loads would wait for the last tile of the head before.
        """
        grid = self.tiles * self.n_selected * self.rule.seqs.shape[0]
        if grid == 0:
            return
        with _on(self.q.device):
            kernel[(grid,)](**self.arguments, **extra, out_b=like.stride(-3), out_h=like.stride(-2))


def over_heads(out: Tensor, per_head: bool) -> Tensor:
    """`(..., B, Hs, T)` as it is, or its mean over the heads, `(..., B, T)`, in their order."""
    if per_head:
        return out
    return out.squeeze(-2) if out.shape[-2] == 1 else out.mean(-2)


class AttentionProblem:
    """One call of attention or of its backward: what its kernels share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> None:
        self.q, self.k, self.v, self.rule = q, k, v, rule
        upcast = INTERPRETED and q.dtype == torch.bfloat16
        # The interpreter truncates where it should round to bfloat16: it writes float32, and torch rounds.
        self.stored = torch.float32 if upcast else q.dtype
        low, high = configs.chunks(q.shape[3])
        v_low, v_high = configs.chunks(v.shape[3])
        self.arguments: dict[str, Any] = {
            "q": q, "k": k, "v": v, **_score(rule), "kv_group": q.shape[2] // k.shape[2],
            "D": q.shape[3], "D0": low, "D1": high, "DV": v.shape[3], "V0": v_low, "V1": v_high,
            "UPCAST": upcast,
        }  # fmt: skip

    def launch(
        self, name: str, kernel: Any, owner: str, groups: int, strided: dict[str, Tensor], **extra: Any
    ) -> None:  # fmt: skip
        """Run a kernel over every (tile, one of `groups` heads, sequence).

        `owner` says which side of the tile a program keeps, `rows` of the map or `keys`; `strided` names the tensors
        `(B, T, heads, size)` that the kernel takes beside q, k and v.
        """
        arch = configs.architecture(self.q.device)
        bits = 8 * self.q.element_size() if not INTERPRETED else 32
        tile = configs.choose(name, arch, bits, max(self.q.shape[3], self.v.shape[3]))
        if tile.capped_rows and (self.arguments["HAS_SOFTCAP"] or self.arguments["HAS_WINDOW"]):
            tile = tile._replace(rows=tile.capped_rows)
        tiles = -(-self.rule.max_seqlen // getattr(tile, owner))
        grid = tiles * groups * self.rule.seqs.shape[0]
        if grid == 0:
            return
        with _on(self.q.device):
            kernel[(grid,)](
                **self.arguments, **extra, **strided, **_strides(q=self.q, k=self.k, v=self.v, **strided),
                tiles=tiles, groups=groups, ROWS=tile.rows, KEYS=tile.keys, **_options(tile),
            )  # fmt: skip
