"""`credit`: gamma (eqs. 13 to 18) of a batch of responses."""

from __future__ import annotations

from ..shapes import CreditShape
from ..work import Work


def work(shape: CreditShape) -> Work:
    """WAAD, FAI (float32) and the mask (one byte) in, gamma (float32) out; comparisons are not counted."""
    return Work(13 * shape.batch * shape.length, 0)
