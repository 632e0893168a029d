"""A run's folder: the names in it, and reading a run from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .recipe import RecipeError

CONFIG, METRICS, RESULT, REPORT, GROUPS, MODEL, CHECKPOINTS, EVALUATION = (
    "config.yaml",
    "metrics.jsonl",
    "result.json",
    "report.html",
    "groups.json",
    "model",
    "checkpoints",
    "evaluation.json",
)


@dataclass(frozen=True)
class Run:
    """What a finished run says of itself.

    Attributes:
        config: `config.yaml`, the recipe as it was carried out.
        result: `result.json`.
        lines: `metrics.jsonl`, a dictionary a step.
    """

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]
    lines: list[dict[str, float]]


def read_run(folder: Path) -> Run:
    """The finished run in `folder`.

    Raises:
        RecipeError: where there is none.
    """
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{folder}: no finished run ({error.strerror}: {error.filename})") from error
    return Run(folder, config, result, [json.loads(line) for line in lines])
