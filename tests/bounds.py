"""How far each measure may be from float64, and how far it was: the one source of every tolerance.

The tests are held to these functions, and `docs/kernels.md` prints :func:`table`. Of measures that are given a
log-sum-exp, the float32 number given is meant, itself half a unit in its last place off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rhythm_kernels.reference import ColumnMoments

OUT = 1e-5  # of attention's float32 output, relative to the largest value
GRADIENT = 1e-5  # of a gradient, relative to what the sizes of its terms come to
MOMENT = 1e-3  # of a column's mean, variance, skewness and kurtosis, relative


def lse(size: Tensor | float) -> Tensor | float:
    """Of a log-sum-exp of this size."""
    return 1e-4 * (size.abs().nan_to_num(posinf=1).clamp(min=1) if isinstance(size, Tensor) else max(1.0, abs(size)))


def logit(size: float) -> float:
    """Of a logit whose terms' sizes come to `size` (a number or an array), and of its distance to a log-sum-exp.

    Nothing beside the other bounds where logits are ordinary; where they are in the thousands it is all that float32
    leaves, and each bound grows by what it does to the measure.
    """
    return 2.0**-21 * (2 + size)


def rounding(dtype: torch.dtype) -> tuple[float, float]:
    """Of one rounding to this type: relative, and among its smallest numbers absolute."""
    info = torch.finfo(dtype)
    # Float32's own is part of every bound, and its subnormal numbers may be taken for 0.
    return (0.0, info.tiny) if dtype == torch.float32 else (info.eps / 2, info.tiny * info.eps)


def waad(window: int) -> float:
    """In tokens, whatever T. Without a given lse it is this share of what a sink leaves to the keys."""
    return 1e-4 * max(1.0, window / 10)


def fai() -> float:
    """Of a mean of attention weights, at most 1, whatever T and the horizon."""
    return 1e-4


def span(length: int) -> float:
    """In tokens: span is at most T, and its bound grows with it."""
    return 1e-4 * length


def moments(want: ColumnMoments) -> ColumnMoments:
    """Of each of them. Below a deviation of 1e-3 of the mean skewness and kurtosis are float32's noise: see `seen`."""
    return ColumnMoments(
        want.count * 0 + MOMENT,
        MOMENT * want.mean + 1e-12,
        MOMENT * want.variance + 1e-9 * want.mean**2 + 1e-30,
        MOMENT * want.skewness.abs().clamp(min=1),
        MOMENT * want.kurtosis.abs().clamp(min=1),
    )


def attention(dtype: torch.dtype, gradient_of: Tensor | None, interpreted: bool = False) -> float:
    """Of attention's output, or of a gradient where this `lse` was: a share of 1 + the largest value.

    Beside twice the error of float32 torch it is that of rounding to the type, and of weights that are rounded before
    each product, where Triton's interpreter multiplies bfloat16 as float32. Gradients are rounded themselves, and start
    from an output and a log-sum-exp that were.
    """
    share = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2**-8 if interpreted else 1.5e-2}[dtype]
    if gradient_of is None:
        return share
    size = float(gradient_of[gradient_of.isfinite()].abs().max()) if bool(gradient_of.isfinite().any()) else 0.0
    return 2 * share + size * 2**-22


def seen(want: ColumnMoments) -> Tensor:
    """Where one head's attention varies enough for float32 to carry a third or fourth moment."""
    deviation = want.variance.sqrt()
    return (deviation == 0) | ((deviation > 1e-3 * want.mean) & (deviation > 1e-15))


# What docs/kernels.md says of each bound, and the largest errors of `tests/sums.py` in the long tests as shares of it
# (`pytest -rP` prints them); WAAD without a given lse as one of the keys' share. None: the backend has no such pass.
MEASURED_AT = {"cpu": 32_768, "torch": 32_768, "triton": 4096, "cuda": 4096}
MEASURED: dict[str, tuple[str, tuple[float | None, ...]]] = {
    "band_rows: WAAD": ("`1e-4 max(1, W / 10)`", (0.27, 0.05, 0.11, 0.11)),
    "band_columns: FAI": ("1e-4", (0.012, 0.0048, 0.0056, 0.091)),
    "row_stats: log-sum-exp": ("`1e-4 max(1, abs(lse))`", (0.0026, 0.00088, 0.005, None)),
    "row_stats: WAAD": ("`1e-4 max(1, W / 10)`", (0.053, 0.097, 0.068, None)),
    "row_stats: span": ("`1e-4 T`", (0.032, 0.0035, 0.049, None)),
    "column_stats: FAI to the end": ("1e-4", (0.0095, 0.0048, 0.0056, None)),
    "column_stats: mean": ("1e-3 of it", (0.00055, 0.00022, 0.00065, None)),
    "column_stats: variance": ("1e-3 of it", (0.17, 0.13, 0.12, None)),
    "column_stats: skewness": ("1e-3 of it, or of 1", (0.49, 0.35, 0.42, None)),
    "column_stats: kurtosis": ("1e-3 of it, or of 1", (0.39, 0.1, 0.13, None)),
    "attention: out (float32)": ("1e-5 of the largest value", (0.086, 0.04, 0.15, None)),
    "attention: log-sum-exp, WAAD, span": ("as row_stats", (0.053, 0.097, 0.23, None)),
    "attention: gradients (float32), T = 4,096, Triton 1,024": ("1e-5 of the terms' sizes", (None, 0.15, 0.095, None)),
}


def table() -> list[str]:
    """The lines of the table in docs/kernels.md."""
    heads = [f"{name}, T = {length:,}" for name, length in MEASURED_AT.items()]
    lines = [f"| pass: measure | bound | {' | '.join(heads)} |", "| --- | --- |" + " --- |" * len(heads)]
    for name, (bound, shares) in MEASURED.items():
        words = ["-" if share is None else f"{100 * share:.2g}%" for share in shares]
        lines.append(f"| {name} | {bound} | {' | '.join(words)} |")
    return lines


if __name__ == "__main__":
    print(*table(), sep="\n")
