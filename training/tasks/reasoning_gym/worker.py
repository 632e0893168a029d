"""What a process does that makes questions of the package reasoning_gym, or scores answers (`training/serve.py`).

It imports nothing but the package. A request is a list that begins with one of `check`, `make`, `score`. One process
either makes or scores: what makes questions never sees the text of a model. It runs with one fixed hash seed, on which
some sets' questions depend.
"""

import ast
import base64
import dataclasses
import functools
import json
import math
import pickle
import re
import sys
from collections.abc import Callable
from typing import Any

import reasoning_gym  # noqa: F401 - before the process says that it has started

CHUNK = 500  # questions of one seed: what the package takes for granted; some sets make all of a seed's at once


def check(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What is wrong with a set's name (`known`: the names) or its options (`fields`, or `error`); empty for nothing."""
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        return {"known": sorted(DATASETS)}
    fields = [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
    if not fields_hold(fields, options):
        return {"fields": fields}
    try:
        _questions(name, json.dumps(options), 0)
    except Exception as error:
        return {"error": _said(error)}
    return {}


def fields_hold(fields: list[str], options: dict[str, Any]) -> bool:
    return all(key in fields for key in options)


def make(name: str, options: dict[str, Any], seed: int, index: int) -> dict[str, Any]:
    """Question `index` of a seed: its text, the set's own answer if it has one, and `entry`, what its scorer reads.

    The entry is pickled, since some hold what JSON has not, and is unpickled only by a process that scores.
    """
    try:
        entry = _questions(name, json.dumps(options), seed)[index]
        answer = None if entry["answer"] is None else str(entry["answer"])
        kept = base64.b64encode(pickle.dumps(entry)).decode("ascii")
        return {"question": str(entry["question"]), "answer": answer, "entry": kept}
    except Exception as error:
        return {"error": _said(error)}


def score(name: str, options: dict[str, Any], seed: int, answer: str, entry: str) -> float:
    """The set's own score of an answer, in [0, 1]; 0 where its scorer fails."""
    _disarm()
    known = pickle.loads(base64.b64decode(entry))
    try:
        value = float(_questions(name, json.dumps(options), seed).score_answer(answer, known))
    except Exception:  # RecursionError and MemoryError among them
        return 0.0
    return min(1.0, max(0.0, value)) if math.isfinite(value) else 0.0


def answer(request: list[Any]) -> Any:
    what, *rest = request
    return {"check": check, "make": make, "score": score}[what](*rest)


@functools.lru_cache(maxsize=64)
def _questions(name: str, options: str, seed: int) -> Any:
    from reasoning_gym import create_dataset

    given = json.loads(options)
    if name == "composite":  # a mixture of sets
        from reasoning_gym.composite import DatasetSpec

        given["datasets"] = [DatasetSpec(**{"weight": 1.0, "config": {}} | one) for one in given.get("datasets") or []]
    return create_dataset(name, **given, seed=seed, size=CHUNK)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# --- Scorers that evaluate answers as Python --------------------------------------------------------------------------

_EXPRESSION = re.compile(r"[A-Za-z0-9_\s+\-*/^().,!|]*", re.ASCII)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_ATTRIBUTE = re.compile(r"\.\s*[A-Za-z_]", re.ASCII)
_FUNCTIONS = frozenset(
    ["sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "asec", "acsc", "sinh", "cosh", "tanh"]
    + ["coth", "asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "cbrt", "Abs", "abs", "sign", "pi", "oo", "erf"]
)
_TRUSTED = ("reasoning_gym.arithmetic.bitwise_arithmetic",)  # evaluates its own question, never an answer


@functools.cache
def _disarm() -> None:
    """Take from the package's scorers the means to run an answer as a program.

    Several call `eval`, or `parse_expr` of sympy, which evaluates too, on what a model wrote. Here `eval` reads
    literals, `exec` does nothing, and `parse_expr` reads expressions of numbers, letters and functions. sympy itself,
    which reads names of its own when parts of it are imported, keeps what it has.
    """
    import sympy
    from sympy.parsing import sympy_parser

    plain = sympy_parser.parse_expr
    reader = _reader(plain)
    sympy.parse_expr = reader
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "reasoning_gym" and name not in _TRUSTED:
            module.eval, module.exec = _literal, _nothing  # type: ignore[attr-defined]
            for key, value in list(vars(module).items()):
                if value is plain:
                    setattr(module, key, reader)


def _literal(text: Any, *_: Any) -> Any:
    return ast.literal_eval(text)


def _nothing(*_: Any) -> None:
    raise ValueError("not here")


def _reader(plain: Callable[..., Any]) -> Callable[..., Any]:
    def parse_expr(text: str, local_dict: dict[str, Any] | None = None, *rest: Any, **more: Any) -> Any:
        known = {*_FUNCTIONS, *(local_dict or {})}
        named = all(len(name) == 1 or name in known for name in _NAME.findall(text))
        if not named or _ATTRIBUTE.search(text) or not _EXPRESSION.fullmatch(text):
            raise ValueError("not an expression")
        return plain(text, local_dict, *rest, **more)

    return parse_expr
