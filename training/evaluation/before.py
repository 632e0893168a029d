"""The evaluation before training, kept in `before.json`: a run that goes on has no untrained model to evaluate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..folder import write_text
from ..reading import read_json
from ..recipe import Recipe
from ..task import Figure, Instance
from .summary import KINDS, Evaluation, Response, questions


def identity(recipe: Recipe, instances: Sequence[Instance]) -> dict[str, Any]:
    """What the evaluation depends on and may change while a run goes on, ready for JSON."""
    return {"eval": asdict(recipe.eval), "questions": questions(instances)}


def save(path: Path, found: Mapping[str, Evaluation], of: Mapping[str, Any]) -> None:
    """Write evaluations by kind. Of a response all is kept but its tokens."""
    content: dict[str, Any] = {"identity": dict(of)}
    for kind, evaluation in found.items():
        responses = [
            {name: value for name, value in vars(response).items() if name != "tokens"}
            for response in evaluation.responses
        ]
        figures = {name: asdict(figure) for name, figure in evaluation.figures.items()}
        rest = {"sets": evaluation.sets, "figures": figures, "seconds": evaluation.seconds}
        content[kind] = {"responses": responses, **rest}
    write_text(path, json.dumps(content) + "\n")


def load(path: Path, of: Mapping[str, Any]) -> dict[str, Evaluation] | None:
    """What `save` wrote; None where nothing is there, or it is of another evaluation."""
    try:
        content = read_json(path.read_text(encoding="utf-8"))
        if content["identity"] != json.loads(json.dumps(of)):
            return None
        return {kind: _evaluation(**content[kind]) for kind in KINDS}
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not what `save` wrote
        return None


def _evaluation(responses: list[dict[str, Any]], sets: list[str], figures: Mapping[str, Any], seconds: float) -> Any:
    made = {name: Figure(**figure) for name, figure in figures.items()}
    return Evaluation([Response(**response) for response in responses], sets, made, seconds)
