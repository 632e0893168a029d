"""What every pass does around its kernel: outputs, argument lists, the grid, the device."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from . import configs
from .interpreted import INTERPRETED

# Lengths change every training step, and strides with them: no argument may compile a kernel anew. Alignment, which
# vector loads need, is passed once and for all as a constexpr: q and k strides come divided by ALIGN.
UNSPECIALIZED = (
    "q_b", "q_t", "q_h", "k_b", "k_t", "k_h", "lse_b", "lse_h", "lse_t", "out_b", "out_h", "tiles", "groups",
    "n_heads", "group_heads", "kv_group", "scale", "softcap", "window_left", "out_scale", "window", "lo", "hi",
    "min_distance", "out_m",
)  # fmt: skip


class Problem:
    """One call of a pass in canonical form, and the launch that serves all of its sequences and heads."""

    def __init__(
        self, name: str, q: Tensor, k: Tensor, lse: Tensor | None, seqs: Tensor, heads: Tensor,
        max_seqlen: int, scale: float, softcap: float, window_left: int, sinks: Tensor | None,
        *, owner: str = "rows",
    ) -> None:  # fmt: skip
        """`owner` says which side of the tile a program keeps: `rows` of the map or `keys`."""
        self.batch, self.length, n_heads, head_size = q.shape
        self.q, self.seqs, self.heads = q, seqs, heads
        self.n_selected = heads.shape[0]
        # A distance is below the length, so these say the same, and fit 32 bits.
        self.max_seqlen = min(max_seqlen, self.length)
        window_left = min(window_left, self.length)

        arch = configs.architecture(q.device)
        self.tile = configs.choose(name, arch, 8 * q.element_size() if not INTERPRETED else 32, head_size)
        self.tiles = -(-self.max_seqlen // getattr(self.tile, owner))
        self.groups = -(-configs.MIN_PROGRAMS[arch] // max(1, self.tiles * seqs.shape[0]))

        low, high = configs.chunks(head_size)
        q_strides, k_strides = q.stride()[:3], k.stride()[:3]
        align = math.gcd(16, *q_strides, *k_strides)
        self.arguments: dict[str, Any] = {
            "q": q, "k": k, "seqs": seqs, "heads": heads, "sinks": sinks,
            "tiles": self.tiles, "n_heads": self.n_selected, "kv_group": n_heads // k.shape[2],
            "scale": scale, "softcap": softcap, "window_left": window_left,
            "ALIGN": align, "D": head_size, "D0": low, "D1": high,
            "UPCAST": INTERPRETED and q.dtype == torch.bfloat16,
            "HAS_SOFTCAP": softcap > 0, "HAS_WINDOW": window_left >= 0,
            "ROWS": self.tile.rows, "KEYS": self.tile.keys,
            "num_warps": self.tile.warps, "num_stages": self.tile.stages,
        }  # fmt: skip
        if self.tile.registers:
            self.arguments["maxnreg"] = self.tile.registers
        for prefix, strides in (("q", q_strides), ("k", k_strides)):
            for axis, stride in zip("bth", strides):
                self.arguments[f"{prefix}_{axis}"] = stride // align
        if lse is not None:
            self.arguments.update(lse=lse, lse_b=lse.stride(0), lse_h=lse.stride(1), lse_t=lse.stride(2))

    def group_heads(self, per_head: bool) -> int:
        """How many heads one program sums: one where each is an output, else all, or fewer to fill the device."""
        if per_head:
            return 1
        return -(-self.n_selected // min(self.groups, self.n_selected))

    def partial(self, per_head: bool, *leading: int) -> Tensor:
        """`(*leading, B, groups, T)` float32 zeros: positions outside the responses are nobody's to write."""
        groups = -(-self.n_selected // self.group_heads(per_head))
        return self.q.new_zeros((*leading, self.batch, groups, self.length), dtype=torch.float32)

    def launch(self, kernel: Any, partial: Tensor, per_head: bool, **extra: Any) -> None:
        """Run the kernel over every (tile, group of heads, sequence), writing what `partial` is laid out for."""
        groups = partial.shape[-2]
        grid = self.tiles * groups * self.seqs.shape[0]
        if grid == 0:
            return
        on_device = torch.cuda.device(self.q.device) if self.q.is_cuda else contextlib.nullcontext()
        with on_device:
            kernel[(grid,)](
                **self.arguments,
                **extra,
                groups=groups,
                group_heads=self.group_heads(per_head),
                out_b=partial.stride(-3),
                out_h=partial.stride(-2),
                out_scale=1.0 if per_head else 1.0 / self.n_selected,
            )

    def finish(self, partial: Tensor, per_head: bool) -> Tensor:
        """Add the groups up, in their order; `per_head` keeps them."""
        if per_head:
            return partial
        return partial.squeeze(-2) if partial.shape[-2] == 1 else partial.sum(-2)
