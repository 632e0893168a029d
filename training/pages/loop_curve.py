"""What the reference loops print, as a chart: one line for each file, in an SVG that stands alone.

python -m training.reference_ppo RECIPE > ppo.txt
python -m training.pages.loop_curve ppo.txt > curve.svg          # --of tokens: another column
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .charts import HEIGHT, WIDTH, curves

# Colours that are seen on light and on dark: a page that shows the file as an image has no say in it.
_STYLE = """
text{font:11px system-ui,sans-serif;fill:#808790}
.grid{stroke:#80879055;stroke-width:1}
.mean{fill:none;stroke-width:2;stroke-linejoin:round}
.s0{stroke:#2f8fb0}.s1{stroke:#c47d09}.s2{stroke:#9a62cc}.s3{stroke:#1f9a5f}.s4{stroke:#d04a74}
"""


def read(path: Path, name: str) -> list[tuple[float, float]]:
    """(step, value) of each line, such as `step 1  reward 0.5`.

    Raises:
        ValueError: where a line has no such value, or there is no line.
    """
    points = []
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split()
        found = dict(zip(words[::2], words[1::2]))
        if not {"step", name} <= found.keys():
            raise ValueError(f"{path}: lines must have step and {name}, got {line!r}")
        points.append((float(found["step"]), float(found[name])))
    if not points:
        raise ValueError(f"{path}: it must hold a line for each step, got none")
    return points


def chart(runs: dict[str, Sequence[tuple[float, float]]], of: str) -> str:
    """The running mean of each run, with the names of the runs at the bottom."""
    drawn = curves(list(runs.values()), list(runs), label=f"{of} by step")
    key, width = [], max(82, 30 + 6 * max(map(len, runs)))
    columns = max(1, 246 // width)
    for i, name in enumerate(runs):
        x, y = 62 + width * (i % columns), HEIGHT - 42 - 13 * (i // columns)
        key.append(f'<path class="mean s{i % 5}" d="M{x} {y - 4}h18"/>')
        key.append(f'<text x="{x + 24}" y="{y}">{escape(name)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{2 * HEIGHT}" '
    body = drawn.replace("<svg ", head, 1).replace(">", f"><style>{_STYLE}</style>", 1)
    return body.removesuffix("</svg>") + "".join(key) + "</svg>\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw what the reference loops print, as an SVG.")
    parser.add_argument("files", nargs="+", type=Path, help="a run each; its name is the file's")
    parser.add_argument("--of", default="reward", help="the column (default: reward)")
    asked = parser.parse_args()
    try:
        print(chart({path.stem: read(path, asked.of) for path in asked.files}, asked.of), end="")
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
