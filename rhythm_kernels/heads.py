"""Which heads are local and which are global, as a value and as a file."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Head = tuple[int, int]

_ARCHITECTURE = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclass
class HeadGroups:
    """The local heads `H_loc` (WAAD) and the global heads `H_glob` (FAI), each a list of (layer, query head).

    `provenance` says for which model and from which data the groups were made; groups built by hand have none.
    """

    local: list[Head]
    global_: list[Head]
    provenance: dict[str, Any] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        self.local = _heads_of("local", self.local)
        self.global_ = _heads_of("global_", self.global_)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON with the keys `local`, `global` and, where there is one, `provenance`."""
        content: dict[str, Any] = {"local": self.local, "global": self.global_}
        if self.provenance is not None:
            content["provenance"] = self.provenance
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadGroups:
        """Read what `save` wrote, or a hand-written file with the keys `local` and `global`.

        Raises:
            ValueError: the file is not JSON with these keys.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(content["local"], content["global"], content.get("provenance"))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                "path must be a file of head groups (JSON with the keys 'local' and 'global', lists of [layer, head]), "
                f"got {path}"
            ) from error

    def check(self, config: Any, heads: Mapping[int, int]) -> None:
        """Raise `ValueError` where the groups were made for another architecture or do not fit the model.

        Args:
            config: the model's configuration.
            heads: layer -> its query heads, of the layers that can be measured.
        """
        made_for = (self.provenance or {}).get("architecture")
        if made_for is not None:
            here = architecture(config)
            differs = {name: (made_for.get(name), here[name]) for name in here if made_for.get(name) != here[name]}
            if differs:
                detail = ", ".join(f"{name} {there!r}, here {now!r}" for name, (there, now) in differs.items())
                raise ValueError(
                    f"groups must be made for this model, got those of another architecture ({detail}): calibrate this "
                    "model with head_groups(model, batches)"
                )
        for name, group in (("local", self.local), ("global_", self.global_)):
            for layer, head in group:
                if layer not in heads:
                    raise ValueError(
                        f"groups.{name} must be of layers with softmax attention to measure, got layer {layer}: this "
                        f"model has it in {sorted(heads)}"
                    )
                if head >= heads[layer]:
                    raise ValueError(
                        f"groups.{name} must be of query heads that there are, got head {head} of layer {layer}, which "
                        f"has {heads[layer]}"
                    )


def _heads_of(name: str, heads: Iterable[Sequence[int]]) -> list[Head]:
    try:
        pairs = [(operator.index(layer), operator.index(head)) for layer, head in heads]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a list of (layer, query head) pairs, got {heads!r}") from error
    if not pairs:
        raise ValueError(f"{name} must have at least one (layer, query head), got none")
    if len(set(pairs)) != len(pairs):
        raise ValueError(f"{name} must list each head once, got {max(pairs, key=pairs.count)} twice")
    if min(min(pair) for pair in pairs) < 0:
        raise ValueError(f"{name} must count layers and heads from 0, got {min(pairs, key=min)}")
    return pairs


def architecture(config: Any) -> dict[str, Any]:
    """What of a model's configuration says whether groups of heads fit it."""
    text = config.get_text_config(decoder=True)
    return {name: getattr(text, name, None) for name in _ARCHITECTURE}
