"""Without a GPU the kernels run in Triton's interpreter, which is chosen when triton is first imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Fresh memory holds NaN in every test: what nobody writes must not pass because the allocator was kind."""
