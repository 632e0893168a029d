"""Whether Triton runs its kernels in its interpreter: decided by TRITON_INTERPRET when triton is first imported."""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
