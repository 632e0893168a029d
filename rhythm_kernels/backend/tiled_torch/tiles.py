"""What the tile-wise torch code shares: tile sizes, products and sums to float32's precision, the online softmax.

A *tile* is a range of rows `(first, end)` by a range of keys; its values are `(B, Hs, rows, keys)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Elements of a tile of logits, over batch and heads: this bounds the memory at a few MB, whatever the length.
_TILE_ELEMENTS = 1 << 20
KEY_TILE = 256


def row_tile(q: Tensor, heads: int, keys: int) -> int:
    """Rows of a tile that keep `batch x heads x rows x keys` within the budget, between 16 and 256."""
    return max(16, min(256, _TILE_ELEMENTS // (q.shape[0] * heads * keys)))


def ranges(begin: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """Half-open tiles of `[begin, end)`."""
    for a in range(begin, end, step):
        yield a, min(a + step, end)


def host_min(x: Tensor, default: int) -> int:
    """Smallest value of a CPU tensor; `default` elsewhere, so that the host never waits for a device."""
    return int(x.min()) if x.device.type == "cpu" else default


def host_max(x: Tensor, default: int) -> int:
    """Largest value of a CPU tensor; `default` elsewhere."""
    return int(x.max()) if x.device.type == "cpu" else default


def rounds_operands(device: torch.device) -> bool:
    """Whether torch may round the operands of a float32 product on this device, to TF32 or bfloat16.

    `set_float32_matmul_precision`, `allow_tf32` and `fp32_precision`, of one backend or of all, all set what is read
    here. (The older getters raise in a program that has used both kinds of setters.)
    """
    libraries: dict[str, Any] = {
        "cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn, "xpu": torch.backends.mkldnn,
    }  # fmt: skip
    library = libraries.get(device.type)
    return library is not None and library.matmul.fp32_precision in ("tf32", "bf16")


def exactly(*operands: Tensor) -> tuple[Tensor, ...]:
    """The operands of a float32 product, raised to float64 where torch would round them: no setting touches float64.

    The settings belong to the process: to change them around a product would change them for other threads too, and
    undo what another thread sets meanwhile.
    """
    return tuple(x.double() for x in operands) if rounds_operands(operands[0].device) else operands


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of float32 operands, to the precision of float32 whatever torch's settings say."""
    a, b = exactly(a, b)
    return torch.matmul(a, b).float()


def product_of_seen(weights: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """`weights (.., M, N) @ values (.., N, D)`, where weights are 0 outside of `seen (.., M, N)`.

    0 times NaN is NaN: what is not finite in `values`, in padding or in another sequence, must reach only the rows that
    see it. The host does not wait for values on a GPU, where they are always treated as if some were not finite.
    """
    odd = ~values.isfinite()  # (.., N, D)
    if values.device.type == "cpu" and not bool(odd.any()):
        return product(weights, values)
    touched = torch.matmul(seen.to(values.dtype), odd.to(values.dtype)) > 0  # (.., M, D)
    return torch.where(touched, product(weights, values), product(weights, values.masked_fill(odd, 0.0)))


def add_to(total: Tensor, lost: Tensor, term: Tensor) -> tuple[Tensor, Tensor]:
    """`total + term`, and by how much the sum is too large after its roundings so far (Kahan).

    A sum over many tiles, or one with a term far above the others, is then as exact as a sum of two. A sum that is not
    finite stays as it is.
    """
    owed = term - lost
    after = total + owed
    return after, torch.where(after.isfinite(), (after - total) - owed, 0.0)


def products(q: Tensor, k: Tensor, rows: tuple[int, int], keys: tuple[int, int], heads: Tensor) -> Tensor:
    """`q.k` of a tile of the selected heads: `(B, Hs, rows, keys)` float32."""
    kv_group_size = q.shape[2] // k.shape[2]
    qs = q[:, slice(*rows)].index_select(2, heads).float().transpose(1, 2)  # (B, Hs, rows, D)
    ks = k[:, slice(*keys)].index_select(2, heads // kv_group_size).float().permute(0, 2, 3, 1)  # (B, Hs, D, keys)
    return product(qs, ks)


def softmax_step(peak: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One tile of an online softmax.

    Args:
        peak: `(B, H, rows)`, the largest logit so far.
        x: `(B, H, rows, keys)`, the tile's logits, -inf outside of `mask`.

    Returns:
        The new peak `(B, H, rows)`, the factor for sums relative to the old one, `(B, H, rows)`, and the tile's weights
        relative to the new one, `(B, H, rows, keys)`.
    """
    new_peak = torch.maximum(peak, x.amax(dim=-1))
    # Until a row meets its first key both peaks are -inf, and their difference is not a number.
    decay = torch.where(peak == new_peak, 1.0, torch.exp(peak - new_peak))
    # Where every logit was -inf so far, subtract 0: -inf less -inf is not a number.
    base = torch.where(new_peak == float("-inf"), 0.0, new_peak)
    return new_peak, decay, torch.where(mask, torch.exp(x - base[..., None]), 0.0)
