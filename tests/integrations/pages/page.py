"""The pages of docs/trainers, as their readers run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parents[3] / "docs" / "trainers"


def blocks(page: str) -> list[str]:
    """The Python blocks of a page, in order."""
    return re.findall(r"```python\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL)


def run(source: str, names: dict[str, Any], page: str) -> dict[str, Any]:
    """Execute a block in `names`, with the page's name in its tracebacks."""
    exec(compile(source, str(PAGES / page), "exec"), names)
    return names
