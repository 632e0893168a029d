"""Which calls of a pass would compile a kernel anew, found without a GPU, as one JSON object.

``python -m tests.triton.compiled_variants`` calls every pass over :func:`calls` and prints the labels of the calls
after the first that would compile something new: under ``ours`` with the kernels as they are, under ``plain`` with the
same kernels as Triton specialises them by default.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton

from .without_gpu import PASSES, arguments, launches

RULES = {
    "plain rule": {"window_left": -1, "softcap": 0.0},
    "every part": {"window_left": 20, "softcap": 30.0, "sinks": torch.zeros(16), "alibi_slopes": torch.zeros(1, 16)},
}


def calls(rule: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Calls that differ in what changes from step to step; Triton likes to specialise 1 and multiples of 16."""
    yield "first", arguments(**rule)
    for length in (1, 16, 17, 64, 1000, 4096):
        yield f"length {length}", arguments(length, **rule)
        yield f"length {length}, heads first", arguments(length, layout="heads first", **rule)
        yield f"length {length}, fused projection", arguments(length, layout="fused", **rule)
    for batch in (1, 3, 16):
        yield f"batch {batch}", arguments(batch=batch, sequences=batch, **rule)
    for sequences in (1, 5, 16, 33):
        yield f"{sequences} packed sequences", arguments(batch=1, sequences=sequences, **rule)
    for heads, kv_heads, selected in ((16, 1, 1), (16, 16, 15), (5, 5, 3)):
        yield (
            f"{selected} of {heads} heads on {kv_heads}",
            arguments(heads=heads, kv_heads=kv_heads, selected=selected, **rule),
        )
    yield "lse out of a larger tensor", arguments(lse_offset=1, **rule)
    changes: dict[str, tuple[Any, ...]] = {
        "scale": (1.0, 1, 16.0, 0.3), "window": (1, 16, 2**40), "lo": (0, 1, 16), "hi": (16, 17, 2**40),
        "min_distance": (0, 1, 16), "max_seqlen": (1, 16, 33), "per_head": (True,),
    }  # fmt: skip
    if rule["window_left"] >= 0:
        changes |= {"window_left": (0, 1, 16, 2**40)}
    if "alibi_slopes" in rule:
        changes["alibi_slopes"] = (torch.zeros(2, 16), torch.zeros(3, 1))
    if rule["softcap"] > 0:
        changes |= {"softcap": (1.0, 1, 16.0)}
    for name, values in changes.items():
        for value in values:
            yield f"{name} {value}", arguments(**rule | {name: value})


def new_variants(name: str, rule: dict[str, Any]) -> list[str]:
    """The labels of the calls, after the first, that launch a kernel under a key that no call before had."""
    seen: set[str] = set()
    labels = []
    for label, given in calls(rule):
        keys = {launch.key for launch in launches("sm_90", name, given)}
        if keys - seen and label != "first":
            labels.append(label)
        seen |= keys
    return labels


def specialise(name: str) -> None:
    """Give the pass its kernels as Triton specialises them by default."""
    module = sys.modules[PASSES[name][0].__module__]
    for attribute, kernel in list(vars(module).items()):
        if attribute.endswith("_kernel"):
            setattr(module, attribute, triton.jit(kernel.fn))


def main() -> None:
    report = {
        "ours": {f"{name}, {kind}": new_variants(name, rule) for name in PASSES for kind, rule in RULES.items()},
        "plain": {},
    }
    for name in PASSES:
        specialise(name)
        report["plain"][name] = new_variants(name, RULES["plain rule"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
