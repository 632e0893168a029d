"""Whether Triton runs its kernels in its interpreter: decided by TRITON_INTERPRET when triton is first imported."""

from __future__ import annotations

import os
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def read_scalars_under_any_numpy() -> None:
    """Let the interpreter of Triton 3.6 read loop bounds under numpy 2.4 and newer.

    It keeps every scalar as an array of one element and converts that with `int()`, which numpy refuses since 2.4.
    """
    from triton.runtime import interpreter

    before = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        before(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch
