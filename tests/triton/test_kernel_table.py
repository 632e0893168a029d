"""docs/kernels.md has the tables that can be made without compiling as they are now."""

from __future__ import annotations

import pytest

from . import kernel_table


@pytest.mark.parametrize("name", ["work", "tiles"])
def test_the_document_is_up_to_date(name: str) -> None:
    """Else: `python -m tests.triton.kernel_table --write`."""
    found = kernel_table.between(name).search(kernel_table.DOCUMENT.read_text(encoding="utf-8"))
    assert found is not None
    assert found[2].splitlines() == list(kernel_table.TABLES[name]())
