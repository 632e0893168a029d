"""The source of a release of TRL, of which nothing is imported, and how rules over it ask.

Sources are compared as `ast.unparse` writes them, so comments, line breaks and quotes do not count; names do, where
readers of both would stumble over another.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator

# The methods that are overridden.
GENERATE, LOSS, PASS = "_generate_and_score_completions", "_compute_loss", "_get_per_token_logps_and_entropies"
PASSES = (PASS, "_full_logits_logps")  # as `PASSES` of `trl/inputs.py`, which cannot be imported without TRL
Function = ast.FunctionDef


class BrokenError(Exception):
    """A rule that does not hold, in words."""


class Release:
    """The source of one TRL: of `trl/trainer/grpo_trainer.py` and of `trl/trainer/utils.py`."""

    def __init__(self, trainer: str, utils: str) -> None:
        self.functions: dict[str, Function] = {}
        for source, owner, prefix in ((trainer, "GRPOTrainer", ""), (utils, "RepeatSampler", "RepeatSampler.")):
            for node in ast.parse(source).body:
                inside = node.body if isinstance(node, ast.ClassDef) and node.name == owner else []
                self.functions.update({f"{prefix}{x.name}": x for x in inside if isinstance(x, Function)})
                if isinstance(node, Function):
                    self.functions[node.name] = node

    def __getitem__(self, name: str) -> Function:
        if name not in self.functions:
            raise BrokenError(f"there is no {name}")
        return self.functions[name]

    def fingerprint(self, name: str) -> str:
        """The same for functions of the same AST, docstrings aside; of all methods that make a pass for `PASS`."""
        names = [x for x in (PASSES if name == PASS else (name,)) if x in self.functions]
        dumps = [ast.dump(x) for one in names for x in (self[one].args, *without_docstring(self[one]))]
        return hashlib.sha256("\n".join(dumps).encode()).hexdigest()[:8]


def without_docstring(function: Function) -> list[ast.stmt]:
    return function.body[1:] if ast.get_docstring(function) is not None else function.body


def text(node: ast.AST) -> str:
    return ast.unparse(node)


def nodes(function: ast.AST, kind: type) -> Iterator:
    return (node for node in ast.walk(function) if isinstance(node, kind))


def calls(function: ast.AST, of: str) -> list[ast.Call]:
    """The calls of what is written `of`, in the order of the source."""
    found = [call for call in nodes(function, ast.Call) if text(call.func) == of]
    return sorted(found, key=lambda call: (call.lineno, call.col_offset))


def values(function: ast.AST, name: str) -> list[str]:
    """What is assigned to `name`, alone or in a tuple beside others, in the order of the source."""
    found = []
    for assign in nodes(function, ast.Assign):
        for target in assign.targets:
            pairs = [(target, assign.value)]
            if isinstance(target, ast.Tuple) and isinstance(assign.value, ast.Tuple):
                pairs = list(zip(target.elts, assign.value.elts))
            found += [(assign.lineno, text(value)) for place, value in pairs if text(place) == name]
    return [value for _, value in sorted(found)]


def around(function: ast.AST, kind: type, inner: ast.AST) -> list:
    """The statements of a kind in whose body `inner` stands, the outermost first."""
    found = [x for x in nodes(function, kind) if any(inner is y for line in x.body for y in ast.walk(line))]
    return sorted(found, key=lambda x: x.lineno)


def need(holds: object, words: str) -> None:
    if not holds:
        raise BrokenError(words)


def need_value(function: Function, name: str, value: str) -> None:
    found = values(function, name)
    need(found and found[0] == value, f"in {function.name} {name} is {found[0] if found else 'not set'}, not {value}")


def need_text(function: Function, *wanted: str) -> None:
    whole = {text(node) for node in ast.walk(function) if isinstance(node, ast.expr | ast.stmt)}
    for words in wanted:
        need(words in whole, f"{function.name} has no {words}")
