"""What `result.json` must hold for `compare` and `evaluate` to read it: nothing in it is taken for granted."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from .pages.formats import indices_of, unpack
from .reading import misfit

_ANSWERS = {"instances": int, "accuracy": float, "standard_error": float, "tokens": float, "right": str}
_BOTH = {"sampled": _ANSWERS, "greedy": _ANSWERS}
_RESULT = {
    "mode": str,
    "seed": int,
    "split": str,
    "before": _BOTH,
    "after": _BOTH,
    "seconds": {"training": float},
}
_SHARE = {"accuracy": float, "standard_error": float}


def fault(result: Any) -> str:
    """What is wrong with the content of a `result.json`, in words; empty where nothing is."""
    if said := misfit(result, _RESULT):
        return said
    for when in ("before", "after"):
        for kind in _BOTH:
            if said := _of_answers(result[when][kind], f"{when}.{kind}"):
                return said
    return _of_sets(result)


def _of_answers(found: Mapping[str, Any], name: str) -> str:
    try:
        unpack(found["right"], found["instances"])
    except ValueError:
        right = reprlib.repr(found["right"])
        return f"{name}.right must be a 0 or 1 for each response to each of the instances, got {right}"
    samples = found.get("samples", 1)
    if misfit(samples, int) and not (
        isinstance(samples, list) and samples and not any(misfit(s, int) for s in samples)
    ):
        return f"{name}.samples must be a whole number, or a list of them, got {reprlib.repr(samples)}"
    passes = found.get("pass", {})
    return misfit(passes, {}, f"{name}.pass") or misfit(passes, {k: {"value": float} for k in passes}, f"{name}.pass")


def _of_sets(result: Mapping[str, Any]) -> str:
    """Test sets are there since there are several: each instance is in one, and each has its accuracy."""
    sets = result.get("sets", {})
    if said := misfit(sets, {}, "sets") or misfit(sets, dict.fromkeys(sets, str), "sets"):
        return said
    if not sets:
        return ""
    count = result["after"]["sampled"]["instances"]
    try:
        members = [i for text in sets.values() for i in indices_of(text, count)]
    except ValueError:
        members = []
    if sorted(members) != list(range(count)):
        return f"sets must hold each of the {count} instances once, got {reprlib.repr(sets)}"
    schema = {"sets": dict.fromkeys(sets, _SHARE), "mean_of_sets": _SHARE}
    return next(filter(None, (misfit(result["after"][kind], schema, f"after.{kind}") for kind in _BOTH)), "")
