"""`credit`: gamma (eqs. 14 to 19) of a batch of responses."""

from __future__ import annotations

from ..shapes import CreditShape
from ..work import Work


def work(shape: CreditShape) -> Work:
    """WAAD, FAI (float32) and the mask (one byte) in, gamma (float32) out; comparisons are not counted."""
    return Work(13 * shape.batch * shape.length, 0)
